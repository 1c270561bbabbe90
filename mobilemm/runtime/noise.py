"""Noise from a seed: the rule by which every language draws the same picture. No torch.

The bits are those of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a
counter-based generator: block i depends on the seed and on i alone. Two 32-bit words make two normal numbers
by Box and Muller, in float64, then rounded to float32. `docs/noise.md` has the rule in full, with vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mobilemm.errors import MobileMMError

RULE: Final = "philox4x32-10-box-muller"
"""The rule's name in a manifest."""

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def normal(seed: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Independent numbers of mean 0 and variance 1, the same for the same seed; a longer shape goes on.

    Raises MobileMMError for a seed outside of 0 … 2⁶⁴ − 1.
    """
    if not 0 <= seed < 2**64:
        raise MobileMMError(f"seed {seed}: give a whole number from 0 to {2**64 - 1}")
    count = int(np.prod(shape, dtype=np.int64))
    index = np.arange(-(-count // 4), dtype=np.uint64)
    none = np.zeros_like(index)
    words = philox([index & _LOW, index >> _HALF, none, none], (seed & 0xFFFFFFFF, seed >> 32))
    # (0, 1] for the radius, so that its logarithm is finite; [0, 1) for the angle.
    radius = np.sqrt(-2.0 * np.log((words[:, 0::2] + 1.0) / 2.0**32))
    angle = 2.0 * np.pi * (words[:, 1::2] / 2.0**32)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    return pairs.reshape(-1)[:count].astype(np.float32).reshape(tuple(shape))


def philox(counter: Sequence[NDArray[np.uint64]], key: tuple[int, int]) -> NDArray[np.float64]:
    """Philox4x32-10: four words of 32 bits for each counter, exact in float64.

    Shapes: the counter's four words, lowest first, (blocks,) each → (blocks, 4).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> _HALF) ^ c1 ^ np.uint64(k0),
            second & _LOW,
            (first >> _HALF) ^ c3 ^ np.uint64(k1),
            first & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], -1).astype(np.float64)
