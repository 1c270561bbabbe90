"""Operators' shares: what the runtimes' own profilers say, counted against what the models are made of."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from mobilemm.bench.profiling import TOKENS, Operator, executorch_name, profile
from mobilemm.bench.result import Settings
from mobilemm.errors import MobileMMError
from mobilemm.export.assemble import export_bundle
from mobilemm.export.options import ExportOptions
from mobilemm.export.quantization import make_plan
from mobilemm.export.targets import find_target
from mobilemm.runtime.bundle import open_bundle
from tests.export.tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.slow

SETTINGS = Settings(prompt_tokens=8, threads=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("profiled") / "tiny")


def profiled(folder: Path, trace: Path) -> dict[str, list[Operator]]:
    """By phase. The trace is one that a viewer opens, with every phase's calls in it."""
    phases: dict[str, list[Operator]] = {}
    for one in profile(folder, SETTINGS, trace):
        phases.setdefault(one.phase, []).append(one)
    assert phases.keys() == {"photo", "pp8", f"tg{TOKENS}"}
    events = [one for one in json.loads(trace.read_text())["traceEvents"] if one["ph"] == "X"]
    assert all(one["dur"] >= 0 for one in events)
    in_trace = Counter(one["name"] for one in events)
    for found in phases.values():
        assert [one.seconds for one in found] == sorted((one.seconds for one in found), reverse=True)
        assert all(in_trace[one.name] >= one.calls for one in found)
    return phases


@pytest.mark.parametrize(
    ("target", "package", "attention", "linear"),
    [
        ("onnx", "onnxruntime", "GroupQueryAttention", "MatMul"),
        ("executorch", "executorch", "llama::custom_sdpa.out", "XNNPACK Fully Connected"),
    ],
)
def test_a_bundle(
    checkpoint: Path, tmp_path: Path, target: str, package: str, attention: str, linear: str
) -> None:
    pytest.importorskip(package)
    options = ExportOptions(plan=make_plan("fp32", vision="fp32"))
    export_bundle(str(checkpoint), find_target(target), tmp_path / "bundle", options)
    phases = profiled(tmp_path / "bundle", tmp_path / "trace.json")
    layers = open_bundle(tmp_path / "bundle").manifest.model.num_layers
    for phase, runs in (("pp8", 1), (f"tg{TOKENS}", TOKENS)):
        calls = {one.name: one.calls for one in phases[phase]}
        assert calls[attention] == runs * layers
        assert any(name.startswith(linear) for name in calls)


def test_pytorch(checkpoint: Path, tmp_path: Path) -> None:
    phases = profiled(checkpoint, tmp_path / "trace.json")
    layers = json.loads((checkpoint / "config.json").read_text())["text_config"]["num_hidden_layers"]
    calls = {one.name: one.calls for one in phases[f"tg{TOKENS}"]}
    assert calls["aten::scaled_dot_product_attention"] == TOKENS * layers


def test_what_cannot_be_profiled_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MobileMMError, match=r"manifest\.json"):
        profile(tmp_path, SETTINGS, tmp_path / "trace.json")
    assert not (tmp_path / "trace.json").exists()


def test_names() -> None:
    assert (
        executorch_name("Fully Connected (NC, F32) GEMM #12", True)
        == "XNNPACK Fully Connected (NC, F32) GEMM"
    )
    assert executorch_name("native_call_select_copy.int_out", False) == "select_copy.int_out"
    assert executorch_name("DELEGATE_CALL", False) is None
