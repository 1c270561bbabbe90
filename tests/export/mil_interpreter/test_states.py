"""Programs that read, view, update and write states in any order, against NumPy without anything in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilemm.export import mil_interpreter
from mobilemm.export.mil_interpreter.in_place import states_updated_in_place
from mobilemm.export.mil_interpreter.ops import handlers
from tests.export.mil_interpreter.programs import mb, save_program

STATES = ("first", "second")
SHAPE = (3, 4)


def write(rng: np.random.Generator, x: Any, memories: list[Any], states: dict[str, np.ndarray]) -> list[Any]:
    """A random program; of some values that it makes, the variable and what NumPy says. Changes `states`."""
    whole = [(x, np.ones(SHAPE, np.float16))]  # values of the states' shape
    made = []
    for name, memory in zip(STATES, memories, strict=True):
        whole.append((mb.read_state(input=memory), states[name].copy()))
    for step in range(14):
        state = int(rng.integers(2))
        name = STATES[state]
        variable, value = whole[int(rng.integers(max(0, len(whole) - 3), len(whole)))]
        row = int(rng.integers(3))
        match rng.choice(["read", "update", "update", "write", "write", "view", "turn", "calculate"]):
            case "read":
                whole.append((mb.read_state(input=memories[state]), states[name].copy()))
            case "update":
                new = value.copy()
                new[row, 1:3] = step + 1
                update = np.full((1, 2), step + 1, np.float16)
                found = mb.slice_update(x=variable, update=update, begin=[row, 1], end=[row + 1, 3])
                whole.append((found, new))
            case "write":
                mb.coreml_update_state(state=memories[state], value=variable)
                states[name] = value.copy()
            case "view":
                found = mb.slice_by_index(x=variable, begin=[row, 0], end=[row + 1, 4])
                made.append((found, value[row : row + 1]))
            case "turn":
                turned = mb.transpose(x=mb.transpose(x=variable, perm=[1, 0]), perm=[1, 0])
                whole.append((turned, value))
            case "calculate":
                whole.append((mb.add(x=variable, y=np.float16(0.5)), value + np.float16(0.5)))
    # Few of them, so that others are used no more behind an update.
    return [pair for pair in made + whole[1:] if rng.random() < 0.2] or whole[-1:]


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    wanted: list[np.ndarray] = []
    states = {name: np.zeros(SHAPE, np.float16) for name in STATES}

    def build(x, first, second):  # type: ignore[no-untyped-def]
        made = write(rng, x, [first, second], states)
        wanted.extend(value for _, value in made)
        return [mb.mul(x=variable, y=np.float16(2)) for variable, _ in made]

    path = save_program(
        tmp_path / "m.mlpackage", build, {"x": np.ones(SHAPE, np.float16)}, dict.fromkeys(STATES, SHAPE)
    )
    model = mil_interpreter.load(path)
    state = model.make_state()
    outputs = model({"x": np.ones(SHAPE)}, state=state)
    for feature, value in zip(model.outputs(), wanted, strict=True):
        np.testing.assert_array_equal(outputs[feature.name], 2 * value)
    for name in STATES:
        np.testing.assert_array_equal(state.read_state(name), states[name])


def test_some_of_these_are_in_place(tmp_path: Path) -> None:
    """Else the test above would tell nothing."""
    found = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)

        def build(x, first, second, rng=rng):  # type: ignore[no-untyped-def]
            states = {name: np.zeros(SHAPE, np.float16) for name in STATES}
            made = write(rng, x, [first, second], states)
            return [mb.mul(x=variable, y=np.float16(2)) for variable, _ in made]

        inputs = {"x": np.ones(SHAPE, np.float16)}
        path = save_program(tmp_path / f"{seed}.mlpackage", build, inputs, dict.fromkeys(STATES, SHAPE))
        model = mil_interpreter.load(path)
        block = model._functions["main"].block
        found += len(states_updated_in_place(block, handlers()).updates)
    assert found >= 3
