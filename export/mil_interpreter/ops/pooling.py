"""Pooling over the dimensions behind batch and channels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemm.export.mil_interpreter.ops import op
from mobilemm.export.mil_interpreter.ops.convolution import padded, padding


def _windows(
    x: Tensor,
    kernel_sizes: list[int],
    strides: list[int] | None,
    pad_type: str,
    pad: list[int] | None,
    ceil_mode: bool,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Strides, and the padding before and behind; `ceil_mode` pads further behind, for a last window that
    begins inside of the input or its padding before it."""
    rank = x.dim() - 2
    strides = strides or [1] * rank
    if not 1 <= rank <= 3 or len(kernel_sizes) != rank or min(kernel_sizes) < 1:
        raise ValueError(f"kernel_sizes is {kernel_sizes} for an input of {x.dim()} dimensions")
    pairs = padding(pad_type, pad, x.shape[2:], kernel_sizes, strides, [1] * rank)
    if ceil_mode:
        for axis, (size, width, stride) in enumerate(zip(x.shape[2:], kernel_sizes, strides, strict=True)):
            before, behind = pairs[axis]
            count = math.ceil((size + before + behind - width) / stride) + 1
            if (count - 1) * stride >= size + before:
                count -= 1
            pairs[axis] = (before, max(behind, (count - 1) * stride + width - size - before))
    return strides, pairs


@op("max_pool", exact=True)
def max_pool(
    x: Tensor,
    kernel_sizes: list[int],
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    strides, pairs = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3]
    return function(padded(x, pairs, -math.inf), kernel_sizes, strides)


@op("avg_pool")
def avg_pool(
    x: Tensor,
    kernel_sizes: list[int],
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    exclude_padding_from_average: bool = False,
    ceil_mode: bool = False,
) -> Tensor:
    """What `ceil_mode` adds behind the declared padding never counts in an average."""
    strides, pairs = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    total = _window_sums(padded(x, pairs), kernel_sizes, strides)
    if not any(map(any, pairs)):
        return total / math.prod(kernel_sizes)
    declared = _windows(x, kernel_sizes, strides, pad_type, pad, False)[1]
    ones = torch.ones(1, 1, *x.shape[2:])
    if exclude_padding_from_average:
        counted = padded(ones, pairs)
    else:
        extra = [
            (0, behind - own_behind) for (_, behind), (_, own_behind) in zip(pairs, declared, strict=True)
        ]
        counted = padded(padded(ones, declared, 1.0), extra)
    return total / _window_sums(counted, kernel_sizes, strides)


@op("l2_pool")
def l2_pool(
    x: Tensor,
    kernel_sizes: list[int],
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    strides, pairs = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    return _window_sums(padded(x * x, pairs), kernel_sizes, strides).sqrt()


def _window_sums(x: Tensor, kernel: list[int], strides: list[int]) -> Tensor:
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.dim() - 3]
    return function(x, kernel, strides) * math.prod(kernel)
