"""Two processes learn what one does with twice the accumulation."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mobilemm.training.recipe import Recipe
from mobilemm.training.stage import train

pytestmark = pytest.mark.slow
PARTS = {"projector": 1e-2, "language_model": 1e-3, "vision_encoder": 1e-3}


def train_as_process(recipe: Any, rank: int, port: int, run: Callable[..., object] = train) -> None:
    """One of two processes that share gradients; in a process of its own."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    run(recipe, lambda line: None)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def _losses(run: Path) -> list[float]:
    return [loss for _, loss in json.loads((run / "result.json").read_text())["loss"]]


@pytest.mark.parametrize("cache", [False, True], ids=["pictures", "kept features"])
def test_two_processes_are_one_with_twice_the_accumulation(
    make_recipe: Callable[..., Recipe], tmp_path: Path, cache: bool
) -> None:
    # Batches of one: a quarter of them have no picture, often in one process alone.
    parts = PARTS | ({"vision_encoder": 0} if cache else {})
    settings = {"train": parts, "batch_size": 1, "max_steps": 12, "log_every": 1, "group_by_length": False}
    one = make_recipe(**settings, cache_features=cache, accumulation=2, output=tmp_path / "one")
    two = make_recipe(**settings, cache_features=cache, accumulation=1, output=tmp_path / "two")
    # Spawned, because what the one has set up in this process would not fit two.
    context = multiprocessing.get_context("spawn")
    port = free_port()
    processes = [
        context.Process(target=train_as_process, args=(two, rank, port), daemon=True) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    train(one, lambda line: None)
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    wanted, found = _losses(one.output), _losses(two.output)
    assert len(wanted) == 12
    assert found == pytest.approx(wanted, abs=1e-5)
    expected = load_file(one.output / "model" / "model.safetensors")
    for name, tensor in load_file(two.output / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=name)
