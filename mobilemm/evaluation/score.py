"""A task run over a model or bundle, and what must be known to compare its score with another."""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mobilemm.doctor import installed
from mobilemm.evaluation.scorers import Scorer
from mobilemm.evaluation.tasks import Item, read_task

MAX_NEW_TOKENS = 16
PACKAGES = ("mobilemm", "torch", "transformers", "tokenizers", "onnxruntime", "executorch", "coremltools")


@dataclass(frozen=True)
class Score:
    """One task's result.

    `accuracy` is the share of right answers; in perplexity, of tokens that were the likeliest. `chance` is
    what guessing gives, where that can be said. `figures` are the task's own: precision, recall, f1 and
    yes_ratio of yes-no, perplexity of perplexity, whose `samples` are tokens.
    """

    task: str
    samples: int
    accuracy: float
    standard_error: float
    chance: float | None
    figures: dict[str, float]
    model: str
    data: str
    prompt: str
    method: str
    limit: int | None
    seed: int
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a score file has it."""
        return asdict(self)


def evaluate(
    scorer: Scorer,
    task: str,
    data: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    model: str = "",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """Runs a task on the items of a folder, or on the set that ships; `limit` of them, drawn by `seed`.

    multiple-choice and yes-no take the answer with the least loss a token; vqa writes a greedy answer, which
    must be one of the right ones, but for case, articles and punctuation. Nothing is sampled.
    Raises MobileMMError for data that cannot be read.
    """
    items = read_task(task, data)
    if limit is not None and limit < len(items):
        items = random.Random(seed).sample(items, limit)
    right: list[float] = []
    figures: dict[str, float] = {}
    samples = len(items)
    if task == "perplexity":
        total = count = likeliest = 0.0
        for number, item in enumerate(items, 1):
            loss, tokens, best = scorer.text(item.text)
            total, count, likeliest = total + loss, count + tokens, likeliest + best
            report(number, len(items))
        accuracy, samples = likeliest / max(count, 1), int(count)
        figures = {"perplexity": math.exp(total / max(count, 1))}
    elif task == "vqa":
        for number, item in enumerate(items, 1):
            said = scorer.answer(_picture(item), item.question, MAX_NEW_TOKENS)
            right.append(vqa_accuracy(said, item.choices))
            report(number, len(items))
        accuracy = float(np.mean(right))
    else:
        taken = []
        for number, item in enumerate(items, 1):
            losses = scorer.losses(_picture(item), item.question, item.choices)
            taken.append(int(np.argmin(losses)))
            right.append(float(taken[-1] == item.answer))
            report(number, len(items))
        accuracy = float(np.mean(right))
        if task == "yes-no":
            figures = _yes_no(taken, items)
    chance = None
    if task in ("multiple-choice", "yes-no"):
        chance = float(np.mean([1 / len(item.choices) for item in items]))
    return Score(
        task=task,
        samples=samples,
        accuracy=accuracy,
        standard_error=math.sqrt(accuracy * (1 - accuracy) / max(samples, 1)),
        chance=chance,
        figures=figures,
        model=model or "mobilemm-default",
        data=str(data) if data is not None else "mobilemm/evaluation/held_out",
        prompt="text alone" if task == "perplexity" else "the picture and the item's question",
        method={
            "perplexity": "windows of 512 tokens",
            "vqa": f"greedy, {MAX_NEW_TOKENS} new tokens",
        }.get(task, "least negative log-likelihood a token"),
        limit=limit,
        seed=seed,
        versions=installed(PACKAGES),
    )


def vqa_accuracy(answer: str, right: Sequence[str]) -> float:
    """min(1, people who said so / 3) with ten answers, else 1 or 0. Antol et al. 2015, arXiv 1505.00468."""
    same = sum(_plain(answer) == _plain(text) for text in right)
    return min(1.0, same / 3) if len(right) >= 10 else float(same > 0)


def _plain(text: str) -> str:
    words = re.sub(r"[^\w\s]", "", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _yes_no(taken: Sequence[int], items: Sequence[Item]) -> dict[str, float]:
    """As POPE reports it, "yes" being positive. Li et al. 2023, arXiv 2305.10355."""
    said = np.array(taken) == 0
    true = np.array([item.answer == 0 for item in items])
    hits = float((said & true).sum())
    precision = hits / max(said.sum(), 1)
    recall = hits / max(true.sum(), 1)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-12),
        "yes_ratio": float(said.mean()),
    }


def _picture(item: Item) -> str | os.PathLike[str]:
    assert item.picture is not None
    return item.picture
