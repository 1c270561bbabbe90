"""Generated programs of one operation each, with what NumPy or PyTorch says of their inputs.

A case is a function of a random generator and a floating-point type; it draws shapes and attributes, and
gives what builds the operation, its inputs, and what must come out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from tests.export.mil_interpreter.programs import ct

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True)
class Drawn:
    """One drawn variant: `build` gets a variable for each input."""

    build: Callable[..., Any]
    inputs: tuple[Array, ...]
    wanted: tuple[Array, ...]


Draw: TypeAlias = "Callable[[np.random.Generator, Any], Drawn]"


@dataclass(frozen=True)
class Case:
    """How variants of an operation are drawn; `types` are the floating-point types it is tried with."""

    operation: str
    draw: Draw
    types: tuple[str, ...]
    target: Any
    tolerance: float


CASES: list[Case] = []


def case(
    *operations: str,
    types: tuple[str, ...] = ("float32", "float16"),
    target: Any = ct.target.iOS18,
    tolerance: float = 1.0,
) -> Callable[[Any], Any]:
    """Registers a case; of several operations, `draw` gets the name as a third argument.

    `tolerance` multiplies the allowed difference: 2e-6 for fp32 and 1e-3 for fp16, of the largest number.
    """

    def register(draw: Any) -> Any:
        for operation in operations:
            drawn = draw if len(operations) == 1 else named(draw, operation)
            CASES.append(Case(operation, drawn, types, target, tolerance))
        return draw

    return register


def named(draw: Any, operation: str) -> Draw:
    return lambda rng, number: draw(rng, number, operation)


def drawn(build: Callable[..., Any], *inputs: Array, wanted: Any) -> Drawn:
    """A variant; several outputs as a tuple."""
    several = wanted if isinstance(wanted, tuple) else (wanted,)
    return Drawn(build, inputs, tuple(np.asarray(one) for one in several))


def shape(rng: np.random.Generator, low: int = 1, high: int = 4, largest: int = 5) -> tuple[int, ...]:
    """A shape of `low` to `high` dimensions."""
    return tuple(int(size) for size in rng.integers(1, largest + 1, rng.integers(low, high + 1)))


def normal(rng: np.random.Generator, number: Any, sizes: tuple[int, ...], scale: float = 1.0) -> Array:
    return (rng.standard_normal(sizes) * scale).astype(number)


def choice(rng: np.random.Generator, *values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def exact(rng: np.random.Generator, low: float, high: float) -> float:
    """A number that fp16 holds exactly."""
    return float(rng.integers(int(low * 16), int(high * 16) + 1)) / 16


def axis_of(rng: np.random.Generator, rank: int) -> int:
    """An axis, counted from the front or from the end."""
    return int(rng.integers(-rank, rank))
