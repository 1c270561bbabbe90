"""A run that is broken off anywhere ends with the weights of one that was not."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mobilemm.errors import MobileMMError
from mobilemm.training.checkpoints import last_checkpoint
from mobilemm.training.recipe import Recipe
from mobilemm.training.stage import train

KILLS = 20
MODEL = "model/model.safetensors"
# Dropout, so that the state of the random generators counts; two passes a step.
LEARNING = {
    "train": {
        "projector": 1e-2,
        "language_model": {"learning_rate": 1e-2, "method": "lora", "rank": 2, "dropout": 0.1},
    },
    "accumulation": 2,
    "save_every": 3,
    "max_steps": 48,
}


def _silent(line: str) -> None:
    pass


def _in_a_process(work: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """A fork of a server that has imported everything and computed nothing: autograd's threads bear none."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mobilemm.training.stage", "mobilemm.training.trainer", __name__])
    process = context.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def _weights(run: Path) -> dict[str, torch.Tensor]:
    if (run / "model").is_dir():
        return load_file(run / MODEL)
    others = torch.load(run / "adapter" / "non_lora_trainables.bin", weights_only=True)
    return load_file(run / "adapter" / "adapter_model.safetensors") | others


@pytest.mark.slow
def test_twenty_kills_change_nothing(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = make_recipe(**LEARNING, output=tmp_path / "whole")
    train(whole, _silent)
    broken = make_recipe(**LEARNING, output=tmp_path / "broken")
    kills, cut_short = 0, 0
    while kills < KILLS:
        before = last_checkpoint(broken.output)
        process = _in_a_process(_until_killed, broken, kills, before)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run was over before it was killed often enough"
        kills += 1
        cut_short += (broken.output / ".writing").exists()
        after = last_checkpoint(broken.output)
        if after is not None:
            assert {path.name for path in after.iterdir()} >= {
                "trained.safetensors",
                "optimizer.pt",
                "scheduler.pt",
                "rng_state.pth",
                "trainer_state.json",
            }
        if before is not None:
            assert after is not None
    train(broken, _silent)
    assert cut_short > 0, "no checkpoint was hit while it was written"
    wanted, found = _weights(whole.output), _weights(broken.output)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def _until_killed(recipe: Recipe, kills: int, before: Path | None) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_kill, args=(recipe.output, kills, before), daemon=True).start()
    train(recipe, _silent)


def _kill(run: Path, kills: int, before: Path | None) -> None:
    """Ends this very process: half the times while a checkpoint is written, where something could be spoiled,
    else some steps after one."""
    delay = random.Random(kills).random()
    sys.setswitchinterval(1e-4)
    if kills % 2:
        while not (run / ".writing").exists():
            time.sleep(1e-4)
        time.sleep(delay * 0.01)
    else:
        while last_checkpoint(run) in (None, before):
            time.sleep(1e-2)
        time.sleep(delay * 0.1)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_full_disk_leaves_no_half_checkpoint(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    said = tmp_path / "said"
    recipe = make_recipe(train={"projector": 1e-2, "language_model": 1e-2}, output=tmp_path / "run")
    process = _in_a_process(_write_too_much, recipe, said)
    process.join()
    assert "checkpoint-2: could not be written" in said.read_text()
    assert "is the disk full?" in said.read_text()
    assert last_checkpoint(tmp_path / "run") is None
    assert not (tmp_path / "run" / ".writing").exists()


def _write_too_much(recipe: Recipe, said: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        train(recipe, _silent)
    except MobileMMError as error:
        said.write_text(str(error))


def test_a_run_goes_on_only_as_it_began(make_recipe: Callable[..., Recipe]) -> None:
    train(make_recipe(max_steps=2), _silent)
    with pytest.raises(MobileMMError, match=r"began with 'weight_decay': 0.0, not 0.1"):
        train(make_recipe(max_steps=2, weight_decay=0.1), _silent)
    lines: list[str] = []
    train(make_recipe(max_steps=2, log_every=1), lines.append)  # what decides nothing may change
    assert any(line.startswith("going on from") for line in lines)


def test_a_gradient_that_is_no_number_stops_the_run(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(max_steps=12, train={"projector": 1e30}, max_grad_norm=1e30, save_every=1)
    with pytest.raises(MobileMMError, match="checkpoint-1 is the last good state") as error:
        train(recipe, _silent)
    assert "step 2" in str(error.value)
    last = last_checkpoint(recipe.output)
    assert last is not None
    assert all(tensor.isfinite().all() for tensor in load_file(last / "trained.safetensors").values())
