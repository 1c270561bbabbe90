"""Reductions, arguments of extremes, sorting, cumulative sums."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mobilemm.export.mil_interpreter.ops import op


def _reduction(name: str, function: Callable[[Tensor, list[int], bool], Tensor], exact: bool = False) -> None:
    def handler(x: Tensor, axes: list[int] | None = None, keep_dims: bool = False) -> Tensor:
        every = list(range(x.dim())) if axes is None else axes
        return function(x, every, keep_dims) if every else x.clone()

    op(name, exact=exact)(handler)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keep)
    return x


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.mean(axes, keep) if x.is_floating_point() else x.double().mean(axes, keep).trunc()


_reduction("reduce_sum", lambda x, axes, keep: x.sum(axes, keep))
_reduction("reduce_mean", _mean)
_reduction("reduce_max", lambda x, axes, keep: x.amax(axes, keep), exact=True)
_reduction("reduce_min", lambda x, axes, keep: x.amin(axes, keep), exact=True)
_reduction("reduce_prod", _product)
_reduction("reduce_sum_square", lambda x, axes, keep: (x * x).sum(axes, keep))
_reduction("reduce_l1_norm", lambda x, axes, keep: x.abs().sum(axes, keep))
_reduction("reduce_l2_norm", lambda x, axes, keep: (x * x).sum(axes, keep).sqrt())
_reduction("reduce_log_sum", lambda x, axes, keep: x.sum(axes, keep).log())
_reduction("reduce_log_sum_exp", lambda x, axes, keep: x.float().logsumexp(axes, keep))


@op("reduce_argmax")
def reduce_argmax(x: Tensor, axis: int = -1, keep_dims: bool = True, output_dtype: str = "int32") -> Tensor:
    return x.argmax(axis, keep_dims)


@op("reduce_argmin")
def reduce_argmin(x: Tensor, axis: int = -1, keep_dims: bool = True, output_dtype: str = "int32") -> Tensor:
    return x.argmin(axis, keep_dims)


@op("argsort")
def argsort(x: Tensor, axis: int = -1, ascending: bool = False, output_dtype: str = "int32") -> Tensor:
    return x.argsort(dim=axis, descending=not ascending, stable=True)


@op("topk", exact=True)
def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:
    """The k best, the best first; of equals the first."""
    values, indices = x.sort(dim=axis, descending=not ascending, stable=True)
    if not 0 <= k <= x.shape[axis]:
        raise ValueError(f"k is {k} for {x.shape[axis]} elements")
    found = values.narrow(axis, 0, k), indices.narrow(axis, 0, k)
    return found if return_indices else found[:1]


@op("cumsum")
def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    values = x.flip(axis) if reverse else x
    total = values.cumsum(axis)
    if exclusive:
        total = total - values
    return total.flip(axis) if reverse else total
