"""`mobilemm run`: a bundle answers as its model does, without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mobilemm
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import open_bundle
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.session import Session
from tests.runtime.bundles import write_bundle

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def bundle(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the other commands' tests, exported."""
    return write_bundle(*mobilemm.load(pristine), tmp_path_factory.mktemp("run") / "bundle")


def test_it_answers_as_chat_does(run: Run, bundle: Path, pristine: Path, picture: Path) -> None:
    options = ["-i", picture, "-p", "What is this?", "--max-new-tokens", 8]
    ended = run("run", bundle, *options)
    assert (ended.code, ended.stderr) == (0, "")
    assert ended.stdout == run("chat", pristine, *options).stdout
    assert ended.stdout != run("run", bundle, "-p", "What is this?", "--max-new-tokens", 8).stdout


def test_a_conversation_from_a_pipe(run: Run, bundle: Path, pristine: Path, picture: Path) -> None:
    lines = [
        f"/image {picture}",
        "What is this?",
        "/nonsense",
        "And this?",
        "/reset",
        "/image none.png",
        "What?",
    ]
    ended = run("run", bundle, "--max-new-tokens", 6, stdin="\n".join(lines))
    assert ended.code == 0
    assert ended.stdout == run("chat", pristine, "--max-new-tokens", 6, stdin="\n".join(lines)).stdout
    assert ended.stdout.count("\n") >= 3
    assert "none.png: cannot be read" in ended.stderr


def test_options_reach_the_session(run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Session] = []

    def stream(session: Session, text: str) -> list[str]:
        heard.append(session)
        return [f"answer to {text}"]

    monkeypatch.setattr(Session, "stream", stream)
    options = (
        "--max-new-tokens 7 --temperature 0.5 --top-k 5 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.2"
    )
    ended = run("run", bundle, "-p", "a", "--system", "b", *options.split(), "--seed", 3, "--threads", 1)
    assert ended.stdout == "answer to a\n"
    [session] = heard
    assert session.sampling == Sampling(7, 0.5, 5, 0.9, 1.2, 3, 0.1)
    assert session.system == "b"
    assert session.backend.threads == 1  # type: ignore[attr-defined]


def test_sampling_is_repeatable(run: Run, bundle: Path) -> None:
    def answer(seed: int) -> str:
        options = ["--temperature", 1.5, "--min-p", 0.01, "--seed", seed, "--max-new-tokens", 12]
        return run("run", bundle, "-p", "a", *options).stdout

    assert answer(1) == answer(1) != answer(2)


def test_stats(run: Run, bundle: Path) -> None:
    ended = run("run", bundle, "--stats", "--max-new-tokens", 4, stdin="a\nb\n")
    lines = ended.stderr.splitlines()
    assert len(lines) == 2
    for line in lines:
        for word in ("ttft", "prefill", "decode", "tok/s"):
            assert word in line


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no such folder"),
        (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda folder: (folder / "parts" / "decoder.onnx").unlink(), "decoder.onnx: is missing"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json: has 2 bytes"),
    ],
    ids=["no folder", "no manifest", "no part", "damaged"],
)
def test_what_is_no_bundle(run: Run, bundle: Path, tmp_path: Path, change: Any, why: str) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "copy"))
    change(folder)
    assert why in run("run", folder, "-p", "a").error


def test_steps_are_for_what_draws(run: Run, bundle: Path, pristine: Path) -> None:
    for command, folder in (("run", bundle), ("chat", pristine)):
        ended = run(command, folder, "-p", "a", "--steps", 3)
        assert ended.code == 2
        assert "--steps 3, but this" in ended.error
        assert "does not draw" in ended.error


def test_a_model_folder_is_no_bundle(run: Run, pristine: Path) -> None:
    assert "is no bundle" in run("run", pristine, "-p", "a").error


def test_a_runtime_too_old(run: Run, bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "copy"))
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["runtime"]["min_version"] = "99.0"
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert "needs onnxruntime 99.0 or newer" in run("run", folder, "-p", "a").error


def test_a_wrong_picture(run: Run, bundle: Path, tmp_path: Path) -> None:
    assert "No such file" in run("run", bundle, "-i", tmp_path / "none.png", "-p", "a").error


def test_it_needs_no_torch_and_starts_fast(bundle: Path, picture: Path) -> None:
    code = f"""
import sys, time
sys.argv = ["mobilemm", "run", {str(bundle)!r}, "-i", {str(picture)!r}, "-p", "a", "--max-new-tokens", "2"]
from mobilemm.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code
print()
print("heavy:", sorted({{"torch", "transformers", "timm", "jinja2"}} & set(sys.modules)))
print("seconds:", time.process_time())
"""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=environment, check=True
    )
    *_, heavy, seconds = ended.stdout.splitlines()
    assert heavy == "heavy: []"
    assert float(seconds.split()[1]) < 2.0


def test_python_and_the_command_say_the_same(run: Run, bundle: Path, picture: Path) -> None:
    opened = open_bundle(bundle)
    session = Session(opened, open_backend(opened), Sampling(8))
    session.look_at(picture)
    said = session.reply("What is this?")
    assert (
        run("run", bundle, "-i", picture, "-p", "What is this?", "--max-new-tokens", 8).stdout == said + "\n"
    )
