"""Convolution and its transpose, in one to three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from mobilemm.export.mil_interpreter.ops import check_elements, op


def padding(
    pad_type: str,
    pad: Sequence[int] | None,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[tuple[int, int]]:
    """Elements to add before and behind each spatial dimension."""
    if (
        not len(sizes) == len(kernel) == len(strides) == len(dilations)
        or min((*strides, *dilations), default=1) < 1
    ):
        raise ValueError("kernel, strides and dilations do not fit the input")
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    if pad_type == "custom":
        amounts = [0] * 2 * len(sizes) if pad is None else list(pad)
        if len(amounts) != 2 * len(sizes) or min(amounts, default=0) < 0:
            raise ValueError(f"pad is {amounts} for {len(sizes)} dimensions")
        return list(zip(amounts[0::2], amounts[1::2], strict=True))
    if pad_type not in ("same", "same_lower"):
        raise ValueError(f"unknown pad_type {pad_type!r}")
    pairs = []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((math.ceil(size / stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        less, more = total // 2, total - total // 2
        pairs.append((less, more) if pad_type == "same" else (more, less))
    return pairs


def padded(x: Tensor, pairs: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """The input with its spatial dimensions padded."""
    if not any(map(any, pairs)):
        return x
    check_elements(*x.shape[:2], *(size + sum(pair) for size, pair in zip(x.shape[2:], pairs, strict=True)))
    return F.pad(x, [amount for pair in reversed(pairs) for amount in pair], value=value)


@op("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: list[int] | None = None,
    pad_type: str = "valid",
    pad: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    rank = x.dim() - 2
    ones = [1] * rank
    strides, dilations = strides or ones, dilations or ones
    if not 1 <= rank <= 3 or groups < 1:
        raise ValueError(f"an input of {x.dim()} dimensions in {groups} groups")
    pairs = padding(pad_type, pad, x.shape[2:], weight.shape[2:], strides, dilations)
    pointwise = groups == 1 and weight.shape[2:].numel() == 1 and strides == ones and not any(map(any, pairs))
    if pointwise and weight.shape[1] == x.shape[1]:
        # A product: PyTorch would put the weights of a convolution into another order at each call.
        flat = weight.flatten(1) @ x.flatten(2)
        out = flat if bias is None else flat + bias[:, None]
        return out.unflatten(2, x.shape[2:])
    symmetric = all(before == behind for before, behind in pairs)
    x = x if symmetric else padded(x, pairs)
    amounts = [before for before, _ in pairs] if symmetric else [0] * rank
    sizes = [
        (size + 2 * amount - (width - 1) * dilation - 1) // stride + 1
        for size, amount, width, dilation, stride in zip(
            x.shape[2:], amounts, weight.shape[2:], dilations, strides, strict=True
        )
    ]
    check_elements(x.shape[0], weight.shape[0], *sizes)
    function = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return function(x, weight, bias, strides, amounts, dilations, groups)


@op("conv_transpose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: list[int] | None = None,
    output_shape: list[int] | None = None,
    pad_type: str = "valid",
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    groups: int = 1,
) -> Tensor:
    """The full transposed convolution, from which `pad` is cut off and behind which it may be lengthened."""
    rank = x.dim() - 2
    ones = [1] * rank
    strides, dilations = strides or ones, dilations or ones
    kernel = weight.shape[2:]
    if not 1 <= rank <= 3 or groups < 1 or not rank == len(kernel) == len(strides) == len(dilations):
        raise ValueError("kernel, strides and dilations do not fit the input")
    full = [
        (size - 1) * stride + (width - 1) * dilation + 1
        for size, stride, width, dilation in zip(x.shape[2:], strides, kernel, dilations, strict=True)
    ]
    match pad_type:
        case "valid":
            pairs = [(0, 0)] * rank
        case "custom":
            amounts = [0] * 2 * rank if pad is None else pad
            pairs = list(zip(amounts[0::2], amounts[1::2], strict=True))
        case "same" | "same_lower":
            wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
            if output_shape is not None:
                wanted = output_shape[-rank:]
            pairs = []
            for total in (max(size - want, 0) for size, want in zip(full, wanted, strict=True)):
                less, more = total // 2, total - total // 2
                pairs.append((less, more) if pad_type == "same" else (more, less))
        case _:
            raise ValueError(f"unknown pad_type {pad_type!r}")
    ends = [size - behind for size, (_, behind) in zip(full, pairs, strict=True)]
    if output_shape is not None:
        ends = [before + size for (before, _), size in zip(pairs, output_shape[-rank:], strict=True)]
    longer = [max(end - size, 0) for end, size in zip(ends, full, strict=True)]
    check_elements(
        x.shape[0], weight.shape[1], groups, *(size + more for size, more in zip(full, longer, strict=True))
    )
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    out = function(x, weight, None, strides, 0, 0, groups, dilations)
    if any(longer):
        out = F.pad(out, [amount for more in reversed(longer) for amount in (0, more)])
    for axis, ((before, _), end) in enumerate(zip(pairs, ends, strict=True), 2):
        out = out.narrow(axis, before, end - before)
    return out if bias is None else out + bias.reshape(-1, *ones)
