"""Shapes and layout: reshaping, joining, cutting, padding, filling."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemm.export.mil_interpreter.ops import check_elements, op


@op("reshape", view=True)
def reshape(x: Tensor, shape: list[int]) -> Tensor:
    """0 takes the input's size of the same dimension, −1 what is left."""
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)])


@op("reshape_like", view=True)
def reshape_like(
    x: Tensor, ref_tensors: list[Tensor], begins: list[int], ends: list[int], end_masks: list[bool]
) -> Tensor:
    shape: list[int] = []
    for tensor, begin, end, to_end in zip(ref_tensors, begins, ends, end_masks, strict=True):
        shape += tensor.shape[begin : None if to_end else end]
    return x.reshape(shape)


@op("transpose", view=True)
def transpose(x: Tensor, perm: list[int]) -> Tensor:
    return x.permute(perm)


@op("expand_dims", view=True)
def expand_dims(x: Tensor, axes: list[int]) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(axis + rank if axis < 0 else axis for axis in axes):
        x = x.unsqueeze(axis)
    return x


@op("squeeze", view=True)
def squeeze(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@op("flatten2d", view=True)
def flatten2d(x: Tensor, axis: int = 1) -> Tensor:
    return x.reshape(math.prod(x.shape[:axis]), -1)


@op("split", view=True)
def split(
    x: Tensor, axis: int, num_splits: int | None = None, split_sizes: list[int] | None = None
) -> tuple[Tensor, ...]:
    if split_sizes is None:
        if not num_splits or x.shape[axis] % num_splits:
            raise ValueError(f"{x.shape[axis]} elements in {num_splits} equal parts")
        return x.split(x.shape[axis] // num_splits, axis)
    return x.split(split_sizes, axis)


@op("concat", exact=True)
def concat(values: list[Tensor], axis: int, interleave: bool = False) -> Tensor:
    check_elements(sum(value.numel() for value in values))
    values = [value.reshape(1) if value.dim() == 0 else value for value in values]
    if interleave:
        return torch.stack(values, axis % values[0].dim() + 1).flatten(
            axis % values[0].dim(), axis % values[0].dim() + 1
        )
    return torch.cat(values, axis)


@op("stack", exact=True)
def stack(values: list[Tensor], axis: int) -> Tensor:
    check_elements(sum(value.numel() for value in values))
    return torch.stack(values, axis)


@op("tile", exact=True)
def tile(x: Tensor, reps: list[int]) -> Tensor:
    check_elements(x.numel(), *reps)
    return x.repeat(reps)


@op("reverse", exact=True)
def reverse(x: Tensor, axes: list[int] | None = None) -> Tensor:
    return x.flip(list(range(x.dim())) if axes is None else axes)


@op("reverse_sequence", exact=True)
def reverse_sequence(x: Tensor, lengths: list[int], seq_axis: int = 0, batch_axis: int = 0) -> Tensor:
    """Of each element of the batch, the first `lengths` elements of the sequence backwards."""
    size = x.shape[seq_axis]
    if len(lengths) != x.shape[batch_axis] or any(not 0 <= length <= size for length in lengths):
        raise ValueError(f"lengths {lengths} for a sequence of {size}")
    rows = []
    for row, length in zip(x.unbind(batch_axis), lengths, strict=True):
        axis = seq_axis % x.dim() - (batch_axis % x.dim() < seq_axis % x.dim())
        head, tail = row.narrow(axis, 0, length), row.narrow(axis, length, size - length)
        rows.append(torch.cat([head.flip(axis), tail], axis))
    return torch.stack(rows, batch_axis)


@op("pad", exact=True)
def pad(x: Tensor, pad: list[int], mode: str = "constant", constant_val: float = 0.0) -> Tensor:
    """`pad` counts elements before and behind, for the last dimensions of the input."""
    pairs = list(zip(pad[0::2], pad[1::2], strict=True))
    padded = [0] * (x.dim() - len(pairs)) + [before + behind for before, behind in pairs]
    check_elements(*(max(size + more, 0) for size, more in zip(x.shape, padded, strict=True)))
    if mode == "constant":
        flat = [amount for pair in reversed(pairs) for amount in pair]
        return F.pad(x, flat, value=constant_val if x.is_floating_point() else int(constant_val))
    if mode not in ("reflect", "replicate"):
        raise ValueError(f"unknown mode {mode!r}")
    for axis, (before, behind) in enumerate(pairs, x.dim() - len(pairs)):
        # Dimension by dimension, in any number of them, unlike PyTorch's own.
        index = torch.arange(-before, x.shape[axis] + behind)
        last = x.shape[axis] - 1
        if mode == "replicate":
            index = index.clamp(0, last)
        elif max(before, behind) > last:
            raise ValueError(f"{max(before, behind)} elements to reflect where there are {last}")
        else:
            index = last - (last - index.abs()).abs()
        x = x.index_select(axis, index)
    return x


@op("crop", view=True)
def crop(x: Tensor, crop_height: list[int], crop_width: list[int]) -> Tensor:
    (top, bottom), (left, right) = crop_height, crop_width
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


@op("shape")
def shape(x: Tensor) -> Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


@op("fill", exact=True)
def fill(shape: list[int], value: Tensor) -> Tensor:
    check_elements(*shape)
    return value.reshape(()).expand(shape).clone()


@op("fill_like", exact=True)
def fill_like(ref_tensor: Tensor, value: Tensor) -> Tensor:
    return value.reshape(()).expand(ref_tensor.shape).clone()


@op("range_1d")
def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    first, last, by = start.item(), end.item(), step.item()
    if by == 0:
        raise ValueError("a step of 0")
    check_elements(max(0.0, math.ceil((last - first) / by)))
    return torch.arange(first, last, by)


@op("one_hot", exact=True)
def one_hot(
    indices: Tensor,
    one_hot_vector_size: int,
    axis: int = -1,
    on_value: Tensor | None = None,
    off_value: Tensor | None = None,
) -> Tensor:
    check_elements(indices.numel(), one_hot_vector_size)
    classes = torch.arange(one_hot_vector_size)
    hot = indices.unsqueeze(-1).long() == classes
    on = torch.tensor(1, dtype=torch.int32) if on_value is None else on_value
    off = torch.tensor(0, dtype=torch.int32) if off_value is None else off_value
    return torch.where(hot, on, off).movedim(-1, axis)


@op("non_zero")
def non_zero(x: Tensor) -> Tensor:
    return x.nonzero()


@op("band_part", view=True)
def band_part(x: Tensor, lower: int = -1, upper: int = -1) -> Tensor:
    """Zeros outside of `lower` diagonals below and `upper` above the main one; −1 keeps them all."""
    x = x if lower < 0 else x.triu(-lower)
    return x if upper < 0 else x.tril(upper)


@op("pixel_shuffle", view=True)
def pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor:
    return F.pixel_shuffle(x, upscale_factor)


@op("pixel_unshuffle", view=True)
def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    return F.pixel_unshuffle(x, downscale_factor)


@op("depth_to_space", view=True)
def depth_to_space(x: Tensor, block_size: int) -> Tensor:
    """Channels (block row, block column, depth) to pixels, the blocks' order being the outer one."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, block_size, block_size, channels // block_size**2, height, width)
    return x.permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, height * block_size, width * block_size)


@op("space_to_depth", view=True)
def space_to_depth(x: Tensor, block_size: int) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // block_size, block_size, width // block_size, block_size)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(batch, -1, height // block_size, width // block_size)


@op("space_to_batch", exact=True)
def space_to_batch(x: Tensor, block_shape: list[int], paddings: Tensor) -> Tensor:
    (top, bottom), (left, right) = paddings.tolist()
    rows, columns = block_shape
    batch, channels, height, width = x.shape
    check_elements(batch, channels, height + top + bottom, width + left + right)
    x = F.pad(x, [left, right, top, bottom])
    height, width = x.shape[2] // rows, x.shape[3] // columns
    x = x.reshape(batch, channels, height, rows, width, columns)
    return x.permute(3, 5, 0, 1, 2, 4).reshape(-1, channels, height, width)


@op("batch_to_space", view=True)
def batch_to_space(x: Tensor, block_shape: list[int], crops: Tensor) -> Tensor:
    (top, bottom), (left, right) = crops.tolist()
    rows, columns = block_shape
    batch, channels, height, width = x.shape
    x = x.reshape(rows, columns, batch // (rows * columns), channels, height, width)
    x = x.permute(2, 3, 4, 0, 5, 1).reshape(-1, channels, height * rows, width * columns)
    return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]


@op("sliding_windows", exact=True)
def sliding_windows(x: Tensor, axis: int, size: int, stride: int = 1) -> Tensor:
    """Windows along `axis`: … × number of windows × size × …"""
    axis %= x.dim()
    windows = x.unfold(axis, size, stride)
    check_elements(windows.numel())
    return windows.movedim(-1, axis + 1).clone(memory_format=torch.contiguous_format)
