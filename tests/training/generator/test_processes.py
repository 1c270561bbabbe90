"""Two processes learn what one does with twice the accumulation."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mobilemm.training.generator import stage
from tests.training.generator.conftest import RecipeMaker
from tests.training.test_processes import free_port, train_as_process

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["consistency", "distribution_matching"])
def test_two_processes_are_one_with_twice_the_accumulation(
    name: str, make_recipe: RecipeMaker, tmp_path: Path, teacher_folder: Path
) -> None:
    changes: dict[str, Any] = {"batch_size": 2, "show_samples": 0}
    if name == "distribution_matching":
        changes |= {"student": teacher_folder, "fake_steps": 2}
    one = make_recipe(name, output=tmp_path / "one", accumulation=2, **changes)
    two = make_recipe(name, output=tmp_path / "two", **changes)
    context = multiprocessing.get_context("spawn")
    port = free_port()
    processes = [
        context.Process(target=train_as_process, args=(two, rank, port, stage.train), daemon=True)
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    stage.train(one, lambda line: None)
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    losses = [json.loads((run.output / "result.json").read_text())["loss"] for run in (one, two)]
    assert [loss for _, loss in losses[1]] == pytest.approx([loss for _, loss in losses[0]], rel=1e-4)
    file = Path("generator", "unet", "diffusion_pytorch_model.safetensors")
    expected = load_file(one.output / file)
    for key, tensor in load_file(two.output / file).items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-3, msg=key)
