"""What a person sees of a run: a progress bar or lines, the loss curve, answers to a few samples."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from mobilemm.data.sources import Sample

Report = Callable[[str], None]


class Meter:
    """A run's steps, loss, memory and time left: a bar in a terminal, else lines."""

    def __init__(self, report: Report, total: int, done: int, shown: bool = True) -> None:
        self.report, self.total, self.first = report, total, done
        self.shown = shown
        self._started = time.monotonic()
        self._bar = self._new_bar() if shown and sys.stderr.isatty() else None

    def _new_bar(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        bar = Progress(*columns, console=Console(stderr=True))
        self._task = bar.add_task("", total=self.total, completed=self.first)
        bar.start()
        return bar

    def move(self, done: int) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def tell(self, done: int, loss: float, seen: float, unit: str) -> None:
        """Shows the loss; `seen` units (tokens, pictures) since the start make the rate."""
        if not self.shown:
            return
        seconds = max(time.monotonic() - self._started, 1e-9)
        text = f"loss {loss:.3f}  {seen / seconds:,.0f} {unit}/s  {_peak_memory() / 1e9:.1f} GB"
        if self._bar is not None:
            self._bar.update(self._task, description=text)
            return
        left = (self.total - done) * seconds / max(done - self.first, 1)
        self.report(f"step {done}/{self.total}  {text}  {_duration(left)} left")

    def stop(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()


class Progress(TrainerCallback):
    """A meter beside transformers' Trainer."""

    def __init__(self, report: Report, tokens_seen: Callable[[], int]) -> None:
        self.report, self.tokens_seen = report, tokens_seen

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the clock."""
        self._meter = Meter(self.report, state.max_steps, state.global_step, args.process_index == 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Moves the bar."""
        self._meter.move(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Shows what was logged."""
        if logs and "loss" in logs:
            self._meter.tell(state.global_step, logs["loss"], self.tokens_seen(), "tok")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes the bar away."""
        self._meter.stop()


class Keepsakes(TrainerCallback):
    """With each checkpoint the loss curve (`loss.svg`) and greedy answers to some samples (`samples.md`)."""

    def __init__(self, run: Path, model: Any, processor: Any, samples: Sequence[Sample]) -> None:
        self.run, self.model, self.processor, self.samples = run, model, processor, samples

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Writes both into the run's folder and beside the checkpoint just written."""
        if args.process_index:
            return
        curve = [(row["step"], row["loss"]) for row in state.log_history if "loss" in row]
        pages = {"loss.svg": loss_curve(curve)}
        if self.samples:
            pages["samples.md"] = answers(self.model, self.processor, self.samples)
        for name, text in pages.items():
            for folder in (self.run, self.run / f"checkpoint-{state.global_step}"):
                (folder / name).write_text(text, encoding="utf-8")


def answers(model: Any, processor: Any, samples: Sequence[Sample], max_new_tokens: int = 48) -> str:
    """A Markdown page: each sample's first question, what the data answers, and what the model answers."""
    was_training = model.training
    model.eval()
    lines = []
    for sample in samples:
        end = next(index for index, turn in enumerate(sample.messages) if turn["role"] == "assistant")
        prompt = sample.messages[:end]
        inputs = processor.apply_chat_template(list(prompt), add_generation_prompt=True).to(model.device)
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        said = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        pictures = ", ".join(str(image) for image in sample.images if isinstance(image, Path))
        lines += [
            f"**{_text(prompt[-1])}** {pictures}",
            f"- data: {_text(sample.messages[end])}",
            f"- model: {said.strip()}",
            "",
        ]
    model.train(was_training)
    return "\n".join(lines)


def loss_curve(points: Sequence[tuple[int, float]], width: int = 640, height: int = 320) -> str:
    """Loss by step as an SVG picture, without any library."""
    if not points:
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"/>\n'
    last = max(step for step, _ in points)
    top = max(loss for _, loss in points) or 1.0
    left, bottom = 48, height - 32
    line = " ".join(
        f"{left + (width - left - 16) * step / max(last, 1):.1f},{bottom - (bottom - 16) * loss / top:.1f}"
        for step, loss in points
    )
    label = escape(f"loss {points[-1][1]:.3f} at step {points[-1][0]}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif"'
        f' font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f'<path d="M{left} 16V{bottom}H{width - 16}" fill="none" stroke="#888"/>'
        f'<polyline points="{line}" fill="none" stroke="#2060c0" stroke-width="1.5"/>'
        f'<text x="4" y="20">{top:.2f}</text><text x="4" y="{bottom}">0</text>'
        f'<text x="{left}" y="{height - 12}">step 0</text>'
        f'<text x="{width - 16}" y="{height - 12}" text-anchor="end">{last}</text>'
        f'<text x="{width - 16}" y="28" text-anchor="end">{label}</text></svg>\n'
    )


def _text(message: Any) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _peak_memory() -> float:
    """Bytes: of the GPU when there is one, else the process's resident memory at its most."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
