"""Checks a Core ML part as a folder: what Core ML or the interpreter would load is looked at before it does.

Whoever makes a hostile bundle computes its hashes as well. So the specification is parsed within limits, no
weight may lie outside of the package's own files or be of another size than its shape needs, floating-point
weights are finite, and inputs and outputs are those of the manifest. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mobilemm.errors import MobileMMError
from mobilemm.runtime.manifest import Manifest, Part, Tensor
from mobilemm.runtime.manifest_check import AGAIN, shown

if TYPE_CHECKING:
    from mobilemm.export.mil_interpreter.features import Feature
    from mobilemm.export.mil_interpreter.program import Constant, Function

EXTENSION = ".mlpackage"
STATES = ("k_cache", "v_cache")
CHUNK = 2**22


def check_coreml_part(folder: Path, manifest: Manifest, name: str, *, values: bool = True) -> None:
    """Checks one part of a bundle, whose files are plain and have the sizes that the manifest says.

    `values`: also that all floating-point weights are finite, which reads them.

    Raises MobileMMError naming the package, or that the `coreml` extra is to be installed.
    """
    from mobilemm.export.mil_interpreter.features import read_signature, result_types
    from mobilemm.export.mil_interpreter.package import Package
    from mobilemm.export.mil_interpreter.program import read_functions

    part = manifest.parts[name]
    path = folder / part.file
    inside = f"{part.file}/"
    if not part.file.endswith(EXTENSION) or not all(file.startswith(inside) for file in part.files):
        _refuse(path, f"must be an {EXTENSION} folder that holds all files of the part")
    package = Package(path)
    functions = read_functions(package)
    found: dict[str, list[Feature]] = {"inputs": [], "outputs": []}
    for function in functions.values():
        signature = read_signature(package, function, result_types(package, function))
        found["inputs"] += signature.inputs
        found["outputs"] += signature.outputs
        if name == "decoder" and sorted(function.states) != sorted(STATES):
            _refuse(
                path, f"function {shown(function.name)} has the states {shown(str(sorted(function.states)))}"
            )
    if name == "decoder" and not _takes_conversations(functions):
        _refuse(path, f"has the functions {shown(str(sorted(functions)))}, not decode and prefill")
    for side, features in found.items():
        _check_side(path, part, side, features)
    if values:
        for constant in _constants(functions.values()):
            _check_finite(path, constant)


def _takes_conversations(functions: Iterable[str]) -> bool:
    """Whether these are `decode` and `prefill`, or instead of the latter some `prefill_LENGTH`."""
    prefill = set(functions) - {"decode"}
    several = all(re.fullmatch(r"prefill_[1-9][0-9]{0,5}", name) for name in prefill)
    return "decode" in functions and (prefill == {"prefill"} or (bool(prefill) and several))


def _refuse(path: Path, wrong: str) -> NoReturn:
    raise MobileMMError(f"{path}: {wrong}; {AGAIN}")


def _check_side(path: Path, part: Part, side: str, features: list[Feature]) -> None:
    """Inputs or outputs of all functions together, as the manifest has them."""
    listed: dict[str, Tensor] = {tensor.name: tensor for tensor in getattr(part, side)}
    if differing := sorted(listed.keys() ^ {feature.name for feature in features}):
        where = "the package" if differing[0] in listed else "the manifest"
        _refuse(path, f"{side[:-1]} {shown(differing[0])} is not in {where}")
    for feature in features:
        tensor = listed[feature.name]
        dtype = "uint8" if feature.image else feature.dtype
        if tensor.dtype != dtype:
            _refuse(path, f"{side[:-1]} {shown(tensor.name)} is {dtype}; the manifest says {tensor.dtype}")
        if len(tensor.shape) != len(feature.shape) or any(
            isinstance(want, int) and have is not None and want != have
            for want, have in zip(tensor.shape, feature.shape, strict=True)
        ):
            have, said = shown(str(feature.shape))[1:-1], shown(str(tensor.shape))[1:-1]
            _refuse(path, f"{side[:-1]} {shown(tensor.name)} has the shape {have}; the manifest says {said}")


def _constants(functions: Iterable[Function]) -> Iterator[Constant]:
    """Floating-point constants in weight files, each once."""
    from mobilemm.export.mil_interpreter.package import Blob
    from mobilemm.export.mil_interpreter.program import Constant, walk

    seen = set()
    for function in functions:
        for operation in walk(function.block):
            for operand in (one for operands in operation.arguments.values() for one in operands):
                if (
                    isinstance(operand, Constant)
                    and isinstance(operand.stored, Blob)
                    and operand.type.dtype in ("FLOAT16", "FLOAT32")
                    and operand.stored not in seen
                ):
                    seen.add(operand.stored)
                    yield operand


def _check_finite(path: Path, constant: Constant) -> None:
    """Refuses NaN and infinity. An additive mask, of zeros and −∞ alone, is what it looks like."""
    import numpy as np

    elements = constant.array().reshape(-1)
    infinite, only_mask = False, True
    for start in range(0, len(elements), CHUNK):
        piece = elements[start : start + CHUNK]
        infinite = infinite or not bool(np.isfinite(piece).all())
        only_mask = only_mask and bool(((piece == 0) | (piece == -np.inf)).all())
        if infinite and not only_mask:
            _refuse(path, f"a weight of the shape {constant.shape} holds NaN or infinity")
