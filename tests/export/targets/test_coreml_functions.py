"""Packages made one by their bytes, beside what coremltools' own `save_multifunction` makes of the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mobilemm.export import mil_interpreter
from mobilemm.export.targets.coreml_functions import (
    ALIGNMENT,
    HEADER,
    RECORD,
    WEIGHTS_FILE,
    merge,
)
from mobilemm.export.targets.coreml_package import read_spec

ct = pytest.importorskip("coremltools")

Array = NDArray[Any]
RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((5, 32)).astype(np.float16)
OTHER_WEIGHT = RANDOM.standard_normal((5, 32)).astype(np.float16)
# 165 codes: the last half of a byte is padding. One more, and it is not, though the bytes are the same.
ODD_CODES = RANDOM.integers(-8, 8, (5, 33))
EVEN_CODES = np.append(ODD_CODES.flatten(), 0).reshape(2, 83)
TABLE = RANDOM.standard_normal((32, 5)).astype(np.float16)


def int4(codes: Array, mb: Any) -> Any:
    from coremltools.converters.mil.mil import types

    return mb.constexpr_blockwise_shift_scale(
        data=codes.astype(types.nptype_from_builtin(types.int4)),
        scale=np.full((len(codes), 1), 0.5, np.float16),
    )


def repeated(x: Any, columns: int, mb: Any) -> Any:
    """The input's columns, again and again."""
    whole = mb.concat(values=[x] * 3, axis=-1)
    return mb.slice_by_index(x=whole, begin=[0, 0], end=[x.shape[0], columns])


def common(x: Any, mb: Any) -> Any:
    """What both functions have: (length, 32) → (length, 5)."""
    return mb.add(
        x=mb.linear(x=x, weight=WEIGHT), y=mb.linear(x=repeated(x, 33, mb), weight=int4(ODD_CODES, mb))
    )


def prefill_only(x: Any, mb: Any) -> Any:
    """The table in float16, codes that fill their bytes, and the common weight once more."""
    codes = mb.linear(x=repeated(x, 83, mb), weight=int4(EVEN_CODES, mb))
    more = mb.add(x=mb.linear(x=x, weight=WEIGHT.copy()), y=mb.reduce_sum(x=codes, axes=[-1], keep_dims=True))
    return mb.add(x=more, y=mb.matmul(x=x, y=TABLE))


def decode_only(x: Any, mb: Any) -> Any:
    """The table's bytes as whole numbers, and a weight of its own."""
    rows = mb.gather(x=TABLE.view(np.int16), indices=mb.reduce_argmax(x=x, axis=-1), axis=0)
    return mb.add(x=mb.linear(x=x, weight=OTHER_WEIGHT), y=mb.cast(x=rows, dtype="fp16"))


def write(package: Path, length: int, further: Callable[[Any, Any], Any]) -> Path:
    """A program of one function, `main`, as coremltools writes it."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    @mb.program(input_specs=[mb.TensorSpec((length, 32), types.fp16)], opset_version=ct.target.iOS18)
    def program(x: Any) -> Any:
        return mb.add(x=common(x, mb), y=further(x, mb), name="y")

    # Whatever can be folded stays as it is: what is stored is what is written above.
    kept = ct.PassPipeline(["common::const_deduplication"], "nothing else")
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=kept,
        skip_model_load=True,
    )
    model.save(str(package))
    return package


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("single")
    return {
        "prefill": write(folder / "prefill.mlpackage", 4, prefill_only),
        "decode": write(folder / "decode.mlpackage", 1, decode_only),
    }


def merged(functions: dict[str, Path], folder: Path, default: str = "decode") -> Path:
    """By us, from copies: the first package is moved."""
    copies = {name: Path(shutil.copytree(path, folder / path.name)) for name, path in functions.items()}
    merge(copies, default, folder / "merged.mlpackage")
    return folder / "merged.mlpackage"


def by_coremltools(functions: dict[str, Path], folder: Path, default: str = "decode") -> Path:
    wanted = ct.utils.MultiFunctionDescriptor()
    for name, path in functions.items():
        wanted.add_function(str(path), src_function_name="main", target_function_name=name)
    wanted.default_function_name = default
    ct.utils.save_multifunction(wanted, str(folder / "judge.mlpackage"))
    return folder / "judge.mlpackage"


def constants(package: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Function → (type, shape, bytes) of its constants as coremltools reads them, sorted."""
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = read_spec(package)
    program = load(spec, spec.specificationVersion, str((package / WEIGHTS_FILE).parent))
    found = {}
    for name, function in program.functions.items():
        values = [np.asarray(op.outputs[0].val) for op in function.find_ops(op_type="const")]
        found[name] = sorted(
            (value.dtype.str, value.shape, value.tobytes()) for value in values if value.dtype.kind != "U"
        )
    return found


def records(package: Path) -> list[tuple[int, bytes, int]]:
    """(type, data, bits of padding) of each record of the weights, checked to lie where they may."""
    data = (package / WEIGHTS_FILE).read_bytes()
    count, version = HEADER.unpack_from(data, 0)
    assert version == 2
    found, place = [], ALIGNMENT
    for _ in range(count):
        mark, kind, size, begin, padding = RECORD.unpack_from(data, place)
        assert mark == 0xDEADBEEF
        assert (place % ALIGNMENT, begin) == (0, place + ALIGNMENT)
        found.append((kind, data[begin : begin + size], padding))
        end = begin + size
        place = -(-end // ALIGNMENT) * ALIGNMENT
    assert end == len(data)  # nothing behind the last record
    return found


def test_functions_and_constants_are_coremltools_own(functions: dict[str, Path], tmp_path: Path) -> None:
    ours, judge = merged(functions, tmp_path), by_coremltools(functions, tmp_path)
    assert constants(ours) == constants(judge)
    assert set(constants(ours)) == {"prefill", "decode"}
    description, other = read_spec(ours).description, read_spec(judge).description
    assert description.defaultFunctionName == other.defaultFunctionName == "decode"
    assert [one.name for one in description.functions] == [one.name for one in other.functions]
    for one, two in zip(description.functions, other.functions, strict=True):
        assert (list(one.input), list(one.output)) == (list(two.input), list(two.output))
    assert not description.input
    assert not description.output


def test_weights_are_stored_once(functions: dict[str, Path], tmp_path: Path) -> None:
    """As many records as coremltools' own, with the same contents; those of one package come first."""
    ours, judge = merged(functions, tmp_path), by_coremltools(functions, tmp_path)
    found = records(ours)
    assert len(set(found)) == len(found)
    assert sorted(found) == sorted(set(records(judge)))
    assert found[: len(records(functions["prefill"]))] == records(functions["prefill"])
    assert sum(data == WEIGHT.tobytes() for _, data, _ in found) == 1
    assert sum(data == OTHER_WEIGHT.tobytes() for _, data, _ in found) == 1


def test_the_same_bytes_of_another_kind_are_another_weight(
    functions: dict[str, Path], tmp_path: Path
) -> None:
    """The table in float16 and in int16; codes whose last half byte counts, and codes whose does not."""
    found = records(merged(functions, tmp_path))
    kinds = [kind for kind, data, _ in found if data == TABLE.tobytes()]
    assert len(kinds) == len(set(kinds)) == 2
    packed = np.append(ODD_CODES.flatten() & 15, 0).astype(np.uint8)
    packed = packed[0::2] | packed[1::2] << 4
    assert sorted(bits for _, data, bits in found if data == packed.tobytes()) == [0, 4]


def test_both_compute_what_each_did_alone(functions: dict[str, Path], tmp_path: Path) -> None:
    model = mil_interpreter.load(merged(functions, tmp_path))
    for name, path in functions.items():
        alone = mil_interpreter.load(path)
        ((feature,), (output,)) = alone.inputs(), alone.outputs()
        x = RANDOM.standard_normal(feature.shape).astype(np.float16)
        given = {feature.name: x}
        np.testing.assert_array_equal(
            model(given, function=name)[output.name], alone(given)[output.name], err_msg=name
        )


def test_one_function_is_a_package_too(functions: dict[str, Path], tmp_path: Path) -> None:
    only = {"decode": functions["decode"]}
    ours, judge = merged(only, tmp_path), by_coremltools(only, tmp_path)
    assert constants(ours) == constants(judge)
    assert records(ours) == records(functions["decode"])
    assert [one.name for one in read_spec(ours).description.functions] == ["decode"]
    assert set(read_spec(ours).mlProgram.functions) == {"decode"}


def test_three_functions_share_as_well(functions: dict[str, Path], tmp_path: Path) -> None:
    """The third brings nothing new: no byte is added."""
    three = {**functions, "again": write(tmp_path / "again.mlpackage", 8, prefill_only)}
    two = merged(functions, tmp_path / "two")
    assert records(merged(three, tmp_path / "three")) == records(two)
