"""A checkpoint and a bundle that draws, measured as any bundle is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mobilemm
from mobilemm.bench.host import bench_here
from mobilemm.bench.result import Settings
from mobilemm.bench.subject import open_subject
from mobilemm.errors import MobileMMError
from mobilemm.export.assemble import export_bundle
from mobilemm.export.options import ExportOptions
from mobilemm.export.quantization import make_plan
from mobilemm.export.targets import find_target
from tests.export.drawing_checkpoint import write_drawer

pytestmark = pytest.mark.slow

SETTINGS = Settings(prompt_tokens=8, new_tokens=4, runs=2, threads=1)
STEPS = 2


@pytest.fixture(scope="module")
def drawer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawer(tmp_path_factory.mktemp("drawers") / "drawer")


@pytest.fixture(scope="module")
def bundle_that_draws(drawer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _export(drawer, tmp_path_factory.mktemp("bundles") / "draws")


def _export(drawer: Path, folder: Path, stepwise: bool = False) -> Path:
    pytest.importorskip("onnxruntime")
    plan = make_plan("fp32", vision="fp32", generator="fp32")
    options = ExportOptions(plan=plan, steps=STEPS, stepwise=stepwise)
    export_bundle(str(drawer), find_target("onnx"), folder, options)
    return folder


def test_a_checkpoint_is_measured_on_pytorch(drawer: Path) -> None:
    result = bench_here(drawer, SETTINGS.model_copy(update={"steps": 3}))
    names = {figure.name for figure in result.figures}
    assert {"load_cold", "load_warm", "image", "vision", "ttft", "pp8", "tg4", "token", "memory"} <= names
    assert {"draw", "draw_step", "memory_drawing"} <= names
    assert len(result.figure("draw").runs) == SETTINGS.runs
    assert len(result.figure("draw_step").runs) == SETTINGS.runs * 3  # each step by itself
    assert result.figure("draw_step").median < result.figure("draw").median
    assert result.runtime.startswith("PyTorch ")
    model, _ = mobilemm.load(drawer)
    assert sum(result.bundle.parts.values()) == sum(4 * one.numel() for one in model.parameters())


def test_a_checkpoint_says_what_the_model_says(drawer: Path) -> None:
    """The loop that is timed is a greedy decoding, also behind a truncation."""
    subject = open_subject(drawer, 1, None)
    subject.load()
    ids = list(subject.words[:12])
    model, _ = mobilemm.load(drawer)
    with torch.no_grad():
        wanted = [int(model(input_ids=torch.tensor([ids[:end]])).logits[0, -1].argmax()) for end in (8, 12)]
    subject.truncate(0)
    assert subject.decode(subject.embed(ids[:8])) == wanted[0]
    assert subject.decode(subject.embed(ids[:4])) >= 0
    subject.truncate(8)
    assert subject.decode(subject.embed(ids[8:])) == wanted[1]


def test_a_bundle_that_draws_is_timed(bundle_that_draws: Path) -> None:
    result = bench_here(bundle_that_draws, SETTINGS)
    draw, step = result.figure("draw"), result.figure("draw_step")
    assert len(draw.runs) == len(step.runs) == SETTINGS.runs
    # The steps are one program: a step is its share of the whole.
    assert step.median == pytest.approx(draw.median / STEPS, rel=0.2)
    assert result.bundle.parts.keys() >= {"output_projector", "generator"}


def test_a_bundle_that_draws_step_by_step_is_timed(drawer: Path, tmp_path: Path) -> None:
    bundle = _export(drawer, tmp_path / "steps", stepwise=True)
    result = bench_here(bundle, SETTINGS.model_copy(update={"steps": 4}))
    assert len(result.figure("draw").runs) == SETTINGS.runs
    assert len(result.figure("draw_step").runs) == SETTINGS.runs * 4  # each step by itself
    assert result.bundle.parts.keys() >= {"output_projector", "denoiser", "image_decoder"}


def test_other_steps_than_a_bundle_has_are_refused(bundle_that_draws: Path, bundle: Path) -> None:
    wanted = SETTINGS.model_copy(update={"steps": 7})
    with pytest.raises(MobileMMError, match="--steps 7, but this bundle draws in 2"):
        bench_here(bundle_that_draws, wanted)
    with pytest.raises(MobileMMError, match="--steps 7, but this bundle does not draw"):
        bench_here(bundle, wanted)
