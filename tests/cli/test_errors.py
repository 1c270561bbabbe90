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

Run = Callable[..., Any]


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


def test_wrong_usage(run: Run, folder: Path) -> None:
    for arguments in (
        ["chat", folder, "--temperature", "-1"],
        ["chat", folder, "--max-new-tokens", "0"],
        ["chat", folder, "--seed", "-1"],
        ["chat", folder, "--nonsense"],
        ["nonsense"],
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
