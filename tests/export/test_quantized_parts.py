"""Quantized weights are made once, for every target and every try."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mobilemm.export.assemble import export_bundles
from mobilemm.export.calibration import read_calibration
from mobilemm.export.model import Model, open_model
from mobilemm.export.options import ExportOptions
from mobilemm.export.quantization import QuantizedLinear, WeightScheme, make_plan
from mobilemm.export.quantized_parts import QuantizedParts
from mobilemm.export.targets import find_target


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return open_model(str(checkpoint), ExportOptions())


def made(model: Model, options: ExportOptions, store: Path | None) -> tuple[nn.Module, list[str]]:
    told: list[str] = []
    parts = QuantizedParts(model, options, read_calibration(None), store, told.append)
    module, plan = parts.module("decoder")
    assert plan == options.plan.part("decoder")
    return module, told


def wanted_schemes(options: ExportOptions) -> list[WeightScheme]:
    """Those of the decoder, and of the head, which is the embedding's table."""
    plan = options.plan.part("decoder")
    schemes = [plan.default, *(scheme for _, scheme in plan.exceptions)]
    return [scheme for scheme in schemes if scheme.quantized]


def state(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict())


@pytest.mark.parametrize(
    "words",
    [
        {"method": "gptq", "block_size": 32, "keep": ["layers.0.*=8", "*.down=fp32"]},
        {"method": "awq", "block_size": 32, "symmetric": False},
        {"embed": "pal6", "method": "rtn", "keep": ["layers.0.*=pal4", "*.down=pal6"]},
    ],
)
def test_what_was_kept_is_what_was_made(model: Model, tmp_path: Path, words: dict[str, object]) -> None:
    options = ExportOptions(plan=make_plan("int4", **words))  # type: ignore[arg-type]
    fresh, _ = made(model, options, None)
    first, told = made(model, options, tmp_path)
    assert any("quantizing layers.1" in text for text in told)
    again, told = made(model, options, tmp_path)
    assert told == ["decoder: quantized already"]
    for other in (first, again):
        assert state(other).keys() == state(fresh).keys()
        for name, value in state(fresh).items():
            torch.testing.assert_close(state(other)[name], value, rtol=0, atol=0, msg=name)
        kinds = {name: type(child) for name, child in fresh.named_modules()}
        assert {name: type(child) for name, child in other.named_modules()} == kinds
    schemes = {child.bits for child in again.modules() if isinstance(child, QuantizedLinear)}
    assert schemes == {scheme.bits for scheme in wanted_schemes(options)}


def test_other_weights_plans_and_damaged_files_are_made_anew(model: Model, tmp_path: Path) -> None:
    options = ExportOptions(plan=make_plan("int4", method="rtn", block_size=32))
    other = ExportOptions(plan=make_plan("int4", method="rtn", block_size=64))
    made(model, options, tmp_path)
    (first,) = tmp_path.iterdir()
    assert "decoder: quantized already" not in made(model, other, tmp_path)[1]
    assert "decoder: quantized already" in made(model, other, tmp_path)[1]
    assert "decoder: quantized already" in made(model, options, tmp_path)[1]
    first.write_bytes(first.read_bytes()[:500])
    assert "decoder: quantized already" not in made(model, options, tmp_path)[1]
    assert "decoder: quantized already" in made(model, options, tmp_path)[1]
    first.rename(next(path for path in tmp_path.iterdir() if path != first))  # a name proves nothing
    assert "decoder: quantized already" not in made(model, other, tmp_path)[1]


def test_two_targets_read_and_quantize_once(checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(plan=make_plan("int4", method="rtn", block_size=32))
    places = [
        (find_target("onnx"), tmp_path / "fused"),
        (find_target("onnx", standard_ops=True), tmp_path / "standard"),
    ]
    told: list[str] = []
    results = list(export_bundles(str(checkpoint), places, options, report=told.append))
    assert sum(text.startswith("reading") for text in told) == 1
    assert told.count("decoder: quantized already") == 1
    assert [result.bundle.folder.name for result in results] == ["fused", "standard"]
    answers = [conversation.answer for one in results for conversation in one.bundle.manifest.conversations]
    assert answers[0] == answers[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fused", "standard"]


@pytest.mark.slow
def test_three_targets_share_what_is_common(checkpoint: Path, tmp_path: Path) -> None:
    """ExecuTorch's linear layers have scales of their own sign, and with them codes of their own."""
    pytest.importorskip("coremltools")
    pytest.importorskip("executorch")
    options = ExportOptions(plan=make_plan("int4", method="rtn", block_size=32))
    names = ("coreml", "executorch", "onnx")
    told: list[str] = []
    places = [(find_target(name), tmp_path / name) for name in names]
    results = list(export_bundles(str(checkpoint), places, options, report=told.append))
    assert sum(text.startswith("reading") for text in told) == 1
    assert told.count("decoder: quantized already") == 1
    assert [result.bundle.manifest.target for result in results] == list(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
