"""Normalization."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mobilemm.export.mil_interpreter.ops import op


@op("layer_norm")
def layer_norm(
    x: Tensor,
    axes: list[int] | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    rank = x.dim()
    over = sorted(range(rank) if axes is None else [axis % rank for axis in axes])
    sizes = [x.shape[axis] for axis in over]
    if over == list(range(rank - len(over), rank)):
        return F.layer_norm(x, sizes, gamma, beta, epsilon)
    others = [axis for axis in range(rank) if axis not in over]
    moved = x.permute(*others, *over)
    back = [[*others, *over].index(axis) for axis in range(rank)]
    return F.layer_norm(moved, sizes, gamma, beta, epsilon).permute(back)


@op("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=epsilon)


@op("instance_norm")
def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: float = 1e-5
) -> Tensor:
    over = list(range(2, x.dim()))
    centred = x - x.mean(over, keepdim=True)
    out = centred * (centred.square().mean(over, keepdim=True) + epsilon).rsqrt()
    channels = (x.shape[1], *[1] * (x.dim() - 2))
    out = out if gamma is None else out * gamma.reshape(channels)
    return out if beta is None else out + beta.reshape(channels)


@op("l2_norm")
def l2_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Over the last three dimensions."""
    return x / (x.square().sum((-1, -2, -3), keepdim=True) + epsilon).sqrt()


@op("local_response_norm")
def local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    if not 1 <= size <= 2 * x.shape[1] + 1:
        raise ValueError(f"size is {size} for {x.shape[1]} channels")
    return F.local_response_norm(x, size, alpha, beta, k)
