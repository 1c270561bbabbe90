"""Compressed constants in the forms of iOS 16 and iOS 18, and quantized activations."""

from __future__ import annotations

from typing import Any

import numpy as np
from coremltools.converters.mil.mil import types as mil

from tests.export.mil_interpreter.cases import Array, Drawn, case, choice, drawn, normal
from tests.export.mil_interpreter.programs import ct, mb

UNDER_A_BYTE = {
    **{1: mil.np_uint1_dtype, 2: mil.np_uint2_dtype, 3: mil.np_uint3_dtype, 4: mil.np_uint4_dtype},
    **{6: mil.np_uint6_dtype, 8: np.uint8},
}


def times(constant: Any) -> Any:
    """Builds x + constant: so that what is decompressed comes out."""
    return lambda x: mb.add(x=x, y=constant())


def repeated(values: Array, sizes: tuple[int, ...]) -> Array:
    """One value a block, for each element."""
    for axis, size in enumerate(sizes):
        values = np.repeat(values, size // values.shape[axis], axis)
    return values


@case("constexpr_blockwise_shift_scale")
def blockwise(rng: np.random.Generator, number: Any) -> Drawn:
    sizes, blocks = (6, 64), choice(rng, (6, 2), (6, 1), (1, 1), (3, 4), (2, 64))
    bits, signed = int(choice(rng, 4, 8)), bool(rng.random() < 0.5)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    codes = rng.integers(low, high + 1, sizes)
    kind = {
        (4, True): mil.np_int4_dtype,
        (4, False): mil.np_uint4_dtype,
        (8, True): np.int8,
        (8, False): np.uint8,
    }[bits, signed]
    scale = np.abs(normal(rng, number, blocks)) + number(0.125)
    x = np.zeros(sizes, number)
    if rng.random() < 0.5:
        build = times(lambda: mb.constexpr_blockwise_shift_scale(data=codes.astype(kind), scale=scale))
        return drawn(build, x, wanted=codes * repeated(scale.astype(np.float64), sizes))
    offset = rng.integers(low, high + 1, blocks)
    build = times(
        lambda: mb.constexpr_blockwise_shift_scale(
            data=codes.astype(kind), scale=scale, offset=offset.astype(kind)
        )
    )
    wanted = (codes - repeated(offset, sizes)) * repeated(scale.astype(np.float64), sizes)
    return drawn(build, x, wanted=wanted)


@case("constexpr_affine_dequantize", target=ct.target.iOS17)
def affine(rng: np.random.Generator, number: Any) -> Drawn:
    kind = choice(rng, np.int8, np.uint8)
    codes = rng.integers(-128 if kind is np.int8 else 0, 128, (4, 6)).astype(kind)
    axis = int(choice(rng, 0, 1, -1))
    size = codes.shape[axis]
    vector = bool(rng.random() < 0.7)
    scale = np.abs(normal(rng, number, (size,))) + number(0.125) if vector else number(0.5)
    zero = rng.integers(0, 9, size).astype(kind) if vector else kind(3)
    spread = (-1, 1) if axis == 0 else (1, -1)
    offset = zero.astype(np.int64)
    wanted = (codes - (offset.reshape(spread) if vector else offset)) * np.float64(1)
    wanted = wanted * (scale.reshape(spread) if vector else scale)
    build = times(
        lambda: mb.constexpr_affine_dequantize(quantized_data=codes, zero_point=zero, scale=scale, axis=axis)
    )
    return drawn(build, np.zeros((4, 6), number), wanted=wanted)


@case("constexpr_lut_to_dense")
def lookup(rng: np.random.Generator, number: Any) -> Drawn:
    bits, vector = int(choice(rng, *UNDER_A_BYTE)), int(choice(rng, 1, 1, 2, 3))
    sizes, tables = (4, 6), choice(rng, (1, 1), (2, 1), (4, 3))
    codes = rng.integers(0, 1 << bits, sizes)
    lut = normal(rng, number, (*tables, 1 << bits, vector))
    axis = int(choice(rng, 0, 1, -1))
    blocks = np.empty((*sizes, vector), number)
    for i, j in np.ndindex(*sizes):
        blocks[i, j] = lut[i // (4 // tables[0]), j // (6 // tables[1]), codes[i, j]]
    wanted = blocks.transpose(0, 2, 1) if axis == 0 else blocks
    wanted = wanted.reshape((4 * vector, 6) if axis == 0 else (4, 6 * vector))
    more = {} if vector == 1 else {"vector_axis": axis}
    build = times(
        lambda: mb.constexpr_lut_to_dense(indices=codes.astype(UNDER_A_BYTE[bits]), lut=lut, **more)
    )
    return drawn(build, np.zeros(wanted.shape, number), wanted=wanted)


@case("constexpr_lut_to_dense", target=ct.target.iOS16)
def packed_lookup(rng: np.random.Generator, number: Any) -> Drawn:
    bits = int(choice(rng, 1, 2, 4, 6, 8))
    codes = rng.integers(0, 1 << bits, 35)
    lut = normal(rng, number, (1 << bits,))
    planes = (codes[:, None] >> np.arange(bits)) & 1
    packed = np.packbits(planes.reshape(-1).astype(np.uint8), bitorder="little")
    build = times(
        lambda: mb.constexpr_lut_to_dense(indices=packed, lut=lut, shape=np.array([5, 7], np.uint32))
    )
    return drawn(build, np.zeros((5, 7), number), wanted=lut[codes].reshape(5, 7))


@case("constexpr_sparse_to_dense")
def sparse(rng: np.random.Generator, number: Any) -> Drawn:
    mask = rng.random((5, 7)) < 0.4
    mask[0, 0] = True
    wanted = np.where(mask, normal(rng, number, (5, 7)), number(0))
    build = times(
        lambda: mb.constexpr_sparse_to_dense(nonzero_data=wanted[mask], mask=mask.astype(mil.np_uint1_dtype))
    )
    return drawn(build, np.zeros((5, 7), number), wanted=wanted)


@case("constexpr_sparse_to_dense", target=ct.target.iOS16)
def packed_sparse(rng: np.random.Generator, number: Any) -> Drawn:
    mask = rng.random((5, 7)) < 0.4
    mask[0, 0] = True
    wanted = np.where(mask, normal(rng, number, (5, 7)), number(0))
    packed = np.packbits(mask.reshape(-1), bitorder="little")
    build = times(
        lambda: mb.constexpr_sparse_to_dense(
            nonzero_data=wanted[mask], mask=packed, shape=np.array([5, 7], np.uint32)
        )
    )
    return drawn(build, np.zeros((5, 7), number), wanted=wanted)


@case("constexpr_lut_to_sparse")
def sparse_lookup(rng: np.random.Generator, number: Any) -> Drawn:
    mask = rng.random((4, 6)) < 0.6
    mask[0, 0] = True
    codes, lut = rng.integers(0, 4, (4, 6)), normal(rng, number, (2, 1, 4, 1))
    wanted = np.where(mask, lut[np.arange(4)[:, None] // 2, 0, codes, 0], number(0))

    def constant() -> Any:
        kept, values = mb.constexpr_lut_to_sparse(
            indices_mask=mask.astype(mil.np_uint1_dtype),
            indices_nonzero_data=codes[mask].astype(mil.np_uint2_dtype),
            lut=lut,
        )
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=kept)

    return drawn(times(constant), np.zeros((4, 6), number), wanted=wanted)


@case("constexpr_sparse_blockwise_shift_scale")
def sparse_blockwise(rng: np.random.Generator, number: Any) -> Drawn:
    mask = rng.random((4, 6)) < 0.6
    mask[0, 0] = True
    codes, scale = rng.integers(-128, 128, (4, 6)), np.abs(normal(rng, number, (4, 1))) + number(0.125)
    wanted = np.where(mask, codes * scale.astype(np.float64), 0)

    def constant() -> Any:
        kept, values = mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=mask.astype(mil.np_uint1_dtype), nonzero_data=codes[mask].astype(np.int8), scale=scale
        )
        return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=kept)

    return drawn(times(constant), np.zeros((4, 6), number), wanted=wanted)


@case("constexpr_blockwise_shift_scale")
def quantized_table(rng: np.random.Generator, number: Any) -> Drawn:
    """A table of int8 numbers that has scales of its own."""
    codes, lut = rng.integers(0, 16, (4, 6)), rng.integers(-128, 128, (1, 1, 16, 1)).astype(np.int8)
    scale = np.abs(normal(rng, number, (4, 1))) + number(0.125)

    def constant() -> Any:
        dense = mb.constexpr_lut_to_dense(indices=codes.astype(mil.np_uint4_dtype), lut=lut)
        return mb.constexpr_blockwise_shift_scale(data=dense, scale=scale)

    wanted = lut[0, 0, codes, 0] * scale.astype(np.float64)
    return drawn(times(constant), np.zeros((4, 6), number), wanted=wanted)


@case("constexpr_cast", types=("float32",), target=ct.target.iOS17)
def widened(rng: np.random.Generator, number: Any) -> Drawn:
    values = normal(rng, np.float16, (4, 6))
    build = times(lambda: mb.constexpr_cast(source_val=values, output_dtype="fp32"))
    return drawn(build, np.zeros((4, 6), number), wanted=values.astype(np.float32))


@case("quantize", "dequantize")
def activations(rng: np.random.Generator, number: Any, name: str) -> Drawn:
    kind = choice(rng, "int8", "uint8")
    low, high = (-128, 127) if kind == "int8" else (0, 255)
    x, axis = normal(rng, number, (3, 4), 8), int(choice(rng, 0, 1))
    vector = bool(rng.random() < 0.5)
    size = x.shape[axis] if vector else ()
    scale = rng.choice([0.0625, 0.125, 0.25], size).astype(number)
    zero = rng.integers(0, 9, size).astype(kind)
    spread = ((-1, 1) if axis == 0 else (1, -1)) if vector else ()
    steps, offset = scale.astype(np.float64).reshape(spread), zero.astype(np.float64).reshape(spread)
    codes = np.clip(np.round(x / steps) + offset, low, high)
    more = {"axis": axis} if vector else {}

    def build(x: Any) -> Any:
        quantized = mb.quantize(input=x, scale=scale, zero_point=zero, output_dtype=kind, **more)
        if name == "quantize":
            return mb.cast(x=quantized, dtype="int32")
        return mb.dequantize(input=quantized, scale=scale, zero_point=zero, **more)

    return drawn(build, x, wanted=codes if name == "quantize" else (codes - offset) * steps)
