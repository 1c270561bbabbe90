"""A function's inputs, outputs and states as the package describes them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mobilemm.export.mil_interpreter.package import Package
from mobilemm.export.mil_interpreter.program import Function, ListType, StateType, TensorType
from mobilemm.runtime.manifest_check import shown

Shape = tuple[int, ...]

DTYPES = {
    **{"FLOAT16": "float16", "FLOAT32": "float32", "FLOAT64": "float64", "BOOL": "bool", "STRING": "string"},
    **{f"{sign}INT{bits}": f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class Feature:
    """One input, output or state of a function.

    Attributes:
        name: its name.
        dtype: the elements' type in the program, as NumPy names it.
        shape: the shape, that of the default where others are allowed; None is a dimension that only running
            the function tells.
        ranges: where a range of shapes is allowed, the least and the largest size of each dimension, the
            latter None without a limit.
        shapes: where some shapes are allowed, these.
        image: of pictures the order of the channels, "RGB", "BGR" or "GRAYSCALE"; the tensor is (1, channels,
            height, width) with values from 0 to 255.
        optional: whether it can be left out, `default` being taken instead.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    ranges: tuple[tuple[int, int | None], ...] | None = None
    shapes: tuple[Shape, ...] | None = None
    image: Literal["RGB", "BGR", "GRAYSCALE"] | None = None
    optional: bool = False
    default: float = 0.0
    description: str = ""

    def allows(self, shape: Sequence[int]) -> bool:
        """Whether the package allows this shape."""
        if self.shapes is not None:
            return tuple(shape) in self.shapes
        if self.ranges is not None:
            return len(shape) == len(self.ranges) and all(
                low <= size and (high is None or size <= high)
                for size, (low, high) in zip(shape, self.ranges, strict=True)
            )
        return len(shape) == len(self.shape) and all(
            declared in (None, size) for declared, size in zip(self.shape, shape, strict=True)
        )

    @property
    def allowed(self) -> str:
        """The allowed shapes in words."""
        if self.shapes is not None:
            return " or ".join(str(shape) for shape in self.shapes[:8])
        if self.ranges is not None:
            sizes = [str(low) if low == high else f"{low} to {high or 'any'}" for low, high in self.ranges]
            return f"({', '.join(sizes)})"
        return "(" + ", ".join("any" if size is None else str(size) for size in self.shape) + ")"


@dataclass(frozen=True)
class Signature:
    """What one function takes and gives."""

    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    states: tuple[Feature, ...]


def read_signature(package: Package, function: Function, results: dict[str, TensorType]) -> Signature:
    """The signature of a function whose program's outputs have the types `results`.

    Raises MobileMMError where description and program disagree.
    """
    described = package.specification.description
    for candidate in described.functions:
        if candidate.name == function.name:
            described = candidate
    sides: list[tuple[Feature, ...]] = []
    for side, stored, declared in (
        ("input", described.input, function.inputs),
        ("output", described.output, results),
        ("state", described.state, function.states),
    ):
        names = [feature.name for feature in stored]
        if sorted(names) != sorted(declared):
            raise package.error(
                f"function {function.name!r}: its {side}s are {sorted(declared)} in the program and"
                f" {sorted(names)} in the description"
            )
        sides.append(tuple(_feature(package, feature, declared[feature.name]) for feature in stored))
    return Signature(*sides)


def result_types(package: Package, function: Function) -> dict[str, TensorType]:
    """The types of a function's outputs by name. Raises MobileMMError for one that is no tensor."""
    types = dict(function.block.inputs)
    for operation in function.block.operations:
        types.update(operation.outputs)
    results: dict[str, TensorType] = {}
    for name in function.block.outputs:
        kind = types[name]
        if isinstance(kind, ListType | StateType) or kind.dtype == "STRING":
            raise package.error(f"function {shown(function.name)}: its output {shown(name)} is no tensor")
        results[name] = kind
    return results


def _feature(package: Package, stored: Any, declared: TensorType) -> Feature:
    shape: tuple[int | None, ...] = declared.shape
    ranges = shapes = None
    image: Any = None
    default = 0.0
    kind = stored.type.WhichOneof("Type")
    if kind == "multiArrayType":
        array = stored.type.multiArrayType
        flexible = array.WhichOneof("ShapeFlexibility")
        if array.shape and flexible:
            shape = tuple(int(size) for size in array.shape)
        if flexible == "shapeRange":
            ranges = tuple(_range(size) for size in array.shapeRange.sizeRanges)
        elif flexible == "enumeratedShapes":
            shapes = tuple(tuple(int(size) for size in one.shape) for one in array.enumeratedShapes.shapes)
        if value := array.WhichOneof("defaultOptionalValue"):
            default = float(getattr(array, value))
    elif kind == "imageType":
        picture = stored.type.imageType
        spaces = picture.DESCRIPTOR.enum_types_by_name["ColorSpace"].values_by_number
        space = spaces.get(picture.colorSpace)
        image = "" if space is None else space.name.split("_")[0]
        channels = 1 if image == "GRAYSCALE" else 3
        flexible = picture.WhichOneof("SizeFlexibility")
        if flexible == "imageSizeRange":
            sizes = (_range(picture.imageSizeRange.heightRange), _range(picture.imageSizeRange.widthRange))
            ranges = ((1, 1), (channels, channels), *sizes)
        elif flexible == "enumeratedSizes":
            shapes = tuple(
                (1, channels, int(size.height), int(size.width)) for size in picture.enumeratedSizes.sizes
            )
        if flexible:
            shape = (1, channels, int(picture.height), int(picture.width))
    elif kind not in ("stateType", None):
        raise package.error(f"feature {stored.name!r} is a {kind}; arrays and pictures are known")
    if len(shape) != len(declared.shape):
        raise package.error(
            f"feature {stored.name!r} has {len(shape)} dimensions, {len(declared.shape)} in the program"
        )
    if image not in ("RGB", "BGR", "GRAYSCALE", None):
        raise package.error(f"feature {stored.name!r} is a picture in an unknown colour space")
    return Feature(
        stored.name,
        DTYPES.get(declared.dtype, declared.dtype.lower()),
        shape,
        ranges,
        shapes,
        image,
        stored.type.isOptional,
        default,
        stored.shortDescription,
    )


def _range(stored: Any) -> tuple[int, int | None]:
    high = int(stored.upperBound)
    return int(stored.lowerBound), None if high < 0 else high
