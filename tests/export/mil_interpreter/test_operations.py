"""Each operation against NumPy or PyTorch, with drawn shapes and attributes, in fp32 and fp16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from mobilemm.export import mil_interpreter
from mobilemm.export.mil_interpreter.ops import handlers
from tests.export.mil_interpreter import arithmetic_cases, compressed_cases, picture_cases, tensor_cases  # noqa: F401
from tests.export.mil_interpreter.cases import CASES, Case
from tests.export.mil_interpreter.programs import save_program

VARIANTS = 6


def parameters() -> Iterator[object]:
    for case in CASES:
        for kind in case.types:
            name = getattr(case.draw, "__name__", "").replace("<lambda>", "").strip("_")
            yield pytest.param(case, kind, id=f"{case.operation}-{kind}{'-' + name if name else ''}")


@pytest.mark.parametrize(("case", "kind"), parameters())
def test_operation(case: Case, kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(crc32(f"{case.operation} {kind}".encode()))
    variants = [case.draw(rng, np.dtype(kind).type) for _ in range(VARIANTS)]
    inputs = {f"x{i}_{j}": array for i, drawn in enumerate(variants) for j, array in enumerate(drawn.inputs)}

    def build(*variables):  # type: ignore[no-untyped-def]
        given, outputs = iter(variables), []
        for drawn in variants:
            found = drawn.build(*(next(given) for _ in drawn.inputs))
            outputs += list(found) if isinstance(found, list | tuple) else [found]
        return outputs

    path = save_program(tmp_path / "m.mlpackage", build, inputs, target=case.target)
    model = mil_interpreter.load(path)
    outputs = model(inputs)
    found = [outputs[feature.name] for feature in model.outputs()]
    wanted = [array for drawn in variants for array in drawn.wanted]
    assert len(found) == len(wanted)
    for have, want in zip(found, wanted, strict=True):
        assert have.shape == want.shape
        if have.dtype.kind != "f":
            np.testing.assert_array_equal(have, want)
            continue
        largest = max(1.0, float(np.abs(want).max(initial=0)))
        step = 1e-3 if kind == "float16" or have.dtype == np.float16 else 2e-6
        np.testing.assert_allclose(have, want, rtol=0, atol=case.tolerance * step * largest)


def test_every_operation_has_a_case() -> None:
    """Those of pictures that PyTorch has as modules are in test_torch_modules.py."""
    modules = {"conv", "conv_transpose", "resample"}
    modules |= {"upsample_nearest_neighbor", "upsample_bilinear"}
    assert handlers().keys() - modules == {case.operation for case in CASES}
