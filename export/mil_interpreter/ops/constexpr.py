"""Compressed constants, and the quantization of activations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mobilemm.export.mil_interpreter.ops import LARGEST_CONSTANT, check_elements, op


def _blockwise(data: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """scale · (data − offset), one scale and offset for each block, without copies of them."""
    if data.dim() != scale.dim() or any(
        blocks == 0 or size % blocks for size, blocks in zip(data.shape, scale.shape, strict=True)
    ):
        raise ValueError(f"scales of {tuple(scale.shape)} for data of {tuple(data.shape)}")
    if offset is not None and offset.shape != scale.shape:
        raise ValueError(f"offsets of {tuple(offset.shape)} beside scales of {tuple(scale.shape)}")
    inner = [
        part
        for size, blocks in zip(data.shape, scale.shape, strict=True)
        for part in (blocks, size // blocks)
    ]
    outer = [part for blocks in scale.shape for part in (blocks, 1)]
    codes, scales = data.reshape(inner), scale.float().reshape(outer)
    if offset is None:
        return (codes * scales).reshape(data.shape)
    return (codes - offset.float().reshape(outer)).mul_(scales).reshape(data.shape)


def _looked_up(indices: Tensor, lut: Tensor, vector_axis: int | None) -> Tensor:
    """Elements of tables (one a block: …, entries, vector) in the places of their indices."""
    rank = indices.dim()
    if lut.dim() != rank + 2 or any(
        tables == 0 or size % tables for size, tables in zip(indices.shape, lut.shape, strict=False)
    ):
        raise ValueError(f"tables of {tuple(lut.shape)} for indices of {tuple(indices.shape)}")
    entries, vector = lut.shape[-2:]
    check_elements(indices.numel(), vector, most=LARGEST_CONSTANT)
    tables = lut.reshape(-1, entries, vector)
    table = torch.arange(len(tables), dtype=torch.int32).reshape(lut.shape[:rank])
    for axis, size in enumerate(indices.shape):
        table = table.repeat_interleave(size // table.shape[axis], axis)
    if int(indices.max() if indices.numel() else 0) >= entries:
        raise ValueError(f"an index beyond a table of {entries} entries")
    places = table.mul_(entries).add_(indices)
    values = tables.reshape(-1, vector)[places]
    if vector_axis is None:
        if vector != 1:
            raise ValueError("vector_axis is missing")
        return values[..., 0]
    axis = vector_axis % rank
    shape = list(indices.shape)
    shape[axis] *= vector
    return values.movedim(-1, axis + 1).reshape(shape)


def _dense(nonzero_data: Tensor, mask: Tensor) -> Tensor:
    keep = mask != 0
    if int(keep.sum()) != nonzero_data.numel():
        raise ValueError(f"{nonzero_data.numel()} elements for {int(keep.sum())} places of the mask")
    dense = torch.zeros(mask.shape, dtype=nonzero_data.dtype)
    dense[keep] = nonzero_data.reshape(-1)
    return dense


def _packed(data: Tensor, bits: int, shape: list[int]) -> Tensor:
    """Codes of `bits` bits, packed into bytes lowest bits first, as iOS 16 has them."""
    check_elements(*shape, most=LARGEST_CONSTANT)
    count = int(np.prod(shape, dtype=np.int64))
    if data.numel() != -(-count * bits // 8):
        raise ValueError(f"{data.numel()} bytes for a shape of {shape}")
    planes = np.unpackbits(data.numpy(), bitorder="little")[: count * bits].reshape(count, bits)
    codes = np.packbits(planes, axis=1, bitorder="little")[:, 0]
    return torch.from_numpy(codes).reshape(shape)


@op("constexpr_blockwise_shift_scale")
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    return _blockwise(data, scale, offset)


@op("constexpr_affine_dequantize")
def constexpr_affine_dequantize(
    quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: int
) -> Tensor:
    return _affine(quantized_data, scale, zero_point, axis)


@op("constexpr_lut_to_dense", exact=True)
def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, vector_axis: int | None = None, shape: list[int] | None = None
) -> Tensor:
    if shape is not None:
        bits = max(lut.numel() - 1, 1).bit_length()
        if lut.dim() != 1 or lut.numel() != 1 << bits or bits > 8:
            raise ValueError(f"a table of {tuple(lut.shape)}")
        return lut[_packed(indices, bits, shape).int()]
    return _looked_up(indices, lut, vector_axis)


@op("constexpr_sparse_to_dense", exact=True)
def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: list[int] | None = None) -> Tensor:
    return _dense(nonzero_data, mask if shape is None else _packed(mask, 1, shape))


@op("constexpr_lut_to_sparse", exact=True)
def constexpr_lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: int | None = None
) -> tuple[Tensor, Tensor]:
    dense = _looked_up(_dense(indices_nonzero_data, indices_mask), lut, vector_axis)
    mask = indices_mask
    if vector_axis is not None:
        mask = mask.repeat_interleave(lut.shape[-1], vector_axis)
    return mask, dense[mask != 0]


@op("constexpr_sparse_blockwise_shift_scale")
def constexpr_sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dense = _blockwise(_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask != 0]


@op("constexpr_cast", exact=True)
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    return source_val


def _along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """A scalar as it is; a vector laid along `axis`, whose size it must have."""
    if values.dim() == 0 or (axis is None and values.numel() == 1):
        return values.reshape(()).float()
    if axis is None or values.dim() != 1 or values.shape[0] != x.shape[axis]:
        raise ValueError(f"scales of {tuple(values.shape)} along axis {axis} of {tuple(x.shape)}")
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.float().reshape(shape)


def _affine(x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None) -> Tensor:
    values = x.float() if zero_point is None else x.float() - _along(zero_point, x, axis)
    return values * _along(scale, x, axis)


@op("quantize", exact=True)
def quantize(
    input: Tensor,
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | None = None,
    axis: int | None = None,
) -> Tensor:
    low, high = {"int8": (-128, 127), "uint8": (0, 255)}[output_dtype]
    codes = torch.round(input / _along(scale, input, axis))
    if zero_point is not None:
        codes = codes + _along(zero_point, input, axis)
    return codes.clamp(low, high).to(torch.int8 if low else torch.uint8)


@op("dequantize")
def dequantize(
    input: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None
) -> Tensor:
    return _affine(input, scale, zero_point, axis)
