"""Arithmetic, comparison and logic, element by element with broadcasting."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mobilemm.export.mil_interpreter.ops import MOST_ELEMENTS, check_broadcast, op


def _binary(name: str, function: Callable[[Tensor, Tensor], Tensor], exact: bool = False) -> None:
    def handler(x: Tensor, y: Tensor) -> Tensor:
        if x.numel() * y.numel() > MOST_ELEMENTS:
            check_broadcast(x.shape, y.shape)
        return function(x, y)

    op(name, exact=exact)(handler)


def _unary(name: str, function: Callable[[Tensor], Tensor], exact: bool = False) -> None:
    def handler(x: Tensor) -> Tensor:
        return function(x)

    op(name, exact=exact)(handler)


def _real_div(x: Tensor, y: Tensor) -> Tensor:
    """Of integers the quotient towards zero. (Whole quotients apart, runtimes differ.)"""
    if x.is_floating_point():
        return x / y
    # In 64 bits, because the least int32 divided by −1 ends a process.
    return torch.div(x.long(), y.long(), rounding_mode="trunc")


def _floor_div(x: Tensor, y: Tensor) -> Tensor:
    if x.is_floating_point():
        return torch.div(x, y, rounding_mode="floor")
    return torch.div(x.long(), y.long(), rounding_mode="floor")


def _mod(x: Tensor, y: Tensor) -> Tensor:
    return torch.remainder(x, y) if x.is_floating_point() else torch.remainder(x.long(), y.long())


def _pow(x: Tensor, y: Tensor) -> Tensor:
    if x.is_floating_point():
        return torch.pow(x, y)
    return torch.pow(x.double(), y.double()).long()  # integers to negative powers are 0 and ±1


_binary("add", torch.add)
_binary("sub", torch.sub)
_binary("mul", torch.mul)
_binary("real_div", _real_div)
_binary("floor_div", _floor_div)
_binary("mod", _mod)
_binary("pow", _pow)
_binary("maximum", torch.maximum, exact=True)
_binary("minimum", torch.minimum, exact=True)
_binary("equal", torch.eq)
_binary("not_equal", torch.ne)
_binary("greater", torch.gt)
_binary("greater_equal", torch.ge)
_binary("less", torch.lt)
_binary("less_equal", torch.le)
_binary("logical_and", torch.logical_and)
_binary("logical_or", torch.logical_or)
_binary("logical_xor", torch.logical_xor)

_unary("abs", torch.abs, exact=True)
_unary("acos", torch.acos)
_unary("asin", torch.asin)
_unary("atan", torch.atan)
_unary("atanh", torch.atanh)
_unary("ceil", torch.ceil)
_unary("cos", torch.cos)
_unary("cosh", torch.cosh)
_unary("erf", torch.erf)
_unary("exp", torch.exp)
_unary("exp2", torch.exp2)
_unary("floor", torch.floor)
_unary("logical_not", torch.logical_not)
_unary("round", torch.round)
_unary("sign", torch.sign, exact=True)
_unary("sin", torch.sin)
_unary("sinh", torch.sinh)
_unary("sqrt", torch.sqrt)
_unary("square", torch.square)
_unary("tan", torch.tan)
_unary("tanh", torch.tanh)


@op("identity", view=True)
def identity(x: Tensor) -> Tensor:
    return x


@op("rsqrt")
def rsqrt(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


@op("inverse")
def inverse(x: Tensor, epsilon: float = 1e-4) -> Tensor:
    return 1 / (x + epsilon)


@op("log")
def log(x: Tensor, epsilon: float = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


@op("clip")
def clip(x: Tensor, alpha: float, beta: float) -> Tensor:
    return x.clamp(alpha, beta)


@op("threshold")
def threshold(x: Tensor, alpha: float) -> Tensor:
    return x.clamp(min=alpha)


@op("select", exact=True)
def select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    check_broadcast(cond.shape, a.shape, b.shape)
    return torch.where(cond, a, b)


@op("cast", exact=False, view=True)
def cast(x: Tensor, dtype: str) -> Tensor:
    """Towards zero from numbers to integers; whatever is not 0 is true."""
    if dtype == "bool":
        return x != 0
    if dtype.startswith("fp"):
        return x.float()
    if x.is_floating_point():
        # Out of range means the nearest end of it, as converters' own constant folding leaves undefined.
        return torch.nan_to_num(x.double().trunc(), 0.0, 2.0**62, -(2.0**62)).long()
    return x
