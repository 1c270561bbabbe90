"""What a person can get wrong ends with one line on stderr and exit code 2."""

from __future__ import annotations

import json
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mobilemm
from tests.runtime.bundles import write_bundle

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def bundle(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(*mobilemm.load(pristine), tmp_path_factory.mktemp("errors") / "bundle")


def shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("model-*.safetensors"))
    assert len(found) > 1
    return found


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("command", ["chat", "inspect"])
def test_folders(run: Run, folder: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty/config.json: there is no such file" in run(command, tmp_path / "empty").error
    assert "there is no such folder" in run(command, tmp_path / "none").error
    assert "there is no such folder" in run(command, folder / "config.json").error
    (folder / "config.json").write_text('{\n"a": 1,,\n}')
    assert "config.json: not valid JSON" in run(command, folder).error


@pytest.mark.parametrize("command", ["chat", "inspect"])
def test_a_missing_and_a_cut_shard(run: Run, folder: Path, command: str) -> None:
    first, second, *_ = shards(folder)
    second.write_bytes(second.read_bytes()[:-100])
    assert f"{second}: cut short or damaged" in run(command, folder).error
    first.unlink()
    assert f"{first}: this weight file is missing" in run(command, folder).error


def test_a_tensor_of_the_wrong_shape(run: Run, folder: Path) -> None:
    path = shards(folder)[0]
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("weight"))
    save_file(tensors | {name: torch.zeros(7)}, path)
    error = run("chat", folder, "-p", "a").error
    assert str(path) in error
    assert name in error
    assert "(7,)" in error


@pytest.mark.parametrize("command", ["chat", "inspect"])
def test_an_unknown_projector(run: Run, folder: Path, command: str) -> None:
    edit_config(folder, projector={"type": "nonsense"})
    error = run(command, folder).error
    assert "nonsense" in error
    assert "ldpnetv2" in error


@pytest.mark.parametrize("command", ["chat", "inspect"])
def test_a_malicious_bin_runs_nothing(run: Run, folder: Path, tmp_path: Path, command: str) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    for path in folder.glob("model*"):
        path.unlink()
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write({"a": Payload()}, folder / "pytorch_model.bin")
        error = run(command, folder).error
        assert "pytorch_model.bin: refused, nothing was run" in error
    assert not (tmp_path / "ran").exists()


def png_header(width: int, height: int) -> bytes:
    """A picture that claims a size and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_pictures(run: Run, folder: Path, tmp_path: Path, picture: Path) -> None:
    cut, bomb, text = (tmp_path / name for name in ("cut.png", "bomb.png", "text.png"))
    cut.write_bytes(picture.read_bytes()[:-200])
    bomb.write_bytes(png_header(60_000, 60_000))
    text.write_text("no picture")
    for path, reason in (
        (cut, "damaged or incomplete"),
        (bomb, "more than the limit"),
        (text, "not a picture"),
        (tmp_path, "directory"),
        (tmp_path / "none.png", "No such file"),
    ):
        error = run("chat", folder, "--image", picture, "--image", path, "-p", "What is this?").error
        assert str(path) in error
        assert reason in error


def test_a_prompt_longer_than_the_context(run: Run, folder: Path) -> None:
    assert "this model's context is 256" in run("chat", folder, "-p", "a" * 300).error


def test_a_device_and_a_dtype_that_are_not_there(run: Run, folder: Path) -> None:
    assert "'nonsense'" in run("chat", folder, "--device", "nonsense").error
    assert "known: float32, bfloat16, float16" in run("chat", folder, "--dtype", "int3").error


def test_a_system_prompt_where_the_template_takes_none(run: Run, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(settings | {"template": "tokenizer"}))
    edit_config(folder, template="tokenizer")
    assert "no system here" in run("chat", folder, "--system", "a", "-p", "b").error


@pytest.mark.parametrize("command", ["push", "pull"])
def test_what_is_no_bundle_goes_nowhere(run: Run, folder: Path, tmp_path: Path, command: str) -> None:
    there = tmp_path / "there"
    assert "there is no such folder" in run(command, tmp_path / "none", there).error
    assert f"{folder}: is no bundle" in run(command, folder, there).error
    assert not there.exists()


def test_push_publishes_nothing_by_mistake(run: Run, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle.parent)
    assert "Write hub:someone/bundle to publish" in run("push", bundle, "someone/bundle").error
    assert "hub:nonsense" in run("push", bundle, "hub:nonsense").error


def test_nothing_but_a_bundle_is_replaced(run: Run, bundle: Path, folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    assert f"{folder}: is there already and is no bundle" in run("push", bundle, folder).error
    assert f"{folder}: is there already and is no bundle" in run("pull", bundle, folder).error
    ended = run("export", folder, "-o", folder, "--force")
    assert ended.code == 2
    assert f"{folder}: is there already and is no bundle" in ended.stderr.splitlines()[-1]
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--target", "abacus"], "unknown target 'abacus'; known: onnx"),
        (["-t", "onnx", "-t", "abacus", "-o", "there"], "with several targets leave -o out"),
        (["--dtype", "int3"], "'int3' is no precision; choose from int4, int6, int8, fp16, fp32"),
        (["--q-method", "nonsense"], "the method 'nonsense' is not known; choose from rtn, hqq, gptq, awq"),
        (["--block-size", 33], "a block of 33 weights is not known"),
        (["--q-keep", "layers.0"], "--q-keep 'layers.0': must be PATTERN=BITS"),
        (["--q-keep", "nonsense.*=8"], "no layer of 'decoder' is named 'nonsense.*'"),
        (["--calibration", "none.json"], "none.json: cannot be read (No such file or directory)"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_export_says_what_it_cannot_do(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[Any], why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run("export", folder, *options)
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert why in ended.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("*-onnx"))


def test_export_of_no_model(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    there = tmp_path / "there"
    assert "there is no such folder" in run("export", tmp_path / "none", "-o", there).stderr.splitlines()[-1]
    ended = run("export", tmp_path / "empty", "-o", there)
    assert ended.code == 2
    assert "empty/config.json: there is no such file" in ended.stderr.splitlines()[-1]
    assert not there.exists()


def test_wrong_usage(run: Run, folder: Path) -> None:
    for arguments in (
        ["chat", folder, "--temperature", "-1"],
        ["chat", folder, "--max-new-tokens", "0"],
        ["chat", folder, "--seed", "-1"],
        ["chat", folder, "--nonsense"],
        ["nonsense"],
        ["run"],
        ["push", folder],
        ["export", folder, "--max-seq-len", 1],
    ):
        ended = run(*arguments)
        assert ended.code == 2
        assert ended.stdout == ""
        assert "Traceback" not in ended.stderr


def test_trace(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mobilemm.errors import MobileMMError

    monkeypatch.setenv("MOBILEMM_TRACE", "1")
    with pytest.raises(MobileMMError):
        run("inspect", tmp_path)


def test_a_picture_of_one_pixel_is_no_error(run: Run, folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    assert run("chat", folder, "-i", tmp_path / "one.png", "-p", "a", "--max-new-tokens", 2).code == 0
