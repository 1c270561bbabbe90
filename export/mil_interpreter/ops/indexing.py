"""Slices, gathering and scattering. Indices below zero count from the end; those out of range are errors."""

from __future__ import annotations

from types import EllipsisType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mobilemm.export.mil_interpreter.ops import check_elements, op

Index: TypeAlias = "tuple[int | slice | EllipsisType, ...]"


def slice_index(
    shape: torch.Size,
    begin: list[int],
    end: list[int],
    stride: list[int] | None,
    begin_mask: list[bool] | None,
    end_mask: list[bool] | None,
    squeeze_mask: list[bool] | None,
) -> tuple[Index, list[int]]:
    """A slice as an index of steps forward, and the dimensions to turn round before it."""
    rank = len(shape)
    steps = [1] * rank if stride is None else stride
    open_begin, open_end, drop = (
        [False] * rank if mask is None else mask for mask in (begin_mask, end_mask, squeeze_mask)
    )
    if not rank == len(begin) == len(end) == len(steps) == len(open_begin) == len(open_end) == len(drop):
        raise ValueError(f"a slice whose length is not that of the shape {tuple(shape)}")
    index: list[int | slice] = []
    turned: list[int] = []
    for axis, size in enumerate(shape):
        if drop[axis]:
            first = 0 if open_begin[axis] else begin[axis]
            index.append(first + size if first < 0 else first)
            continue
        first_, last, step = slice(
            None if open_begin[axis] else begin[axis], None if open_end[axis] else end[axis], steps[axis]
        ).indices(size)
        if step < 0:
            turned.append(axis)
            first_, last, step = size - 1 - first_, size - 1 - last, -step
        index.append(slice(first_, max(last, first_), step))
    return tuple(index), turned


@op("slice_by_index", view=True)
def slice_by_index(
    x: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    index, turned = slice_index(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    return (x.flip(turned) if turned else x)[index]


@op("slice_by_size", view=True)
def slice_by_size(x: Tensor, begin: list[int], size: list[int]) -> Tensor:
    """A size of −1 goes to the end."""
    for axis, (first, length) in enumerate(zip(begin, size, strict=True)):
        first = first + x.shape[axis] if first < 0 else first
        x = x.narrow(axis, first, x.shape[axis] - first if length == -1 else length)
    return x


def updated_slice(x: Tensor, update: Tensor, index: Index) -> Tensor:
    """Writes into a slice of `x` itself."""
    target = x[index]
    if target.shape != update.shape:
        raise ValueError(f"{tuple(update.shape)} do not fit into a slice of {tuple(target.shape)}")
    target.copy_(update)
    return x


@op("slice_update", exact=True)
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    index, turned = slice_index(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if turned:
        return updated_slice(x.flip(turned), update, index).flip(turned)
    return updated_slice(x.clone(), update, index)


def slice_update_in_place(
    x: Tensor,
    update: Tensor,
    begin: list[int],
    end: list[int],
    stride: list[int] | None = None,
    begin_mask: list[bool] | None = None,
    end_mask: list[bool] | None = None,
    squeeze_mask: list[bool] | None = None,
) -> Tensor:
    """`slice_update` where nobody else will look at `x` again."""
    index, turned = slice_index(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if turned:
        return slice_update(x, update, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    return updated_slice(x, update, index)


def _positions(indices: Tensor, size: int) -> Tensor:
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


@op("gather", exact=True)
def gather(
    x: Tensor, indices: Tensor, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False
) -> Tensor:
    axis %= x.dim()
    if not 0 <= batch_dims <= min(axis, indices.dim()):
        raise ValueError(
            f"batch_dims is {batch_dims} for axis {axis} and {indices.dim()} dimensions of indices"
        )
    if x.shape[:batch_dims] != indices.shape[:batch_dims]:
        raise ValueError("the batches of x and indices differ")
    check_elements(x.numel() / max(x.shape[axis], 1), indices[(0,) * batch_dims].numel())
    positions = _positions(indices, x.shape[axis])
    if batch_dims == 0:
        rows = x.index_select(axis, positions.reshape(-1))
        return rows.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))
    flat_x, flat_positions = x.flatten(0, batch_dims - 1), positions.flatten(0, batch_dims - 1)
    axis -= batch_dims - 1
    rows = torch.stack(
        [
            values.index_select(axis - 1, places.reshape(-1))
            for values, places in zip(flat_x, flat_positions, strict=True)
        ]
    )
    inner = flat_x.shape[1:axis], indices.shape[batch_dims:], flat_x.shape[axis + 1 :]
    return rows.reshape((*x.shape[:batch_dims], *inner[0], *inner[1], *inner[2]))


@op("gather_along_axis", exact=True)
def gather_along_axis(x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False) -> Tensor:
    return torch.gather(x, axis, _positions(indices, x.shape[axis]))


@op("gather_nd", exact=True)
def gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False) -> Tensor:
    if not 0 <= batch_dims < indices.dim() or x.shape[:batch_dims] != indices.shape[:batch_dims]:
        raise ValueError("the batches of x and indices differ")
    depth = indices.shape[-1]
    check_elements(indices.numel() / max(depth, 1), *x.shape[batch_dims + depth :])
    batch: list[Tensor] = []
    for axis in range(batch_dims):
        shape = [1] * (indices.dim() - 1)
        shape[axis] = -1
        batch.append(torch.arange(x.shape[axis]).reshape(shape))
    places = [_positions(place, x.shape[batch_dims + i]) for i, place in enumerate(indices.unbind(-1))]
    return x[(*batch, *places)]


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@op("scatter_along_axis")
def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    positions = _positions(indices, data.shape[axis])
    if mode == "update":
        return data.scatter(axis, positions, updates)
    if mode == "sub":
        return data.scatter_reduce(axis, positions, -updates, "sum")
    if mode == "div":
        return data / torch.ones_like(data).scatter_reduce(axis, positions, updates, "prod")
    if mode not in _REDUCE:
        raise ValueError(f"unknown mode {mode!r}")
    return data.scatter_reduce(axis, positions, updates, _REDUCE[mode])


@op("scatter")
def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """`updates` has the indices' dimensions in the place of `axis`."""
    axis %= data.dim()
    wanted = (*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])
    if updates.shape != wanted:
        raise ValueError(f"updates of {tuple(updates.shape)} where {wanted} are expected")
    flat = updates.reshape(*data.shape[:axis], indices.numel(), *data.shape[axis + 1 :])
    spread = [1] * data.dim()
    spread[axis] = -1
    positions = indices.reshape(spread).expand(flat.shape)
    return scatter_along_axis(data, positions, flat, axis, mode)


@op("scatter_nd")
def scatter_nd(
    data: Tensor, indices: Tensor, updates: Tensor, mode: str = "add", validate_indices: bool = False
) -> Tensor:
    depth = indices.shape[-1]
    wanted = (*indices.shape[:-1], *data.shape[depth:])
    if depth > data.dim() or updates.shape != wanted:
        raise ValueError(f"updates of {tuple(updates.shape)} where {wanted} are expected")
    # One position in the flattened leading dimensions for each row of updates.
    places: Any = torch.zeros(indices.shape[:-1], dtype=torch.long)
    rows = 1
    for i, place in enumerate(indices.unbind(-1)):
        size = data.shape[i]
        positions = _positions(place, size)
        if bool(((positions < 0) | (positions >= size)).any()):
            raise IndexError(f"an index out of the range of dimension {i}, of size {size}")
        places, rows = places * size + positions, rows * size
    flat = data.reshape(rows, -1)
    changes = updates.reshape(-1, flat.shape[1])
    spread = places.reshape(-1, 1).expand(changes.shape)
    return scatter_along_axis(flat, spread, changes, 0, mode).reshape(data.shape)
