"""Matrix products and attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemm.export.mil_interpreter.ops import (
    MOST_ELEMENTS,
    StoredTensor,
    check_broadcast,
    check_elements,
    op,
)

# Elements of a weight in fp16 that are in fp32 at once: what a core's cache holds.
WIDENED_ELEMENTS = 2**19


@op("linear")
def linear(x: Tensor, weight: StoredTensor, bias: Tensor | None = None) -> Tensor:
    check_elements(x.numel() / max(x.shape[-1], 1), weight.shape[0])
    if weight.dtype != torch.float16:
        return F.linear(x, weight, bias)
    wide = torch.empty(max(1, WIDENED_ELEMENTS // max(weight.shape[1], 1)), weight.shape[1])
    pieces = [F.linear(x, wide[: len(rows)].copy_(rows)) for rows in weight.split(len(wide))]
    product = torch.cat(pieces, -1)
    return product if bias is None else product + bias


@op("matmul")
def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    x = x.transpose(-1, -2) if transpose_x else x
    y = y.transpose(-1, -2) if transpose_y else y
    if x.numel() * y.numel() > MOST_ELEMENTS and x.dim() > 1 and y.dim() > 1:
        check_broadcast((*x.shape[:-2], x.shape[-2], 1), (*y.shape[:-2], 1, y.shape[-1]))
    # PyTorch has no fast product of integers; in 64 bits the sums of 53 are exact.
    return x @ y if x.is_floating_point() else x.double() @ y.double()


@op("einsum")
def einsum(values: list[Tensor], equation: str) -> Tensor:
    inputs, _, output = equation.replace(" ", "").partition("->")
    sizes = {
        label: size
        for labels, value in zip(inputs.split(","), values, strict=True)
        for label, size in zip(labels, value.shape, strict=True)
    }
    check_elements(*(sizes[label] for label in output))
    product = torch.einsum(equation, *values)
    return product.clone() if len(values) == 1 else product  # which may be a view


@op("scaled_dot_product_attention")
def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """softmax(q kᵀ / √d + mask) v; a mask of booleans keeps where it is true."""
    check_broadcast((*query.shape[:-1], 1), (*key.shape[:-2], 1, key.shape[-2]))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        check_broadcast(scores.shape, attn_mask.shape)
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    return F.softmax(scores, -1) @ value
