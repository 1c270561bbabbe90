"""`mobilemm export`: wrong flags, what a dry run tells, the table, and where the bundle goes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mobilemm.runtime.bundle import open_bundle

pytest.importorskip("onnxruntime")

Run = Callable[..., Any]


def test_help_names_every_flag(run: Run) -> None:
    ended = run("export", "--help")
    assert ended.code == 0
    for flag in (
        *("--target", "--output", "--force", "--dtype", "--q-llm", "--q-embed", "--q-vision", "--q-method"),
        *("--block-size", "--asymmetric", "--q-keep", "--q-search", "--calibration", "--max-seq-len"),
        *("--image-size", "--opset", "--kv-cache", "--standard-ops", "--accuracy-level", "--ort-format"),
        *("--backend", "--allow-fallback", "--no-verify", "--dry-run", "--steps", "--stepwise"),
    ):
        assert flag in ended.stdout, flag


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target", "tflite"], "unknown target 'tflite'; known: onnx"),
        (["--q-llm", "int3"], "--q-llm: 'int3' is no precision; choose from int4, int6, int8, fp16, fp32"),
        (["--q-vision", "4"], "--q-vision: '4' is no precision"),
        (["--dtype", "half"], "'half' is no precision"),
        (["--q-method", "magic"], "the method 'magic' is not known; choose from rtn, hqq, gptq, awq"),
        (["--block-size", "48"], "a block of 48 weights is not known; choose from 16, 32, 64, 128, 256"),
        (["--q-keep", "layers.0.*"], "--q-keep 'layers.0.*': must be PATTERN=BITS"),
        (["--q-keep", "layers.0.*=5"], "'5' is no precision"),
        (["--q-keep", "layers.7.*=8"], "no layer of 'decoder' is named 'layers.7.*'; its layers are"),
        (["--q-search", "0.001"], "--q-search 0.0: the plan takes"),
        (["--calibration", "none.json"], "none.json: cannot be read (No such file or directory)"),
        (["--max-seq-len", "40"], "--max-seq-len 40: one picture, a question and an answer take"),
        (["--kv-cache", "int4"], "--kv-cache 'int4': choose float32 or int8"),
        (["--kv-cache", "int8", "--standard-ops"], "leave --standard-ops out"),
        (["-t", "executorch", "--backend", "qnn"], "--backend 'qnn': choose xnnpack or portable"),
        (["-t", "executorch", "--asymmetric"], "--target executorch: linear layers have no zero points"),
        (["-t", "executorch", "--block-size", "16"], "--block-size 32"),
        (["-t", "executorch", "--q-vision", "int6"], "'vision' in int6 is not possible; choose int4 or int8"),
        (["--stepwise"], "--stepwise: this model does not draw"),
        (["-t", "onnx", "-t", "coreml"], "with several targets leave -o out"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else None,
)
def test_wrong_flags_are_one_line(
    run: Run, pristine: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    ended = run("export", pristine, "-o", tmp_path / "out" / "b", *flags)
    assert (ended.code, ended.stdout) == (2, "")
    error = ended.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out" / "b").exists()
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-seq-len", "4"],
        ["--image-size", "1"],
        ["--q-search", "much"],
        ["--block-size"],
        ["--bits", "4"],
    ],
    ids="_".join,
)
def test_what_the_parser_refuses(run: Run, tmp_path: Path, flags: list[str]) -> None:
    ended = run("export", "-o", tmp_path / "b", *flags)
    assert (ended.code, ended.stdout) == (2, "")
    assert flags[0] in re.sub(r"\x1b\[[0-9;]*m", "", ended.stderr)
    assert os.listdir(tmp_path) == []


def test_a_model_that_is_not_there(run: Run, tmp_path: Path) -> None:
    ended = run("export", tmp_path / "none", "-o", tmp_path / "b")
    assert ended.code == 2
    assert ended.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'none'}: ")
    assert os.listdir(tmp_path) == []


def test_a_dry_run_tells_and_writes_nothing(run: Run, pristine: Path, tmp_path: Path) -> None:
    ended = run(
        "export", pristine, "-o", tmp_path / "b", "--dry-run", "--q-llm", "int8", "--q-vision", "fp32"
    )
    assert ended.code == 0, ended.stderr
    rows = {
        cells[0]: cells[1:]
        for line in ended.stdout.splitlines()
        if len(cells := [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]) == 4
    }
    assert rows["part"] == ["parameters", "bits", "MB"]
    assert set(rows) == {"part", "vision", "embed", "decoder"}
    # 259 words of 32 numbers, in one block each: 8 bits a number, padded to 128, and a scale.
    assert rows["embed"] == ["8,288", f"{8 * (128 + 4) / 32:.2f}", "0.0"]
    assert rows["vision"][1] == "32.00"
    assert re.search(r"about \d\.\d GB of memory .*, and \d+ to \d+ minutes", ended.stdout)
    assert os.listdir(tmp_path) == []


def test_the_table_is_what_the_manifest_says(
    run: Run, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without -o the bundle is NAME-TARGET in the working folder. The context is shorter than what parts are
    usually verified on."""
    monkeypatch.chdir(tmp_path)
    flags = ["--block-size", 32, "--max-seq-len", 110]
    ended = run("export", pristine, *flags)
    assert ended.code == 0, ended.stderr
    assert os.listdir(tmp_path) == ["model-onnx"]
    manifest = open_bundle(tmp_path / "model-onnx").manifest
    assert manifest.model.context_length == 110
    rows = {
        cells[0]: cells[1:]
        for line in ended.stdout.splitlines()
        if len(cells := [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]) == 6
    }
    for name, part in manifest.parts.items():
        assert part.parity is not None
        bits, size, parity, conversion, _ = rows[name]
        scheme = part.quantization
        assert bits == (f"{scheme.bits} / {scheme.block_size}" if scheme.block_size else f"{scheme.bits}")
        assert size == f"{part.bytes / 1e6:,.1f}"
        assert parity.startswith(f"cosine {part.parity.cosine:.5f}, {part.parity.snr_db:.1f} dB")
        assert conversion == f"{part.parity.conversion_db:.0f} dB"
    assert rows["all files"][1] == f"{sum(file.bytes for file in manifest.files) / 1e6:,.1f}"
    assert "What is in this picture?" in ended.stdout
    assert "PyTorch:" in ended.stdout
    words = " ".join(ended.stdout.split())
    assert re.search(r"vision on accelerators: NNAPI as is (YES|NO|MAYBE); (NNAPI|CoreML)", words)
    # The report, without a line for each layer.
    assert "decoder: converting" in ended.stderr.splitlines()
    assert "(1/3)" not in ended.stderr

    again = run("export", pristine, *flags)
    assert again.code == 2
    assert "error: model-onnx: is there already" in again.stderr.replace(f"{tmp_path}/", "")
    json.loads((tmp_path / "model-onnx" / "manifest.json").read_text())
    forced = run("export", pristine, *flags, "--force")
    assert forced.code == 0
    assert [line for line in forced.stderr.splitlines() if line.endswith("unchanged")] == [
        f"{name}: unchanged" for name in ("decoder", "embed", "vision")
    ]
