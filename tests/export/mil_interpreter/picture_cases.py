"""Resizing and pooling that PyTorch has no module of, by their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tests.export.mil_interpreter.cases import Array, Drawn, case, choice, drawn, normal
from tests.export.mil_interpreter.programs import mb

MODES = ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS", "DEFAULT", "OFFSET_CORNERS", "UNALIGN_CORNERS")


def points(size: int, count: int, mode: str) -> Array:
    """Where each of `count` pixels lies in a dimension of `size`, as coremltools' documentation has it."""
    steps = np.arange(count)
    if mode == "ALIGN_CORNERS" and count == 1:
        found = np.array([(size - 1) / 2])
    elif mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        found = steps * (size - 1) / max(count - 1, 1)
    elif mode == "DEFAULT":
        found = steps * (size - size / count) / max(count - 1, 1)
    elif mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / count
        found = 0.5 * delta + steps * delta
    else:
        spacing = size / count
        found = steps * spacing + 0.5 * spacing - 0.5
    return np.clip(found, 0, size - 1)


def bilinear(x: Array, height: int, width: int, mode: str) -> Array:
    rows, columns = points(x.shape[-2], height, mode), points(x.shape[-1], width, mode)
    out = np.empty((*x.shape[:-2], height, width))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            top, left = int(row), int(column)
            bottom, right = min(top + 1, x.shape[-2] - 1), min(left + 1, x.shape[-1] - 1)
            down, across = row - top, column - left
            out[..., i, j] = (x[..., top, left] * (1 - across) + x[..., top, right] * across) * (1 - down) + (
                x[..., bottom, left] * (1 - across) + x[..., bottom, right] * across
            ) * down
    return out


@case("resize_bilinear")
def resize_bilinear(rng: np.random.Generator, number: Any) -> Drawn:
    x, mode = normal(rng, number, (2, 3, 4, 5)), choice(rng, *MODES)
    height, width = (int(size) for size in rng.integers(1, 12, 2))
    return drawn(
        lambda x: mb.resize_bilinear(
            x=x, target_size_height=height, target_size_width=width, sampling_mode=mode
        ),
        x,
        wanted=bilinear(x.astype(np.float64), height, width, mode),
    )


@case("resize_nearest_neighbor")
def resize_nearest_neighbor(rng: np.random.Generator, number: Any) -> Drawn:
    x, by = normal(rng, number, (2, 3, 4, 5)), int(rng.integers(1, 4))
    return drawn(
        lambda x: mb.resize_nearest_neighbor(x=x, target_size_height=4 * by, target_size_width=5),
        x,
        wanted=np.repeat(x, by, 2),
    )


@case("resize")
def resize(rng: np.random.Generator, number: Any) -> Drawn:
    x, mode = normal(rng, number, (2, 3, 4, 5)), choice(rng, *MODES)
    height, width = (int(size) for size in rng.integers(1, 12, 2))
    if rng.random() < 0.3:
        return drawn(
            lambda x: mb.resize(
                x=x,
                shape=np.array([0, 8, 0], np.int32),
                resized_dims=np.uint32(2),
                interpolation_mode="NEAREST_NEIGHBOR",
            ),
            x,
            wanted=np.repeat(x, 2, 2),
        )
    return drawn(
        lambda x: mb.resize(
            x=x,
            shape=np.array([1, height, width], np.int32),
            resized_dims=np.uint32(2),
            interpolation_mode="LINEAR",
            sampling_mode=mode,
        ),
        x,
        wanted=bilinear(x.astype(np.float64), height, width, mode),
    )


@case("affine", tolerance=20)  # positions in fp32 or fp16 against PyTorch's in double
def affine(rng: np.random.Generator, number: Any) -> Drawn:
    x, matrix = normal(rng, number, (2, 3, 6, 7)), normal(rng, number, (2, 6), 0.5)
    torches = [torch.from_numpy(value.astype(np.float64)) for value in (x, matrix)]
    grid = F.affine_grid(torches[1].reshape(2, 2, 3), [2, 3, 4, 5], align_corners=True)
    wanted = F.grid_sample(torches[0], grid, align_corners=True)
    return drawn(
        lambda x, matrix: mb.affine(
            x=x,
            transform_matrix=matrix,
            output_height=4,
            output_width=5,
            sampling_mode="bilinear",
            padding_mode="constant",
            padding_value=number(0),
            coordinates_mode="normalized_minus_one_to_one",
            align_corners=True,
        ),
        *(x, matrix),
        wanted=wanted.numpy(),
    )


@case("l2_pool")
def l2_pool(rng: np.random.Generator, number: Any) -> Drawn:
    x, size, stride = normal(rng, number, (2, 3, 6, 7)), int(rng.integers(1, 4)), int(rng.integers(1, 3))
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x.astype(np.float64), ((0, 0), (0, 0), (1, 0), (0, 1))), (size, size), (2, 3)
    )[:, :, ::stride, ::stride]
    return drawn(
        lambda x: mb.l2_pool(
            x=x, kernel_sizes=[size, size], strides=[stride, stride], pad_type="custom", pad=[1, 0, 0, 1]
        ),
        x,
        wanted=np.sqrt(np.square(windows).sum((-1, -2))),
    )


@case("avg_pool", "max_pool")
def same_padding(rng: np.random.Generator, number: Any, name: str) -> Drawn:
    """What PyTorch has no word for: as many windows as strides fit, the odd row behind or before."""
    x, pad_type = normal(rng, number, (1, 2, 7)), choice(rng, "same", "same_lower")
    size, stride = int(rng.integers(2, 5)), int(rng.integers(1, 3))
    count = -(-7 // stride)
    total = max((count - 1) * stride + size - 7, 0)
    before = total // 2 if pad_type == "same" else total - total // 2
    wanted = np.empty((1, 2, count))
    for i in range(count):
        first = i * stride - before
        window = x[:, :, max(first, 0) : first + size].astype(np.float64)
        wanted[:, :, i] = window.max(-1) if name == "max_pool" else window.mean(-1)
    more = {"exclude_padding_from_average": True} if name == "avg_pool" else {}
    return drawn(
        lambda x: getattr(mb, name)(x=x, kernel_sizes=[size], strides=[stride], pad_type=pad_type, **more),
        x,
        wanted=wanted,
    )
