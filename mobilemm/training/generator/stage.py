"""One stage of a generator's training, from its recipe to a folder; broken off, the same call goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mobilemm.doctor import installed
from mobilemm.errors import MobileMMError
from mobilemm.training.checkpoints import WRITING, begin, clean, last_checkpoint, put_in_place
from mobilemm.training.generator.data import rows_of_step
from mobilemm.training.generator.objectives import Objective
from mobilemm.training.generator.recipe import GeneratorRecipe
from mobilemm.training.progress import Meter, Report, loss_curve

# Keys that may change while a run is broken off: none of them decides what is learned. `max_steps` does with
# a schedule that falls to its end, and is looked at apart.
FREE_KEYS = frozenset(("output", "cache", "save_every", "keep_checkpoints", "log_every", "show_samples"))
PACKAGES = ("mobilemm", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")
_LEARNED, _TRAILING, _AVERAGE = "learned.safetensors", "trailing.safetensors", "average.safetensors"
_OPTIMIZER, _STATE = "optimizer.pt", "state.json"


@dataclass
class Stage:
    """A recipe with all that it names, ready to run.

    `batch` gives the objective's arguments for rows of the data, a random generator and the step; `sheet`
    draws a page of samples as a picture's path, `result` writes what the stage leaves. Both see the averaged
    weights.
    """

    recipe: GeneratorRecipe
    objective: Objective
    order: Any
    identity: str
    batch: Callable[[Any, torch.Generator, int], tuple[Any, ...]]
    sheet: Callable[[Path], None]
    result: Callable[[Path], Path]


def train(recipe: GeneratorRecipe, report: Report = print) -> Path:
    """Runs a recipe, going on from its last checkpoint; returns the folder of the result.

    On one process of one machine the same recipe gives the same weights bit for bit, interrupted or not: the
    chance of a step is drawn from seed and step alone.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs

    from mobilemm.training.generator.stages import prepare

    precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[recipe.precision]
    kwargs = []
    if getattr(recipe, "fake_steps", 1) > 1:  # steps in which the student does not learn
        kwargs.append(DistributedDataParallelKwargs(find_unused_parameters=True))
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # Several processes meet over the CPU only where they are told so.
    accelerator = Accelerator(
        cpu=several and not torch.cuda.is_available(), mixed_precision=precision, kwargs_handlers=kwargs
    )
    main = accelerator.is_main_process
    report = report if main else lambda _: None
    torch.manual_seed(recipe.seed)
    stage = prepare(recipe, report)
    run = Path(recipe.output)
    if main:
        begin(run, _settings(stage, accelerator.num_processes))
        clean(run)
    accelerator.wait_for_everyone()
    loop = _Loop(stage, accelerator, report)
    last = last_checkpoint(run)
    if last is not None:
        report(f"going on from {last}")
        loop.load(last)
    loop.run()
    result = run
    if main:
        with loop.averaged():
            result = stage.result(run)
        _write_result(run, recipe, loop.history)
        report(f"done: {result}")
    accelerator.wait_for_everyone()
    return result


def check(recipe: GeneratorRecipe, report: Report = print) -> dict[str, str]:
    """What a recipe would train, as lines for a person."""
    from mobilemm.training.generator.stages import prepare

    stage = prepare(recipe, report)
    learned = sum(value.numel() for value in stage.objective.learned().values())
    whole = sum(value.numel() for value in stage.objective.parameters())
    size = recipe.batch_size * recipe.accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "stage": str(getattr(recipe, "stage", "")),
        "learns": f"{learned:,} parameters of {whole:,} in memory",
        "pictures": f"{len(set(stage.order.tolist())):,}, {len(stage.order):,} an epoch",
        "steps": f"{recipe.max_steps:,} of {size}: {recipe.max_steps * size / len(stage.order):.1f} epochs",
    }


class _Loop:
    def __init__(self, stage: Stage, accelerator: Any, report: Report) -> None:
        self.stage, self.recipe, self.accelerator, self.report = stage, stage.recipe, accelerator, report
        objective = stage.objective.to(accelerator.device)
        self.learned = objective.learned()
        count, whole = sum(value.numel() for value in self.learned.values()), len(stage.order)
        self.size = self.recipe.batch_size * self.recipe.accumulation * accelerator.num_processes
        report(f"{whole:,} pictures an epoch, {self.size} a step; {count:,} parameters learn")
        optimizer = torch.optim.AdamW(
            objective.groups(self.recipe.learning_rate),
            lr=self.recipe.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=self.recipe.weight_decay,
        )
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        averaged = self.learned if self.recipe.ema_decay else {}
        self.average = {name: value.detach().clone() for name, value in averaged.items()}
        self.step = 0
        self.history: list[tuple[int, float]] = []

    def run(self) -> None:
        """Until `max_steps`."""
        recipe, main = self.recipe, self.accelerator.is_main_process
        meter = Meter(self.report, recipe.max_steps, self.step, main)
        first, losses = self.step, []
        while self.step < recipe.max_steps:
            losses.append(self._step())
            self.step += 1
            meter.move(self.step)
            if self.step % recipe.log_every == 0 or self.step == recipe.max_steps:
                loss = sum(losses) / len(losses)
                losses = []
                self.history.append((self.step, loss))
                meter.tell(self.step, loss, (self.step - first) * self.size, "pictures")
            if self.step % recipe.save_every == 0 or self.step == recipe.max_steps:
                if main:
                    self._save()
                self.accelerator.wait_for_everyone()
        meter.stop()

    def _step(self) -> float:
        recipe, accelerator = self.recipe, self.accelerator
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * _rate(recipe, self.step)
        rows = rows_of_step(self.stage.order, self.size, self.step, recipe.seed)
        passes = recipe.accumulation
        total = 0.0
        for part in range(passes):
            place = accelerator.process_index * passes + part
            mine = rows[place * recipe.batch_size : (place + 1) * recipe.batch_size]
            random = torch.Generator().manual_seed(_seed(recipe.seed, self.step, place))
            batch = [_moved(value, accelerator.device) for value in self.stage.batch(mine, random, self.step)]
            last = part == passes - 1
            with accelerator.autocast(), _no_sync(self.objective, accelerator, last):
                loss = self.objective(*batch)
                accelerator.backward(loss / passes)
            total += float(accelerator.reduce(loss.detach(), "mean")) / passes
        norm = accelerator.clip_grad_norm_(list(self.learned.values()), recipe.max_grad_norm)
        if not math.isfinite(total) or (recipe.precision != "float16" and not math.isfinite(float(norm))):
            raise MobileMMError(
                f"step {self.step + 1}: the loss or its gradient is not finite; take a smaller learning_rate"
                f" and go on from {last_checkpoint(recipe.output) or 'the beginning'}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.stage.objective.follow()
        self._follow()
        return total

    @torch.no_grad()
    def _follow(self) -> None:
        if self.recipe.ema_decay:
            # Less at first, so that the beginning is forgotten.
            decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.average.values()), list(self.learned.values()), 1 - decay)

    def averaged(self) -> Any:
        """The averaged weights are in the model while this context lasts, where a recipe has them."""
        return _swapped(self.learned, self.average)

    def load(self, checkpoint: Path) -> None:
        """All that the run had when it wrote the checkpoint."""
        try:
            _copy_into(self.learned, load_file(checkpoint / _LEARNED))
            _copy_into(self.stage.objective.trailing(), load_file(checkpoint / _TRAILING))
            _copy_into(self.average, load_file(checkpoint / _AVERAGE))
            states = torch.load(checkpoint / _OPTIMIZER, weights_only=True, map_location="cpu")
            self.optimizer.load_state_dict(states)
            state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise MobileMMError(
                f"{checkpoint}: cannot be read: {error}; delete it to go on before it"
            ) from error
        self.step, self.history = state["step"], [tuple(row) for row in state["loss"]]

    def _save(self) -> None:
        run = Path(self.recipe.output)
        name = f"checkpoint-{self.step}"
        folder = run / WRITING / name
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_contiguous(self.learned), folder / _LEARNED)
        save_file(_contiguous(self.stage.objective.trailing()), folder / _TRAILING)
        save_file(_contiguous(self.average), folder / _AVERAGE)
        torch.save(self.optimizer.state_dict(), folder / _OPTIMIZER)
        state = {"step": self.step, "loss": self.history}
        (folder / _STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
        (folder / "loss.svg").write_text(loss_curve(self.history), encoding="utf-8")
        if self.recipe.show_samples:
            with self.averaged(), torch.no_grad():
                self.stage.sheet(folder / "samples.png")
        put_in_place(run, name, self.recipe.keep_checkpoints)


def _rate(recipe: GeneratorRecipe, step: int) -> float:
    warm = min(1.0, (step + 1) / max(recipe.warmup_steps, 1))
    if recipe.schedule == "constant":
        return warm
    return warm * (0.5 + 0.5 * math.cos(math.pi * step / recipe.max_steps))


def _settings(stage: Stage, processes: int) -> dict[str, Any]:
    """What must not change in a run."""
    free = FREE_KEYS | ({"max_steps"} if stage.recipe.schedule == "constant" else set())
    settings = {key: value for key, value in stage.recipe.model_dump(mode="json").items() if key not in free}
    settings["data_and_weights"] = stage.identity
    settings["processes"] = processes
    return settings


def _write_result(run: Path, recipe: GeneratorRecipe, history: list[tuple[int, float]]) -> None:
    result = {"recipe": recipe.model_dump(mode="json"), "versions": installed(PACKAGES), "loss": history}
    part = run / "result.json.part"
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(part, run / "result.json")


def _seed(seed: int, step: int, place: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {place}".encode()).digest()[:8], "big") >> 1


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    moved = {name: _moved(inside, device) for name, inside in vars(value).items()}
    return type(value)(**moved)


def _no_sync(objective: nn.Module, accelerator: Any, last: bool) -> Any:
    from contextlib import nullcontext

    return nullcontext() if last else accelerator.no_sync(objective)


def _contiguous(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


@torch.no_grad()
def _copy_into(places: dict[str, Any], values: dict[str, Tensor]) -> None:
    if places.keys() != values.keys():
        odd = sorted(places.keys() ^ values.keys())
        raise ValueError(f"{len(odd)} tensors are missing or too many, {odd[0]} among them")
    for name, place in places.items():
        place.copy_(values[name])


class _swapped:
    """Exchanges tensors for the time of a block."""

    def __init__(self, places: dict[str, Any], values: dict[str, Tensor]) -> None:
        self.places, self.values = places, values

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.values.items():
            place = self.places[name]
            kept = place.detach().clone()
            place.copy_(value)
            value.copy_(kept)

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()
