"""Damaged and hostile packages: each refused with one line, at once, without filling the memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.export.mil_interpreter.programs import mb, save_program


@pytest.mark.slow
def test_damaged_packages_are_refused(tmp_path: Path) -> None:
    """In another process, because one that crashes would take the tests with it."""
    rng = np.random.default_rng(0)

    def build(x, step, memory):  # type: ignore[no-untyped-def]
        weight = rng.integers(-8, 8, (64, 64)).astype(np.int8)
        scale = (rng.random((64, 2)) * 0.1 + 0.01).astype(np.float16)
        w = mb.constexpr_blockwise_shift_scale(data=weight, scale=scale)
        bias = mb.const(val=rng.standard_normal(64).astype(np.float16))
        y = mb.linear(x=mb.silu(x=x), weight=w, bias=bias)
        y = mb.layer_norm(x=y, axes=[-1], gamma=bias, epsilon=np.float16(1e-3))
        old = mb.read_state(input=memory)
        end = mb.add(x=step, y=np.int32(1))
        begin = mb.concat(values=[step, np.array([0], np.int32)], axis=0)
        end = mb.concat(values=[end, np.array([64], np.int32)], axis=0)
        mb.coreml_update_state(state=memory, value=mb.slice_update(x=old, update=y, begin=begin, end=end))
        seen = mb.read_state(input=memory)
        scores = mb.softmax(x=mb.matmul(x=y, y=seen, transpose_y=True), axis=-1)
        return mb.matmul(x=scores, y=seen, name="y")

    good = save_program(
        tmp_path / "good.mlpackage",
        build,
        {"x": np.zeros((1, 64), np.float16), "step": np.zeros(1, np.int32)},
        {"memory": (8, 64)},
    )
    found = subprocess.run(
        [sys.executable, "-m", "tests.export.mil_interpreter.damage", str(good), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    result = json.loads(found.stdout.splitlines()[-1])
    assert result["wrong"] == []
    assert result["refused"] >= 500
    # A flipped bit of a name or of a number leaves a program; nothing else does.
    assert result["sound"] < 60
    assert result["slowest"] < 20
    # No single value may take more than 512 MB, and all that are alive at once 1 GB.
    assert result["grown"] < 1.5 * 2**30
