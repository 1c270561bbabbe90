"""The default model's bundle in float32 says what PyTorch says, token for token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.answers import Bundle, PyTorch, pictures
from mobilemm.evaluation.tasks import read_task

pytestmark = pytest.mark.slow

COUNT, ITEMS = 12, 6


def test_answers_and_likelihoods(default_in_full: Path) -> None:
    bundle, pytorch = Bundle(default_in_full), PyTorch()
    shown = pictures()
    some = {name: shown[name] for name in [*shown][:: len(shown) // COUNT][:COUNT]}
    assert {name: bundle.answer_ids(picture) for name, picture in some.items()} == {
        name: pytorch.answer_ids(picture) for name, picture in some.items()
    }
    items = read_task("multiple-choice")[:ITEMS]
    for item in items:
        question = (item.picture, item.question, item.choices)
        np.testing.assert_allclose(bundle.losses(*question), pytorch.losses(*question), rtol=0, atol=1e-3)
    text = read_task("perplexity")[0].text[:600]
    np.testing.assert_allclose(bundle.text(text), pytorch.text(text), rtol=1e-4)
