"""Branches and loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mobilemm.errors import MobileMMError
from mobilemm.export import mil_interpreter
from mobilemm.export.mil_interpreter import compiler
from tests.export.mil_interpreter.programs import mb, save_program


def test_cond_runs_one_branch(tmp_path: Path) -> None:
    def build(x, limit):  # type: ignore[no-untyped-def]
        total = mb.reduce_sum(x=x, axes=[0], keep_dims=False)
        doubled = mb.mul(x=x, y=np.float32(2))  # seen by both branches from outside
        return mb.cond(
            pred=mb.greater(x=total, y=mb.squeeze(x=limit)),
            _true_fn=lambda: mb.add(x=doubled, y=np.float32(1)),
            _false_fn=lambda: mb.mul(x=doubled, y=np.float32(-1)),
            name="y",
        )

    x = np.array([1, 2, 3], np.float32)
    path = save_program(tmp_path / "m.mlpackage", build, {"x": x, "limit": np.zeros(1, np.float32)})
    model = mil_interpreter.load(path)
    np.testing.assert_array_equal(model({"x": x, "limit": np.array([5.0])})["y"], 2 * x + 1)
    np.testing.assert_array_equal(model({"x": x, "limit": np.array([6.0])})["y"], -2 * x)


def loop(tmp_path: Path) -> Path:
    """Doubles x until `count` reaches the limit; inside, a branch adds 1 to x at odd counts."""

    def build(x, limit):  # type: ignore[no-untyped-def]
        last = mb.squeeze(x=limit)

        def body(count, value):  # type: ignore[no-untyped-def]
            odd = mb.equal(x=mb.mod(x=count, y=np.int32(2)), y=np.int32(1))
            one = mb.cond(
                pred=odd,
                _true_fn=lambda: mb.add(x=value, y=np.float32(1)),
                _false_fn=lambda: mb.identity(x=value),
            )
            return mb.add(x=count, y=np.int32(1)), mb.mul(x=one, y=np.float32(2))

        return mb.while_loop(
            _cond=lambda count, value: mb.less(x=count, y=last),
            _body=body,
            loop_vars=(np.int32(0), x),
        )

    inputs = {"x": np.zeros(2, np.float32), "limit": np.zeros(1, np.int32)}
    return save_program(tmp_path / "m.mlpackage", build, inputs)


def test_while_loop_with_a_branch_inside(tmp_path: Path) -> None:
    model = mil_interpreter.load(loop(tmp_path))
    value = np.array([0.5, -3])
    outputs = model({"x": value, "limit": np.array([5])})
    for count in range(5):
        value = (value + count % 2) * 2
    names = [feature.name for feature in model.outputs()]
    assert outputs[names[0]] == 5
    np.testing.assert_array_equal(outputs[names[1]], value)
    np.testing.assert_array_equal(model({"x": value, "limit": np.array([0])})[names[1]], value)


def test_a_loop_without_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "MOST_LOOPED_OPERATIONS", 10_000)
    model = mil_interpreter.load(loop(tmp_path))
    with pytest.raises(MobileMMError, match=r"while_loop.*loops have run 10,000 operations"):
        model({"x": np.zeros(2), "limit": np.array([2**30])})
