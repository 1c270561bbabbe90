"""How the next token is chosen: greedy, or drawn from what the filters leave."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """The settings. Temperature 0 is greedy, and then only the repetition penalty matters.

    Attributes:
        max_new_tokens: the longest answer.
        temperature: what logits are divided by; 0 for greedy.
        top_k: only the k likeliest tokens, and those as likely as the last of them; 0 for all.
        top_p: only the fewest likeliest tokens whose probabilities sum to more than this.
        repetition_penalty: what the logits of tokens that were already there are divided (negative ones:
            multiplied) by, the prompt's included.
        seed: makes the draw repeatable, anew with each answer; None for a different one each time.
        min_p: only tokens at least this many times as likely as the likeliest.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_p: float = 0.0

    def options(self) -> dict[str, Any]:
        """The same in the words of transformers' `generate`."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "repetition_penalty": self.repetition_penalty,
            "num_beams": 1,
        }
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            options["min_p"] = self.min_p or None
        else:
            # A checkpoint's own sampling settings do not apply to greedy decoding.
            options |= {"temperature": None, "top_k": None, "top_p": None, "min_p": None}
        return options


class Sampler:
    """Chooses one token after another by the same settings.

    The order is that of transformers' `generate`: repetition penalty, temperature, top-k, top-p, min-p; each
    filter sees the probabilities that the one before it left, made to sum to 1 again.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = SplitMix64(secrets.randbits(64) if sampling.seed is None else sampling.seed)

    def __call__(self, logits: NDArray[Any], seen: Iterable[int]) -> int:
        """The token's id, for logits (vocabulary,) and the ids of the prompt and of the answer so far."""
        scores = penalize(logits, seen, self.sampling.repetition_penalty)
        if self.sampling.temperature <= 0:
            return int(scores.argmax())
        candidates, probabilities = distribution(scores, self.sampling)
        total = np.cumsum(probabilities)
        index = int(np.searchsorted(total, self._random.uniform() * total[-1], side="right"))
        return int(candidates[min(index, len(candidates) - 1)])


def penalize(logits: NDArray[Any], seen: Iterable[int], penalty: float) -> NDArray[np.float32]:
    """Logits in float32 after the repetition penalty (Keskar et al. 2019, arXiv 1909.05858, section 4.1).

    Ids outside the vocabulary (a picture's placeholders) are left out.
    """
    scores = logits.astype(np.float32)
    if penalty != 1.0:
        ids = np.unique(np.fromiter(seen, np.int64))
        ids = ids[ids < len(scores)]
        some = scores[ids]
        scores[ids] = np.where(some < 0, some * np.float32(penalty), some / np.float32(penalty))
    return scores


def distribution(
    scores: NDArray[np.float32], sampling: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The ids that the filters leave, in rising order, and their probabilities.

    Source: transformers' `TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper`,
    `MinPLogitsWarper`, in this order.
    """
    ids = np.arange(len(scores))
    scores = scores / np.float32(sampling.temperature)
    if 0 < sampling.top_k < len(scores):
        least = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        ids = ids[scores >= least]
    if sampling.top_p < 1.0:
        probabilities = _softmax(scores[ids])
        # Tokens below the mean share of what is cut off all go: only the others need to be sorted.
        some = probabilities >= (1 - sampling.top_p) / len(ids)
        some[probabilities.argmax()] = True
        order = np.argsort(probabilities[some], kind="stable")
        total = probabilities[~some].sum() + np.cumsum(probabilities[some][order])
        stays = total > 1 - sampling.top_p
        stays[-1] = True  # the likeliest always does
        ids = np.sort(ids[some][order[stays]])
    probabilities = _softmax(scores[ids])
    if sampling.min_p > 0:
        likely = probabilities >= min(sampling.min_p, 1.0) * probabilities.max()
        ids = ids[likely]
        probabilities = _softmax(scores[ids])
    return ids, probabilities


def _softmax(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    powers = np.exp(scores.astype(np.float64) - float(scores.max()))
    return powers / powers.sum()


class SplitMix64:
    """Random numbers by ten lines in any language, so that a seed means the same on a phone.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """

    def __init__(self, seed: int) -> None:
        self.state = seed % 2**64

    def next(self) -> int:
        """64 random bits."""
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        mixed = self.state
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        return mixed ^ (mixed >> 31)

    def uniform(self) -> float:
        """A number from 0 to 1, without 1: the upper 53 bits."""
        return (self.next() >> 11) * 2.0**-53
