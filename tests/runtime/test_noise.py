"""The seeded noise: published vectors of Philox, an independent slow implementation, and its statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mobilemm.errors import MobileMMError
from mobilemm.runtime.noise import normal, philox

# Counter, key and result as the paper's authors publish them with their library.
KNOWN = [
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(counter: list[int], key: tuple[int, int], words: list[int]) -> None:
    found = philox([np.array([word], np.uint64) for word in counter], key)
    assert found[0].astype(np.uint64).tolist() == words


def by_hand(seed: int, count: int) -> list[float]:
    """The rule once more, number by number, in Python's integers and floats."""
    numbers: list[float] = []
    for block in range(-(-count // 4)):
        words = [block & 0xFFFFFFFF, block >> 32, 0, 0]
        key = [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
            words = [
                (second >> 32) ^ words[1] ^ key[0],
                second & 0xFFFFFFFF,
                (first >> 32) ^ words[3] ^ key[1],
                first & 0xFFFFFFFF,
            ]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        for radius, angle in (words[:2], words[2:]):
            length = math.sqrt(-2.0 * math.log((radius + 1.0) / 2.0**32))
            numbers += [length * f(2.0 * math.pi * (angle / 2.0**32)) for f in (math.cos, math.sin)]
    return numbers[:count]


@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**64 - 1])
def test_numbers_are_those_of_the_rule(seed: int) -> None:
    # Logarithm and cosine may differ in their last bit of 53; of 24 that is hardly ever one.
    np.testing.assert_array_max_ulp(normal(seed, (3, 7)).ravel(), np.float32(by_hand(seed, 21)), maxulp=1)


def test_a_longer_shape_goes_on_and_another_seed_differs() -> None:
    assert np.array_equal(normal(7, (4, 16)).ravel()[:40], normal(7, (40,)))
    assert not np.array_equal(normal(7, (40,)), normal(8, (40,)))


def test_numbers_are_normal() -> None:
    from scipy import stats

    numbers = normal(3, (200_000,)).astype(np.float64)
    assert abs(numbers.mean()) < 0.01
    assert abs(numbers.std() - 1) < 0.01
    assert stats.kstest(numbers, "norm").pvalue > 0.01
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_is_refused(seed: int) -> None:
    with pytest.raises(MobileMMError, match="from 0 to 18446744073709551615"):
        normal(seed, (1,))
