"""Core ML packages, and their calls on the reference interpreter of MIL.

Interfaces and operations come from the packages' specifications.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from mobilemm.runtime.backends.coreml import CoreMLBackend, Package
from mobilemm.runtime.bundle import Bundle
from tests.ios.calls import Calls

# Of FeatureTypes.proto and MIL.proto.
ARRAY_TYPES = {65568: "float32", 65552: "float16", 131104: "int32"}


def interfaces(bundle: Bundle) -> dict[str, list[dict[str, Any]]]:
    """Of each part's package the functions: inputs, outputs, states, and the types of operations."""
    import coremltools

    found = {}
    for name in bundle.manifest.parts:
        spec = coremltools.utils.load_spec(str(bundle.part_path(name)))
        description = spec.description
        functions = list(description.functions)
        found[name] = [
            {
                "name": one.name if functions else "main",
                "inputs": [feature(each) for each in one.input],
                "outputs": [feature(each) for each in one.output],
                "states": [feature(each) for each in one.state],
                "operations": operations(spec, one.name if functions else "main"),
            }
            for one in functions or [description]
        ]
    return found


def feature(of: Any) -> dict[str, Any]:
    kind = of.type.WhichOneof("Type")
    if kind == "imageType":
        shape = [1, 3, of.type.imageType.height, of.type.imageType.width]
        return {"name": of.name, "shape": shape, "dtype": "uint8", "image": True, "ranges": None}
    array = of.type.stateType.arrayType if kind == "stateType" else of.type.multiArrayType
    ranges = None
    if array.WhichOneof("ShapeFlexibility") == "shapeRange":
        ranges = [[size.lowerBound, size.upperBound] for size in array.shapeRange.sizeRanges]
    return {
        "name": of.name,
        "shape": list(array.shape),
        "dtype": ARRAY_TYPES[array.dataType],
        "image": False,
        "ranges": ranges,
    }


def operations(spec: Any, function: str) -> list[str]:
    blocks = spec.mlProgram.functions[function].block_specializations
    return [operation.type for block in blocks.values() for operation in block.operations]


class Recorder:
    """A package whose calls are kept, inputs in the types that its specification has."""

    def __init__(self, package: Package, part: str, types: Mapping[str, str], calls: Calls) -> None:
        self._package, self._part, self._types, self._calls = package, part, types, calls
        self.shape, self.make_state = package.shape, package.make_state

    @property
    def functions(self) -> tuple[str, ...]:
        return self._package.functions

    def run(
        self, inputs: Mapping[str, NDArray[Any]], function: str | None, state: Any
    ) -> dict[str, NDArray[Any]]:
        typed = {name: value.astype(self._types[name]) for name, value in inputs.items()}
        outputs = self._package.run(typed, function, state)
        given = {name: self._calls.keep(value) for name, value in typed.items()}
        found = {name: self._calls.keep(value) for name, value in outputs.items()}
        self._calls.made.append({"part": self._part, "function": function, "inputs": given, "outputs": found})
        return outputs


class RecordingCoreMLBackend(CoreMLBackend):
    def __init__(self, bundle: Bundle, calls: Calls) -> None:
        super().__init__(bundle, 1)
        self.calls = calls

    def package(self, part: str) -> Package:
        if part not in self._packages:
            types = {tensor.name: tensor.dtype for tensor in self.bundle.manifest.parts[part].inputs}
            self._packages[part] = Recorder(super().package(part), part, types, self.calls)
        return self._packages[part]
