"""Values while a program runs: constants that are kept within bounds, and rounding to declared types."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mobilemm.errors import MobileMMError, one_line
from mobilemm.export.memory import trim
from mobilemm.export.mil_interpreter.ops import Handler
from mobilemm.export.mil_interpreter.program import Constant, ListType, Operation, TensorType, Type

Precision = Literal["declared", "float32"]

LARGE = 2**20

# How values of a MIL type are held.
TORCH = {
    **{"FLOAT16": torch.float32, "FLOAT32": torch.float32, "FLOAT64": torch.float64, "BOOL": torch.bool},
    **{"INT8": torch.int8, "INT16": torch.int16, "INT32": torch.int32, "INT64": torch.int64},
    **{"UINT8": torch.uint8, "UINT16": torch.int32, "UINT32": torch.int64, "UINT64": torch.int64},
    **{"INT4": torch.int8, "UINT4": torch.uint8, "UINT6": torch.uint8, "UINT3": torch.uint8},
    **{"UINT2": torch.uint8, "UINT1": torch.uint8},
}


def to_declared(value: Any, declared: Type, precision: Precision, exact: bool) -> Any:
    """What an operation gave, as a value of the declared type. Raises ValueError for another shape.

    fp16 is rounded to and then held in fp32, unless the value is `exact` already; too large numbers become
    infinite, as in storage. Integers wrap round.
    """
    if isinstance(declared, ListType):
        return value
    assert isinstance(declared, TensorType)
    shape = value.shape
    if shape != declared.shape and (
        len(shape) != len(declared.shape)
        or any(want is not None and want != have for want, have in zip(declared.shape, shape, strict=True))
    ):
        wanted = "(" + ", ".join("any" if size is None else str(size) for size in declared.shape) + ")"
        raise ValueError(f"gives {tuple(shape)}, declared is {wanted}")
    dtype = TORCH[declared.dtype]
    if value.dtype != dtype:
        value = value.to(dtype)
    if declared.dtype == "FLOAT16":
        return value if exact or precision == "float32" else value.half().float()
    if declared.dtype in ("UINT16", "UINT32"):
        value = value & (0xFFFF if declared.dtype == "UINT16" else 0xFFFFFFFF)
    return value


class Expression:
    """A constant as it is stored, or decompressed by `constexpr` operations."""

    def __init__(
        self,
        constant: Constant | None = None,
        operation: Operation | None = None,
        handler: Handler | None = None,
        arguments: Mapping[str, Expression | list[Expression]] | None = None,
        output: int = 0,
    ) -> None:
        self.constant, self.operation, self.handler, self.output = constant, operation, handler, output
        self.arguments = dict(arguments or {})

    @property
    def identity(self) -> object:
        """Equal for expressions that give the same tensor, so that functions share what is kept."""
        if self.constant is not None:
            return self.constant.identity
        assert self.operation is not None
        parts = tuple(
            (name, tuple(item.identity for item in value) if isinstance(value, list) else value.identity)
            for name, value in sorted(self.arguments.items())
        )
        return (self.operation.type, self.output, self.operation.outputs[self.output][1], parts)

    @property
    def dtype(self) -> str:
        """The declared element type, as MIL names it."""
        if self.constant is not None:
            return self.constant.type.dtype
        assert self.operation is not None
        declared = self.operation.outputs[self.output][1]
        return declared.dtype if isinstance(declared, TensorType) else ""

    def python(self, kind: str) -> Any:
        """The constant as a Python value of a kind that an operation's parameter has."""
        if self.constant is None:
            raise TypeError("a decompressed constant is no number")
        return to_python(self.constant.array(), kind)

    def tensor(self, precision: Precision) -> Tensor:
        """The constant, read and decompressed now. Raises ValueError, MobileMMError."""
        if self.constant is not None:
            array = self.constant.array()
            if array.dtype == object:
                raise TypeError("strings are no tensor")
            # A copy, because files are mapped for reading only.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the mapped array must not be written to: it is not
                stored = torch.from_numpy(
                    array if array.dtype.kind != "u" or array.itemsize == 1 else array.astype("i8")
                )
            return stored.to(TORCH[self.constant.type.dtype], copy=True)
        assert self.operation is not None
        assert self.handler is not None
        arguments: dict[str, Any] = {}
        for name, value in self.arguments.items():
            kind = self.handler.parameters[name].kind
            if kind in ("Tensor", "StoredTensor") and isinstance(value, Expression):
                arguments[name] = value.tensor(precision)
            elif isinstance(value, Expression):
                arguments[name] = value.python(kind)
        try:
            found = self.handler.function(**arguments)
            result = found[self.output] if isinstance(found, tuple) else found
            return to_declared(result, self.operation.outputs[self.output][1], precision, self.handler.exact)
        except MobileMMError:
            raise
        except Exception as error:
            raise MobileMMError(f"{self.operation.location}: {one_line(error)}") from error


Operand: TypeAlias = "int | Expression"
"""A slot of the running function, or a constant."""


class ConstantStore:
    """Constants of a model, decompressed once and kept while there is room.

    In fp32 until `budget` bytes are used; then in fp16, where that loses nothing, until three times as many
    are; what is left is decompressed at each use.
    """

    def __init__(self, precision: Precision, budget: int) -> None:
        self.precision, self.budget = precision, budget
        self._kept: dict[object, Tensor] = {}
        self._room = {torch.float32: budget, torch.float16: 3 * budget}

    def tensor(self, expression: Expression) -> Tensor:
        """In the type that operations compute with."""
        stored = self.stored(expression)
        return stored if stored.dtype != torch.float16 else stored.float()

    def stored(self, expression: Expression) -> Tensor:
        """As it is kept, in fp16 perhaps."""
        key = expression.identity
        kept = self._kept.get(key)
        if kept is None:
            # What is declared float16 is rounded to it, unless nothing is.
            narrow = expression.dtype == "FLOAT16" and (
                self.precision == "declared" or expression.constant is not None
            )
            kept = self._keep(key, expression.tensor(self.precision), narrow)
        return kept

    def keeps(self, expression: Expression, tensor: Tensor) -> bool:
        """Whether this is what is kept, and so what will be given again."""
        return self._kept.get(expression.identity) is tensor

    def _keep(self, key: object, tensor: Tensor, narrow: bool) -> Tensor:
        if tensor.nbytes <= self._room[torch.float32]:
            self._room[torch.float32] -= tensor.nbytes
            self._kept[key] = tensor
        elif narrow and tensor.nbytes // 2 <= self._room[torch.float16]:
            self._room[torch.float16] -= tensor.nbytes // 2
            self._kept[key] = tensor = tensor.half()
        if tensor.numel() > LARGE:
            trim()  # what decompression took lies in pieces between what is kept
        return tensor


def to_python(array: np.ndarray[Any, Any], kind: str) -> Any:
    """An array as a number, a string or a list of numbers. Raises TypeError where it is not one."""
    values = array.tolist()
    if kind.startswith("list["):
        values = values if isinstance(values, list) else [values]
        if array.ndim > 1:
            raise TypeError(f"a {array.ndim}-dimensional array where a list is expected")
        return [_scalar(value, kind[5:-1]) for value in values]
    while isinstance(values, list):
        if len(values) != 1:
            raise TypeError(f"{array.size} elements where one is expected")
        values = values[0]
    return _scalar(values, kind)


def _scalar(value: Any, kind: str) -> Any:
    if kind == "float" and isinstance(value, int | float):
        return float(value)
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "bool" and isinstance(value, bool | int):
        return bool(value)
    if kind == "str" and isinstance(value, str):
        return value
    raise TypeError(f"{type(value).__name__} where {kind} is expected")


Fetch: TypeAlias = "Callable[[list[Any]], Any]"
