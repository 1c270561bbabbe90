"""A package's MIL program as plain data, its structure checked. No torch.

Checked here, once, so that nobody who reads on has to: each name is defined before it is used, shapes are
sizes, a constant has as many elements as its shape says, stored inside of the weight file.

Source: coremltools' MIL.proto.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mobilemm.errors import MobileMMError
from mobilemm.export.mil_interpreter.package import BITS, NUMPY, Blob, Package, unpack
from mobilemm.export.mil_interpreter.protobuf import coreml_protobuf
from mobilemm.runtime.manifest_check import shown

LARGEST_DIMENSION = 2**31
# Operations, arguments and outputs together: ten times what large models have.
MOST_ITEMS = 500_000
MOST_DIMENSIONS = 32


@dataclass(frozen=True)
class TensorType:
    """A tensor's declared type, as MIL names it ("FLOAT16"); None is a dimension known when it runs."""

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class StateType:
    """A state: a tensor that a function reads and writes."""

    tensor: TensorType


@dataclass(frozen=True)
class ListType:
    """A list of tensors."""

    element: TensorType


Type: TypeAlias = TensorType | StateType | ListType


@dataclass(frozen=True, eq=False)
class Constant:
    """A constant tensor, in the weight file or in the specification itself; or a tuple of them."""

    package: Package = field(repr=False)
    type: TensorType
    stored: Blob | NDArray[Any] | tuple[Constant, ...]

    @property
    def identity(self) -> object:
        """Equal for constants that are the same bytes of the same file."""
        return (self.stored, self.type) if isinstance(self.stored, Blob) else id(self)

    def array(self) -> NDArray[Any]:
        """The elements, those of types under a byte as one byte each; strings as objects."""
        if isinstance(self.stored, tuple):
            raise TypeError("a tuple is no tensor")
        if isinstance(self.stored, Blob):
            return self.package.elements(self.stored, self.type.dtype, self.shape)
        return self.stored

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for size in self.type.shape if size is not None)


Operand: TypeAlias = "str | Constant"


@dataclass(frozen=True)
class Operation:
    """One operation. Attributes, a `const`'s value among them, are arguments like any other."""

    type: str
    arguments: dict[str, list[Operand]]
    outputs: tuple[tuple[str, Type], ...]
    blocks: tuple[Block, ...]
    location: str

    def operand(self, name: str) -> Operand:
        """The single operand of an argument. Raises MobileMMError when there is none."""
        operands = self.arguments.get(name, [])
        if len(operands) != 1:
            raise MobileMMError(f"{self.location}: its argument {name!r} is missing")
        return operands[0]


@dataclass(frozen=True)
class Block:
    """Operations in order. A nested block sees the names of those around it."""

    inputs: tuple[tuple[str, Type], ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Function:
    """One function of a program: `inputs` are those of its block and its states."""

    name: str
    block: Block

    @property
    def states(self) -> dict[str, TensorType]:
        return {name: kind.tensor for name, kind in self.block.inputs if isinstance(kind, StateType)}

    @property
    def inputs(self) -> dict[str, TensorType]:
        return {name: kind for name, kind in self.block.inputs if isinstance(kind, TensorType)}


def read_functions(package: Package) -> dict[str, Function]:
    """All functions of a package by name. Raises MobileMMError that names function, operation and output."""
    program = package.specification.mlProgram
    if not program.functions:
        raise package.error("its program has no function")
    reader, functions = _Reader(package), {}
    for name in sorted(program.functions):
        reader.name = name
        functions[name] = reader.function(program.functions[name])
    return functions


def walk(block: Block) -> Iterator[Operation]:
    """All operations of a block and of those nested in it."""
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from walk(inner)


class _Reader:
    """Reads the functions of a package, one after the other; `name` is that of the one being read."""

    def __init__(self, package: Package) -> None:
        self.package, self.name, self.items = package, "", 0
        self.dtypes = {number: name for name, number in coreml_protobuf()[1].DataType.items()}

    def error(self, wrong: str) -> MobileMMError:
        return self.package.error(f"function {shown(self.name)}: {wrong}")

    def count(self, items: int) -> None:
        """Counts what is about to be read, so that a few bytes do not become all memory."""
        self.items += items
        if self.items > MOST_ITEMS:
            raise self.error(f"its program has more than {MOST_ITEMS:,} operations and arguments")

    def function(self, function: Any) -> Function:
        block = function.block_specializations.get(function.opset)
        if block is None:
            raise self.error(f"has no block for its opset {shown(function.opset)}")
        if block.inputs:
            raise self.error("its block has inputs of its own")
        self.count(len(function.inputs))
        inputs = tuple(
            (value.name, self.type(value.type, f"input {shown(value.name)}")) for value in function.inputs
        )
        for name, kind in inputs:
            if isinstance(kind, ListType):
                raise self.error(f"input {shown(name)} is a list")
        return Function(self.name, self.block(block, inputs, set()))

    def block(self, block: Any, inputs: tuple[tuple[str, Type], ...], known: set[str]) -> Block:
        """A block; `known` holds the names around it, and does so again when it has been read."""
        defined: list[str] = []

        def define(name: str, what: str) -> None:
            if not name or name in known:
                raise self.error(f"{what}: the name {shown(name)} is {'taken' if name else 'missing'}")
            known.add(name)
            defined.append(name)

        for name, _ in inputs:
            define(name, "inputs")
        operations = []
        self.count(len(block.operations) + len(block.outputs))
        for stored in block.operations:
            operation = self.operation(stored, known)
            for name, _ in operation.outputs:
                define(name, operation.type)
            operations.append(operation)
        for name in block.outputs:
            if name not in known:
                raise self.error(f"output {shown(name)} is not defined")
        known.difference_update(defined)
        return Block(inputs, tuple(operations), tuple(block.outputs))

    def operation(self, stored: Any, known: set[str]) -> Operation:
        first = stored.outputs[0].name if stored.outputs else ""
        where = f"operation {shown(stored.type)[1:-1]}" + (f" ({shown(first)})" if first else "")
        arguments: dict[str, list[Operand]] = {}
        for name in stored.inputs:
            operands: list[Operand] = []
            self.count(len(stored.inputs[name].arguments) + 1)
            for binding in stored.inputs[name].arguments:
                if binding.WhichOneof("binding") == "value":
                    operands.append(self.constant(binding.value, where))
                elif binding.name in known:
                    operands.append(binding.name)
                else:
                    raise self.error(f"{where}: {shown(binding.name)} is not defined before it is used")
            arguments[name] = operands
        for name in stored.attributes:
            if name != "name":
                arguments[name] = [self.constant(stored.attributes[name], where)]
        self.count(len(stored.attributes) + len(stored.blocks) + len(stored.outputs))
        blocks = []
        for inner in stored.blocks:
            self.count(len(inner.inputs))
            inputs = tuple((value.name, self.type(value.type, where)) for value in inner.inputs)
            blocks.append(self.block(inner, inputs, known))
        outputs = tuple((value.name, self.type(value.type, where)) for value in stored.outputs)
        location = f"{self.package.path}: function {shown(self.name)}: {where}"
        return Operation(stored.type, arguments, outputs, tuple(blocks), location)

    def type(self, stored: Any, where: str) -> Type:
        kind = stored.WhichOneof("type")
        if kind == "tensorType":
            return self.tensor_type(stored.tensorType, where)
        if kind == "stateType" and stored.stateType.wrappedType.WhichOneof("type") == "tensorType":
            return StateType(self.tensor_type(stored.stateType.wrappedType.tensorType, where))
        if kind == "listType" and stored.listType.type.WhichOneof("type") == "tensorType":
            return ListType(self.tensor_type(stored.listType.type.tensorType, where))
        raise self.error(f"{where}: a value of the unknown kind {shown(kind)}")

    def tensor_type(self, stored: Any, where: str) -> TensorType:
        dtype = self.dtypes.get(stored.dataType, "")
        if dtype not in BITS and dtype != "STRING":
            raise self.error(f"{where}: the element type {dtype or stored.dataType} is not known")
        if len(stored.dimensions) > MOST_DIMENSIONS:
            raise self.error(f"{where}: a tensor of {len(stored.dimensions)} dimensions")
        shape: list[int | None] = []
        for dimension in stored.dimensions:
            match dimension.WhichOneof("dimension"):
                case "constant" if dimension.constant.size < LARGEST_DIMENSION:
                    shape.append(dimension.constant.size)
                case "unknown" if not dimension.unknown.variadic:
                    shape.append(None)
                case _:
                    raise self.error(f"{where}: a dimension is out of range")
        return TensorType(dtype, tuple(shape))

    def constant(self, stored: Any, where: str) -> Constant:
        if stored.WhichOneof("value") == "immediateValue" and stored.type.WhichOneof("type") != "tensorType":
            immediate = stored.immediateValue
            kind = immediate.WhichOneof("value")
            if kind not in ("list", "tuple"):
                raise self.error(f"{where}: a constant of the unknown kind {shown(kind)}")
            self.count(len(getattr(immediate, kind).values))
            items = tuple(self.constant(item, where) for item in getattr(immediate, kind).values)
            return Constant(self.package, TensorType("STRING", (len(items),)), items)
        declared = self.type(stored.type, where)
        if not isinstance(declared, TensorType) or None in declared.shape:
            raise self.error(f"{where}: a constant without a constant shape")
        count = math.prod(size for size in declared.shape if size is not None)
        if stored.WhichOneof("value") == "blobFileValue":
            if declared.dtype == "STRING":
                raise self.error(f"{where}: strings in a weight file")
            place = stored.blobFileValue
            blob = self.package.blob(place.fileName, place.offset, declared.dtype, count)
            return Constant(self.package, declared, blob)
        if stored.immediateValue.WhichOneof("value") != "tensor":
            raise self.error(f"{where}: a constant without a value")
        return Constant(self.package, declared, self.immediate(stored, declared, count, where))

    def immediate(self, stored: Any, declared: TensorType, count: int, where: str) -> NDArray[Any]:
        """Elements that stand in the specification itself."""
        tensor, dtype = stored.immediateValue.tensor, declared.dtype
        shape = tuple(size for size in declared.shape if size is not None)
        kind = tensor.WhichOneof("value")
        values: Any = getattr(tensor, kind).values if kind else ()
        found = len(values)
        wanted = -(-count * BITS[dtype] // 8) if kind == "bytes" and dtype in BITS else count
        if found != wanted:
            raise self.error(f"{where}: a constant of {found:,} elements; its shape needs {shown(wanted)}")
        if (kind == "strings") != (dtype == "STRING"):
            raise self.error(f"{where}: a constant of {dtype} is stored as {shown(kind)}")
        if kind == "strings":
            return np.array(list(values), object).reshape(shape)
        if kind == "bytes":
            return unpack(np.frombuffer(values, np.uint8), dtype, shape)
        array = np.array(values, {"floats": "f4", "doubles": "f8", "bools": "?"}.get(kind, "i8"))
        with np.errstate(over="ignore"):
            converted = array.astype(NUMPY[dtype])
        if kind in ("ints", "longInts") and not np.array_equal(converted.astype("i8"), array):
            raise self.error(f"{where}: a constant is out of the range of {dtype}")
        return converted.reshape(shape)
