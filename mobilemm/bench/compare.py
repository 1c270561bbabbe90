"""What changed between two benchmarks, and whether it is more than noise.

Figures of the same name are compared by their runs. Runs of one process share its conditions, and those of
two files were not made in turns: a difference that the test calls real is one between these files, whose
machine may have changed too. Only runs that were made in turns are pairs (`mobilemm.bench.difference`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobilemm.bench.result import Figure, Result, Unit
from mobilemm.errors import MobileMMError

RESAMPLES = 2000
LEVEL = 0.05


@dataclass(frozen=True)
class Change:
    """Of one figure from A to B. `ratio` is B's median over A's, `low` to `high` its 95 % interval.

    `p` is the chance of a difference in ranks as large as this one if both had the same distribution (Mann
    and Whitney; of pairs, Wilcoxon); None with too few runs to tell.
    """

    name: str
    what: str
    unit: Unit
    before: float
    after: float
    ratio: float
    low: float
    high: float
    p: float | None
    better: bool | None

    @property
    def verdict(self) -> str:
        if self.p is None:
            return "too few runs"
        if self.better is None:
            return "noise"
        return "better" if self.better else "worse"


def compare(before: Result, after: Result) -> list[Change]:
    """Figures that both have. Raises MobileMMError when there is none."""
    known = {figure.name: figure for figure in after.figures}
    changes = [change(figure, known[figure.name]) for figure in before.figures if figure.name in known]
    if not changes:
        raise MobileMMError(
            f"the results of {before.bundle.name} and {after.bundle.name} have no figure in common: bench"
            " both with the same numbers of tokens"
        )
    return changes


def change(a: Figure, b: Figure, paired: bool = False) -> Change:
    """One figure before and after; `paired` where their runs were made in turns."""
    if a.unit != b.unit:
        raise MobileMMError(f"figure {a.name!r} is in {a.unit} in one file and in {b.unit} in the other")
    x, y = np.array(a.runs), np.array(b.runs)
    ratio = b.median / a.median if a.median else math.inf
    if paired and x.all():
        ratio = float(np.median(y / x))
    low, high = _paired_interval(x, y) if paired else _interval(x, y)
    p = signed_rank_test(a.runs, b.runs) if paired else rank_test(a.runs, b.runs)
    better = None
    if p is not None and p < LEVEL and ratio != 1:
        better = (ratio > 1) == a.higher_is_better
    return Change(a.name, a.what, a.unit, a.median, b.median, ratio, low, high, p, better)


def rank_test(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Two-sided p of the Mann-Whitney U test; None where even a complete separation would not reach LEVEL."""
    if 2 / math.comb(len(x) + len(y), len(x)) >= LEVEL:
        return None
    return float(_scipy_stats().mannwhitneyu(x, y).pvalue)


def signed_rank_test(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Two-sided p of Wilcoxon's test for pairs; None where all of them together would not reach LEVEL."""
    if 2 / 2 ** len(x) >= LEVEL:
        return None
    if list(x) == list(y):
        return 1.0
    return float(_scipy_stats().wilcoxon(x, y).pvalue)


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise MobileMMError("comparing benchmarks needs scipy: pip install 'mobilemm[bench]'") from error
    return stats


def _interval(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of the ratio of medians, by drawing the runs again."""
    generator = np.random.default_rng(0)
    a = np.median(generator.choice(x, (RESAMPLES, len(x))), 1)
    b = np.median(generator.choice(y, (RESAMPLES, len(y))), 1)
    ratios = b / np.where(a == 0, np.nan, a)
    low, high = np.nanpercentile(ratios, [2.5, 97.5]) if np.isfinite(ratios).any() else (0.0, math.inf)
    return float(low), float(high)


def _paired_interval(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Of the median of the pairs' ratios, by drawing the pairs again."""
    ratios = y / np.where(x == 0, np.nan, x)
    if not np.isfinite(ratios).any():
        return 0.0, math.inf
    drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.nanpercentile(np.nanmedian(drawn, 1), [2.5, 97.5])
    return float(low), float(high)
