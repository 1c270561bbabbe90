"""The command as its own process: what it imports, how long it takes, and that nothing else is printed."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mobilemm
from mobilemm.runtime.pytorch import ChatSession
from mobilemm.runtime.sampling import Sampling

HEAVY = [
    "torch",
    "transformers",
    "numpy",
    "PIL",
    "huggingface_hub",
    "timm",
    "accelerate",
    "onnx",
    "onnxruntime",
]
COMMANDS = ["export", "verify", "run", "chat", "inspect", "push", "pull", "doctor"]


def python(*arguments: object, encoding: str = "utf-8", **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    options["env"] = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run(command, capture_output=True, encoding=encoding, timeout=300, **options)


@pytest.mark.parametrize("arguments", [[], ["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_nothing_heavy_and_is_quick(arguments: list[str]) -> None:
    code = f"""
import sys, time
import mobilemm
sys.argv = ["mobilemm", *{arguments!r}]
if sys.argv[1:]:
    from mobilemm.cli import main
    try:
        main()
    except SystemExit as ended:
        assert not ended.code
print("heavy:", sorted(set({HEAVY!r}) & set(sys.modules)))
print("seconds:", time.process_time())
"""
    *help_text, heavy, seconds = python("-c", code).stdout.splitlines()
    assert heavy == "heavy: []"
    assert float(seconds.split()[1]) < 1.0
    if arguments == ["--help"]:
        for name in COMMANDS:
            assert name in "\n".join(help_text)


def test_version() -> None:
    assert python("-m", "mobilemm", "--version").stdout == f"mobilemm {mobilemm.__version__}\n"


@pytest.mark.slow
def test_a_conversation_prints_answers_and_nothing_else(pristine: Path, picture: Path) -> None:
    session = ChatSession(*mobilemm.load(pristine), Sampling(max_new_tokens=8))
    session.look_at(picture)
    wanted = [session.reply("What is this?") + "\n", session.reply("And this?") + "\n"]
    ended = python(
        *["-m", "mobilemm", "chat", pristine, "--image", picture, "--max-new-tokens", 8],
        input="What is this?\nAnd this?\n",
        encoding="latin-1",  # a terminal that cannot print all of it
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "".join(wanted).encode("latin-1", "replace").decode("latin-1")


@pytest.mark.slow
def test_an_error_prints_one_line_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Payload()}))
    ended = python("-m", "mobilemm", "chat", folder, "-p", "a")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert "refused, nothing was run" in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "ran").exists()


def test_a_wrong_picture_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    code = f"""
import sys
sys.argv = ["mobilemm", "chat", "--image", {str(tmp_path / "none.png")!r}]
from mobilemm.cli import main
try:
    main()
except SystemExit as ended:
    print(ended.code, "torch" in sys.modules)
"""
    ended = python("-c", code)
    assert ended.stdout == "2 False\n"
    assert "No such file" in ended.stderr
