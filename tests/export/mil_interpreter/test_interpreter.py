"""The interpreter's own contract: functions, states, shapes, precision, messages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mobilemm.errors import MobileMMError
from mobilemm.export import mil_interpreter
from tests.export.mil_interpreter.programs import ct, mb, save_program


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One state: what it was, its update at [1, step], and what it is then."""
    folder = tmp_path_factory.mktemp("packages")

    def build(value, step, memory):  # type: ignore[no-untyped-def]
        before = mb.read_state(input=memory)
        stop = mb.add(x=step, y=np.int32(1))
        begin = mb.concat(values=[np.array([1], np.int32), step], axis=0)
        end = mb.concat(values=[np.array([2], np.int32), stop], axis=0)
        changed = mb.slice_update(x=before, update=value, begin=begin, end=end)
        mb.coreml_update_state(state=memory, value=changed)
        after = mb.read_state(input=memory)
        return mb.mul(x=after, y=np.float16(2), name="twice")

    inputs = {"value": np.zeros((1, 1), np.float16), "step": np.zeros(1, np.int32)}
    return save_program(folder / "counter.mlpackage", build, inputs, {"memory": (2, 4)})


def test_a_state_is_written_and_kept_between_calls(counter: Path) -> None:
    model = mil_interpreter.load(counter)
    state, other = model.make_state(), model.make_state()
    for step, value in enumerate((1.5, -2.0, 3.25)):
        outputs = model({"value": np.full((1, 1), value), "step": np.array([step])}, state=state)
    np.testing.assert_array_equal(outputs["twice"], [[0, 0, 0, 0], [3, -4, 6.5, 0]])
    np.testing.assert_array_equal(state.read_state("memory"), [[0, 0, 0, 0], [1.5, -2, 3.25, 0]])
    assert not other.read_state("memory").any()
    copied = state.copy()
    state.write_state("memory", np.ones((2, 4)))
    assert model({"value": np.ones((1, 1)), "step": np.array([0])}, state=state)["twice"].sum() == 16
    assert copied.read_state("memory")[1, 0] == 1.5


def test_descriptions_of_inputs_outputs_and_states(counter: Path) -> None:
    model = mil_interpreter.load(counter)
    assert model.functions == ("main",)
    assert [(f.name, f.dtype, f.shape) for f in model.inputs()] == [
        ("value", "float16", (1, 1)),
        ("step", "int32", (1,)),
    ]
    assert [(f.name, f.dtype, f.shape) for f in model.outputs("main")] == [("twice", "float16", (2, 4))]
    assert [(f.name, f.dtype, f.shape) for f in model.states()] == [("memory", "float16", (2, 4))]


def test_an_earlier_value_of_a_state_is_not_changed_by_an_update(tmp_path: Path) -> None:
    """What was read before must not see what is written behind it, nor the views of it."""

    def build(value, memory):  # type: ignore[no-untyped-def]
        before = mb.read_state(input=memory)
        row = mb.slice_by_index(x=before, begin=[1, 0], end=[2, 3], name="row_before")
        ls = mb.make_list(init_length=1, elem_shape=(1, 3), dtype="fp16", dynamic_length=True)
        ls = mb.list_write(ls=ls, index=0, value=mb.cast(x=mb.cast(x=row, dtype="fp32"), dtype="fp16"))
        changed = mb.slice_update(x=before, update=value, begin=[1, 0], end=[2, 3])
        mb.coreml_update_state(state=memory, value=changed)
        wide = mb.list_read(ls=ls, index=0)
        after = mb.read_state(input=memory)
        return mb.sub(x=after, y=wide, name="change"), mb.identity(x=row, name="kept")

    path = save_program(
        tmp_path / "m.mlpackage", build, {"value": np.zeros((1, 3), np.float16)}, {"memory": (2, 3)}
    )
    model = mil_interpreter.load(path)
    state = model.make_state()
    model({"value": np.array([[1, 2, 3]])}, state=state)
    outputs = model({"value": np.array([[5, 5, 5]])}, state=state)
    np.testing.assert_array_equal(outputs["kept"], [[1, 2, 3]])
    np.testing.assert_array_equal(outputs["change"], [[-1, -2, -3], [4, 3, 2]])


def test_declared_precision_rounds_each_output_to_fp16(tmp_path: Path) -> None:
    def build(x):  # type: ignore[no-untyped-def]
        return mb.sub(x=mb.add(x=x, y=np.float16(2048)), y=np.float16(2048), name="y")

    path = save_program(tmp_path / "m.mlpackage", build, {"x": np.zeros(2, np.float16)})
    x = np.array([0.75, 3.25])
    declared, exact = (
        mil_interpreter.load(path, precision)({"x": x})["y"] for precision in ("declared", "float32")
    )
    assert declared.dtype == np.float16
    np.testing.assert_array_equal(declared, [0, 4])  # fp16 between 2048 and 4096 has steps of 2
    assert exact.dtype == np.float32
    np.testing.assert_array_equal(exact, x)


def test_functions_share_weights_and_states(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    descriptor = ct.utils.MultiFunctionDescriptor()
    for name, rows in (("prefill", 3), ("decode", 1)):

        def build(x, memory):  # type: ignore[no-untyped-def]
            old = mb.read_state(input=memory)
            mb.coreml_update_state(state=memory, value=mb.add(x=old, y=np.float16(1)))
            return mb.matmul(x=x, y=mb.const(val=weight), name="y")

        shape = np.zeros((rows, 64), np.float16)
        path = save_program(tmp_path / f"{name}.mlpackage", build, {"x": shape}, {"calls": (1,)})
        descriptor.add_function(str(path), src_function_name="main", target_function_name=name)
    descriptor.default_function_name = "decode"
    ct.utils.save_multifunction(descriptor, str(tmp_path / "both.mlpackage"))
    model = mil_interpreter.load(tmp_path / "both.mlpackage")
    assert model.functions == ("decode", "prefill")
    assert model.default_function == "decode"
    state = model.make_state()
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float16)
    prefill = model({"x": x}, function="prefill", state=state)["y"]
    decode = model({"x": x[:1]}, state=state)["y"]
    np.testing.assert_allclose(prefill, x.astype(np.float64) @ weight, atol=0.02)
    np.testing.assert_allclose(decode, prefill[:1], atol=0.02)
    assert state.read_state("calls") == 2
    assert len({key for key in model._store._kept if isinstance(key, tuple)}) == 1


@pytest.mark.parametrize("room", [0, 3_000, 10_000, 10**9])
def test_constants_that_do_not_fit_are_decompressed_at_each_use(tmp_path: Path, room: int) -> None:
    """In fp32, in fp16, and not at all: the same numbers, and no more kept than there is room for."""
    rng = np.random.default_rng(0)
    codes = [rng.integers(-8, 8, (32, 32)).astype(np.int8) for _ in range(4)]
    scale = np.full((32, 1), 0.0625, np.float16)

    def build(x):  # type: ignore[no-untyped-def]
        for code in codes:
            x = mb.linear(x=x, weight=mb.constexpr_blockwise_shift_scale(data=code, scale=scale))
        return mb.identity(x=x, name="y")

    x = rng.standard_normal((2, 32)).astype(np.float16)
    path = save_program(tmp_path / "m.mlpackage", build, {"x": x})
    wanted = x.astype(np.float32)
    for code in codes:
        wanted = (wanted @ (code * scale.astype(np.float32)).T).astype(np.float16).astype(np.float32)
    model = mil_interpreter.load(path, keep_bytes=room)
    for _ in range(2):
        np.testing.assert_allclose(model({"x": x})["y"], wanted, rtol=2e-3, atol=2e-3)
    kept = [tensor.nbytes for tensor in model._store._kept.values()]
    assert sum(kept) <= 4 * room
    assert (sorted(kept, reverse=True)[:4] == [4096] * 4) == (room == 10**9)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"value": np.zeros((1, 1))}, "needs the input 'step'"),
        ({"value": np.zeros((1, 1)), "step": np.zeros(2, int)}, "allowed is (1)"),
        ({"value": np.zeros((1, 1)), "step": np.array([0.5])}, "is float64; wanted is int32"),
        ({"value": np.zeros((1, 1)), "step": np.array([2**40])}, "does not fit int32"),
        ({"value": np.zeros((1, 1)), "step": np.array([0]), "more": np.zeros(1)}, "has no input more"),
        ({"value": np.zeros((1, 1)), "step": np.array([9])}, "operation slice_update ('slice_update_0')"),
    ],
)
def test_wrong_inputs_are_one_line(counter: Path, inputs: dict[str, np.ndarray], said: str) -> None:
    model = mil_interpreter.load(counter)
    with pytest.raises(MobileMMError) as error:
        model(inputs, state=model.make_state())
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_state_is_asked_for(counter: Path) -> None:
    model = mil_interpreter.load(counter)
    with pytest.raises(MobileMMError, match="needs a state"):
        model({"value": np.zeros((1, 1)), "step": np.array([0])})


def test_an_unknown_operation_is_named_with_its_place(tmp_path: Path) -> None:
    def build(x):  # type: ignore[no-untyped-def]
        return mb.random_normal(shape=np.array([2, 3], np.int32), name="noise")

    path = save_program(tmp_path / "m.mlpackage", build, {"x": np.zeros(2, np.float32)})
    with pytest.raises(
        MobileMMError, match=r"function 'main': operation random_normal \('noise'\).*does not know"
    ):
        mil_interpreter.load(path)
