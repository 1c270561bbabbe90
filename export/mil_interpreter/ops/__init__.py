"""MIL's operations on PyTorch: one function each, found by the operation's name.

A function takes MIL's arguments by their names; how each arrives its annotation says: `Tensor`,
`StoredTensor` (a large constant, perhaps in fp16), `list[Tensor]`, `TensorList` (a MIL list), or Python's
`int`, `float`, `bool`, `str` and lists of these. Numbers come in as fp32 tensors that hold values of the
declared type, integers and booleans as PyTorch has them (uint16 as int32, uint32 as int64, types under a byte
as int8 and uint8). What a function returns is turned into the declared type by the interpreter.

Operations whose output can be larger than their inputs ask `check_elements` first.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, TypeAlias

from torch import Tensor

MOST_ELEMENTS = 2**27
"""Elements that one value may have, so that a program of a few bytes cannot ask for all memory (512 MB)."""

LARGEST_CONSTANT = 2**29
"""The same of a decompressed constant, which grows out of a file that is there."""

TensorList: TypeAlias = "list[Tensor]"

StoredTensor: TypeAlias = "Tensor"
"""A constant as it is kept: in fp32, or in fp16 where that loses nothing."""

TOPICS = (
    *(
        "activation",
        "attention",
        "constexpr",
        "convolution",
        "elementwise",
        "indexing",
        "lists",
        "normalization",
    ),
    *("pooling", "reduction", "resizing", "shapes"),
)


@dataclass(frozen=True)
class Parameter:
    """How an argument arrives: `kind` is its annotation without "| None"."""

    kind: str
    required: bool


@dataclass(frozen=True)
class Handler:
    """An operation's function.

    Attributes:
        exact: its outputs are elements of its inputs or small integers, so that nothing is left to round.
        view: its outputs may share memory with its arguments.
    """

    function: Callable[..., Any]
    parameters: Mapping[str, Parameter]
    exact: bool
    view: bool


_HANDLERS: dict[str, Handler] = {}


def op(*names: str, exact: bool | None = None, view: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function for MIL's operations of these names; views are exact unless `exact` says no."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = {
            name: Parameter(
                parameter.annotation.removesuffix(" | None"), parameter.default is inspect.Parameter.empty
            )
            for name, parameter in inspect.signature(function).parameters.items()
        }
        for name in names:
            _HANDLERS[name] = Handler(function, parameters, view if exact is None else exact, view)
        return function

    return register


@cache
def handlers() -> Mapping[str, Handler]:
    """All operations that are known, by name."""
    for topic in TOPICS:
        import_module(f"{__name__}.{topic}")
    return _HANDLERS


def check_elements(*counts: float, most: int = MOST_ELEMENTS) -> None:
    """Raises ValueError when the product, a number of elements, is more than one value may have."""
    if (count := math.prod(counts)) > most:
        raise ValueError(f"an output of {count:,} elements is larger than the {most:,} allowed")


def check_broadcast(*shapes: Iterable[int]) -> None:
    """The same for what tensors of these shapes are broadcast to."""
    reversed_shapes = [list(shape)[::-1] for shape in shapes]
    rank = max(len(shape) for shape in reversed_shapes)
    check_elements(
        *(max(shape[axis] if axis < len(shape) else 1 for shape in reversed_shapes) for axis in range(rank))
    )
