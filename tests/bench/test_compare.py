"""What is noise and what is not."""

from __future__ import annotations

import numpy as np
import pytest

from mobilemm.bench.compare import change, compare, rank_test, signed_rank_test
from mobilemm.bench.result import Figure
from mobilemm.errors import MobileMMError
from tests.bench.test_result import some_result


def test_a_real_difference_is_told_by_its_direction() -> None:
    generator = np.random.default_rng(0)
    slow = (100 + generator.normal(0, 2, 9)).tolist()
    fast = (110 + generator.normal(0, 2, 9)).tolist()
    (up,) = compare(some_result(tg64=slow), some_result(tg64=fast))
    assert up.verdict == "better"
    assert 1 < up.low < up.ratio < up.high
    assert up.ratio == pytest.approx(np.median(fast) / np.median(slow))
    (down,) = compare(some_result(tg64=fast), some_result(tg64=slow))
    assert down.verdict == "worse"
    seconds = [Figure(name="ttft", what="", unit="s", runs=runs) for runs in (slow, fast)]
    assert change(*seconds).verdict == "worse"


def test_the_interval_holds_the_true_ratio() -> None:
    generator = np.random.default_rng(2)
    held = 0
    for _ in range(100):
        runs = [(median + generator.normal(0, 2, 9)).tolist() for median in (100, 110)]
        found = change(*(Figure(name="x", what="", unit="tok/s", runs=one) for one in runs))
        held += found.low <= 1.1 <= found.high
    assert held >= 88


def test_noise_is_rarely_called_a_difference() -> None:
    """As often as the level says, over many pairs of files from one distribution."""
    generator = np.random.default_rng(1)
    wrong = sum(
        change(
            *(Figure(name="x", what="", unit="s", runs=generator.lognormal(0, 0.1, 8).tolist()) for _ in "ab")
        ).better
        is not None
        for _ in range(400)
    )
    assert wrong / 400 <= 0.08


@pytest.mark.parametrize(("runs", "known"), [(1, False), (3, False), (4, True)])
def test_too_few_runs_say_nothing(runs: int, known: bool) -> None:
    """With 3 runs each, even complete separation happens by chance once in 10."""
    first, second = list(range(runs)), list(range(100, 100 + runs))
    assert (rank_test(first, second) is not None) == known


@pytest.mark.parametrize(("rounds", "known"), [(1, False), (5, False), (6, True)])
def test_too_few_rounds_say_nothing(rounds: int, known: bool) -> None:
    """With 5 pairs, even all of them in one direction happen by chance once in 16."""
    first = list(range(rounds))
    assert (signed_rank_test(first, [value + 1 + value / 100 for value in first]) is not None) == known
    assert signed_rank_test([1.0] * 8, [1.0] * 8) == 1.0


def test_pairs_show_what_a_restless_machine_hides() -> None:
    """Rounds that differ by half, and a change of 3 % in each of them."""
    generator = np.random.default_rng(0)
    rounds = generator.uniform(80, 120, 10)
    runs = [(rounds * factor + generator.normal(0, 0.3, 10)).tolist() for factor in (1, 1.03)]
    figures = [Figure(name="x", what="", unit="tok/s", runs=one) for one in runs]
    assert change(*figures).verdict == "noise"
    found = change(*figures, paired=True)
    assert found.verdict == "better"
    assert found.ratio == pytest.approx(1.03, abs=0.005)
    assert 1.02 < found.low < found.ratio < found.high < 1.04


def test_figures_that_only_one_has_are_left_out() -> None:
    changes = compare(some_result(tg64=[1.0], pp144=[2.0]), some_result(tg64=[1.0], pp512=[2.0]))
    assert [one.name for one in changes] == ["tg64"]
    assert changes[0].verdict == "too few runs"
    with pytest.raises(MobileMMError, match="no figure in common"):
        compare(some_result(tg64=[1.0]), some_result(tg128=[1.0]))
