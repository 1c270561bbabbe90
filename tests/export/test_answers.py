"""The default model's bundle in float32 says what PyTorch says, token for token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.answers import Bundle, PyTorch, held_out, pictures

pytestmark = pytest.mark.slow

COUNT, ITEMS = 12, 6


def test_answers_and_likelihoods(default_in_full: Path) -> None:
    bundle, pytorch = Bundle(default_in_full), PyTorch()
    shown = pictures()
    some = {name: shown[name] for name in [*shown][:: len(shown) // COUNT][:COUNT]}
    assert {name: bundle.answer(picture) for name, picture in some.items()} == {
        name: pytorch.answer(picture) for name, picture in some.items()
    }
    items = held_out()[:ITEMS]
    np.testing.assert_allclose(
        [bundle.losses(item) for item in items], [pytorch.losses(item) for item in items], rtol=0, atol=1e-3
    )
