"""Resizing and resampling of pictures: the last two dimensions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemm.export.mil_interpreter.ops import check_elements, op


def _nearest(x: Tensor, height: int, width: int) -> Tensor:
    check_elements(*x.shape[:-2], height, width)
    if min(height, width) < 1:
        raise ValueError(f"a size of {height} × {width}")
    for axis, size in ((-2, height), (-1, width)):
        index = (torch.arange(size) * (x.shape[axis] / size)).floor().long().clamp(max=x.shape[axis] - 1)
        x = x.index_select(axis, index)
    return x


def _interpolated(x: Tensor, axis: int, grid: Tensor) -> Tensor:
    """Linear interpolation along a dimension at the points `grid`, which lie inside of it."""
    below = grid.floor().long().clamp(0, x.shape[axis] - 1)
    above = (below + 1).clamp(max=x.shape[axis] - 1)
    shape = [1] * x.dim()
    shape[axis] = -1
    weight = (grid - below).float().reshape(shape)
    return x.index_select(axis, below) * (1 - weight) + x.index_select(axis, above) * weight


def _grid(size: int, count: int, mode: str) -> Tensor:
    """`count` points, counted in elements, of a dimension of `size`."""
    steps = torch.arange(count, dtype=torch.float64)
    match mode:
        case "STRICT_ALIGN_CORNERS" | "ALIGN_CORNERS" if count > 1:
            points = steps * ((size - 1) / (count - 1))
        case "ALIGN_CORNERS":
            points = steps + (size - 1) / 2
        case "STRICT_ALIGN_CORNERS":
            points = steps
        case "DEFAULT":
            points = steps * (size / count)
        case "OFFSET_CORNERS":
            delta = max(1.0, size - 1) / count
            points = 0.5 * delta + steps * delta
        case "UNALIGN_CORNERS":
            points = (steps + 0.5) * (size / count) - 0.5
        case _:
            raise ValueError(f"unknown sampling_mode {mode!r}")
    return points.clamp(0, size - 1)


def _bilinear(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    check_elements(*x.shape[:-2], height, width)
    if min(height, width) < 1:
        raise ValueError(f"a size of {height} × {width}")
    for axis, count in ((-2, height), (-1, width)):
        size = x.shape[axis]
        x = _interpolated(x, x.dim() + axis, _grid(size, count, mode))
    return x


@op("upsample_nearest_neighbor", exact=True)
def upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: float = 1, scale_factor_width: float = 1
) -> Tensor:
    return _nearest(
        x, math.floor(x.shape[-2] * scale_factor_height), math.floor(x.shape[-1] * scale_factor_width)
    )


@op("resize_nearest_neighbor", exact=True)
def resize_nearest_neighbor(x: Tensor, target_size_height: int, target_size_width: int) -> Tensor:
    return _nearest(x, target_size_height, target_size_width)


@op("upsample_bilinear")
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: float = 1,
    scale_factor_width: float = 1,
    align_corners: bool = True,
    half_pixel_centers: bool | None = None,
) -> Tensor:
    """`half_pixel_centers`, left out, is the opposite of `align_corners`."""
    halves = not align_corners if half_pixel_centers is None else half_pixel_centers
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if halves else "DEFAULT"
    height = math.floor(x.shape[-2] * scale_factor_height)
    return _bilinear(x, height, math.floor(x.shape[-1] * scale_factor_width), mode)


@op("resize_bilinear")
def resize_bilinear(
    x: Tensor, target_size_height: int = 1, target_size_width: int = 1, sampling_mode: str = "DEFAULT"
) -> Tensor:
    return _bilinear(x, target_size_height, target_size_width, sampling_mode)


@op("resize")
def resize(
    x: Tensor,
    shape: list[int],
    resized_dims: int,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """Resizes the last `resized_dims` dimensions (one or two) to the last sizes of `shape`; 0 keeps one."""
    if resized_dims not in (1, 2) or len(shape) < resized_dims:
        raise ValueError(f"resized_dims is {resized_dims} for the sizes {shape}")
    height, width = [x.shape[-2] if x.dim() > 1 else 1, x.shape[-1]]
    sizes = [
        old if new == 0 else new
        for old, new in zip(x.shape[-resized_dims:], shape[-resized_dims:], strict=True)
    ]
    height, width = sizes if resized_dims == 2 else (height, sizes[0])
    if interpolation_mode == "NEAREST_NEIGHBOR":
        return _nearest(x, height, width)
    if interpolation_mode != "LINEAR":
        raise ValueError(f"unknown interpolation_mode {interpolation_mode!r}")
    return _bilinear(x, height, width, sampling_mode)


_PADDING = {"constant": "zeros", "border": "border"}


@op("resample")
def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    """The input (batch, channels, height, width) at `coordinates` (batch, rows, columns, (x, y))."""
    height, width = x.shape[-2:]
    check_elements(x.shape[0], x.shape[1], *coordinates.shape[1:3])
    grid = coordinates.float()
    if coordinates_mode == "unnormalized":
        # Corners are pixels' centres here, whatever `align_corners` says.
        grid, align_corners = 2 * grid / torch.tensor([max(width - 1, 1), max(height - 1, 1)]) - 1, True
    elif coordinates_mode == "normalized_zero_to_one":
        grid = 2 * grid - 1
    elif coordinates_mode != "normalized_minus_one_to_one":
        raise ValueError(f"unknown coordinates_mode {coordinates_mode!r}")
    mode = {"bilinear": "bilinear", "nearest": "nearest"}[sampling_mode]
    if padding_mode in ("reflection", "symmetric"):
        # PyTorch reflects at the centres of corner pixels or at their edges, as `align_corners` says.
        if (padding_mode == "reflection") != align_corners:
            raise ValueError(f"padding_mode {padding_mode!r} with align_corners {align_corners}")
        return F.grid_sample(x, grid, mode, "reflection", align_corners)
    fill = padding_value if padding_mode == "constant" else 0.0
    return F.grid_sample(x - fill, grid, mode, _PADDING[padding_mode], align_corners) + fill


@op("affine")
def affine(
    x: Tensor,
    transform_matrix: Tensor,
    output_height: int,
    output_width: int,
    sampling_mode: str,
    padding_mode: str,
    padding_value: float,
    coordinates_mode: str,
    align_corners: bool,
) -> Tensor:
    if coordinates_mode != "normalized_minus_one_to_one":
        raise ValueError(f"unknown coordinates_mode {coordinates_mode!r}")
    check_elements(x.shape[0], x.shape[1], output_height, output_width)
    matrices = transform_matrix.float().reshape(-1, 2, 3).expand(x.shape[0], 2, 3)
    grid = F.affine_grid(matrices, [*x.shape[:2], output_height, output_width], align_corners)
    return resample(x, grid, sampling_mode, padding_mode, padding_value, coordinates_mode, align_corners)
