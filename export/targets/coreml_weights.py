"""Weights as Core ML stores them: a plan's own codes as `constexpr` data, behind PyTorch operators.

A traced graph holds no weights of these operators, only a number by which the converter finds them here. So
the codes that one plan has made for all targets reach the file as they are, and no floating-point copy of a
quantized matrix is made on the way.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.quantization import QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from mobilemm.export.static_quantization import QuantizedConv2d

NAMESPACE = "mobilemm_coreml"


@dataclass(frozen=True, eq=False)
class Weight:
    """One matrix (rows, columns) on its way into a package, in codes or in floating point.

    `name` is the layer's, and begins the names of the constants in the package.
    """

    name: str
    value: QuantizedWeight | Tensor
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        rows, columns = self.value.shape
        return rows, columns

    @property
    def label(self) -> str:
        """The name as MIL takes it."""
        return self.name.replace(".", "_")


_KNOWN: WeakValueDictionary[int, Weight] = WeakValueDictionary()
_NUMBERS = itertools.count()


class _Stored(nn.Module):
    """A module whose weight the converter finds by number for as long as the module lives."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        # While they are traced, diffusers' models ask a tensor of theirs where it is.
        self.register_buffer("place", torch.empty(0), persistent=False)
        self.weight, self.number = weight, next(_NUMBERS)
        _KNOWN[self.number] = weight


class StoredLinear(_Stored):
    """A linear layer. Only good for tracing: it gives zeros.

    Shapes: (…, columns) → (…, rows); with `channels_first` a convolution of one pixel, (batch, columns, 1,
    length) → (batch, rows, 1, length).
    """

    def __init__(self, weight: Weight, channels_first: bool = False) -> None:
        super().__init__(weight)
        self.channels_first = channels_first

    def forward(self, x: Tensor) -> Tensor:
        operator = _operators().pointwise if self.channels_first else _operators().linear
        return operator(x, self.number, self.weight.shape[0])


class StoredEmbedding(_Stored):
    """A table's rows: int32 ids (…) → float16 (…, columns). Only good for tracing: it gives zeros."""

    def forward(self, ids: Tensor) -> Tensor:
        return _operators().rows(ids, self.number, self.weight.shape[1])


class StoredConvolution(_Stored):
    """A convolution over a quantized kernel. Only good for tracing: it gives zeros.

    Shapes: (batch, channels, height, width) → as the convolution's.
    """

    def __init__(self, name: str, convolution: QuantizedConv2d) -> None:
        super().__init__(Weight(name, convolution.quantized, convolution.bias))
        self.kernel, self.groups = list(convolution.kernel), convolution.groups
        self.strides, self.dilations = list(convolution.stride), list(convolution.dilation)
        self.padding = list(convolution.padding)

    def forward(self, x: Tensor) -> Tensor:
        return _operators().convolution(
            x, self.number, self.kernel, self.strides, self.padding, self.dilations, self.groups
        )


class StoredQuantizer(nn.Module):
    """Rounds to int8 codes and back. Only good for tracing: it gives what it takes."""

    def __init__(self, step: float, zero_point: int) -> None:
        super().__init__()
        self.step, self.zero_point = step, zero_point

    def forward(self, x: Tensor) -> Tensor:
        return _operators().rounded(x, self.step, self.zero_point)


def weight_of(name: str, module: nn.Module) -> Weight:
    """What a linear layer or an embedding, quantized or not, holds."""
    if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
        return Weight(name, module.quantized, getattr(module, "bias", None))
    assert isinstance(module, (nn.Linear, nn.Embedding))
    bias = getattr(module, "bias", None)
    return Weight(name, module.weight.detach(), None if bias is None else bias.detach())


# --- blocks as Core ML counts them --------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """A quantized matrix as `constexpr_blockwise_shift_scale` takes it.

    Attributes:
        data: (rows, columns); 4 bit: codes in int8 from -8 to 7, or, with zero points, uint8 from 0 to 15;
            8 bit: int8, or uint8.
        scales: float32 (rows, blocks), each block of columns / blocks columns.
        offsets: uint8 (rows, blocks), or None.
        bits: 4 or 8.
    """

    data: NDArray[Any]
    scales: NDArray[np.float32]
    offsets: NDArray[np.uint8] | None
    bits: int


def blocks_of(weight: QuantizedWeight) -> Blocks:
    """The same codes and scales, without padding.

    Core ML's blocks are of one size and fill the row. Where a plan's do not (576 columns in blocks of 128),
    scales are repeated for blocks of the largest size that divides both.

    Raises MobileMMError for a width that Core ML has not.
    """
    if weight.bits not in (4, 8):
        raise MobileMMError(f"Core ML stores weights in 4 or 8 bits, not {weight.bits}: choose int4 or int8")
    _, columns = weight.shape
    count = weight.scales.shape[1]
    size = columns if count == 1 else math.gcd(weight.block_size, columns)
    codes = weight.codes().flatten(1)[:, :columns]
    scales, offsets = weight.scales.float(), weight.zero_points
    if count > 1 and size != weight.block_size:
        times = weight.block_size // size
        scales = scales.repeat_interleave(times, 1)[:, : columns // size]
        offsets = None if offsets is None else offsets.repeat_interleave(times, 1)[:, : columns // size]
    data = codes.numpy()
    if offsets is None:
        data = (data ^ 128).view(np.int8) if weight.bits == 8 else data.view(np.int8) - 8
    return Blocks(
        np.ascontiguousarray(data),
        np.ascontiguousarray(scales.numpy()),
        None if offsets is None else np.ascontiguousarray(offsets.numpy()),
        weight.bits,
    )


# --- operators and their conversion -------------------------------------------------------------------------


@functools.cache
def _operators() -> Any:
    """The operators, defined and known to coremltools from the first use on."""
    library = torch.library.Library(NAMESPACE, "DEF")
    _LIBRARIES.append(library)
    kernel = "int[] kernel, int[] strides, int[] padding, int[] dilations, int groups"
    for name, arguments, outcome, convert in (
        ("linear", "int number, int size", _linear_shape, _over_weight(_convert_linear)),
        ("pointwise", "int number, int size", _pointwise_shape, _over_weight(_convert_pointwise)),
        ("rows", "int number, int size", _rows_shape, _over_weight(_convert_rows)),
        ("convolution", f"int number, {kernel}", _convolution_shape, _over_weight(_convert_convolution)),
        ("rounded", "float step, int zero_point", _rounded_shape, _convert_rounded),
    ):
        library.define(f"{name}(Tensor x, {arguments}) -> Tensor")
        library.impl(name, outcome, "CPU")
        _register(name, convert)
    return getattr(torch.ops, NAMESPACE)


# An operator is there as long as its library.
_LIBRARIES: list[torch.library.Library] = []


def _linear_shape(x: Tensor, number: int, size: int) -> Tensor:
    return x.new_zeros(*x.shape[:-1], size)


def _pointwise_shape(x: Tensor, number: int, size: int) -> Tensor:
    return x.new_zeros(x.shape[0], size, *x.shape[2:])


def _rows_shape(x: Tensor, number: int, size: int) -> Tensor:
    return torch.zeros(*x.shape, size, dtype=torch.float16)


def _convolution_shape(
    x: Tensor,
    number: int,
    kernel: list[int],
    strides: list[int],
    padding: list[int],
    dilations: list[int],
    groups: int,
) -> Tensor:
    weight = torch.empty(kernel, device="meta")
    found = nn.functional.conv2d(x.to("meta"), weight, None, strides, padding, dilations, groups)
    return x.new_zeros(found.shape)


def _rounded_shape(x: Tensor, step: float, zero_point: int) -> Tensor:
    return x.clone()


def _register(name: str, convert: Any) -> None:
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op

    def converter(context: Any, node: Any) -> None:
        x, *arguments = _get_inputs(context, node)
        context.add(convert(x, *(argument.val for argument in arguments), name=node.name), node.name)

    converter.__name__ = f"{NAMESPACE}_{name}"
    register_torch_op(converter, torch_alias=[f"{NAMESPACE}::{name}"], override=True)


def _over_weight(convert: Any) -> Any:
    """A conversion that is given the weight for its number, and named after it."""

    def converter(x: Any, number: Any, *arguments: Any, name: str) -> Any:
        weight = _KNOWN[int(number)]
        return convert(x, weight, f"{weight.label}_{name}", *arguments)

    return converter


def _convert_linear(x: Any, weight: Weight, name: str, size: int) -> Any:
    from coremltools.converters.mil import Builder as mb

    return mb.linear(x=x, weight=_constant(weight, x.dtype), bias=_bias(weight, x.dtype), name=name)


def _convert_pointwise(x: Any, weight: Weight, name: str, size: int) -> Any:
    from coremltools.converters.mil import Builder as mb

    kernel = _constant(weight, x.dtype, (weight.shape[1], 1, 1))
    return mb.conv(x=x, weight=kernel, bias=_bias(weight, x.dtype), name=name)


def _convert_convolution(
    x: Any, weight: Weight, name: str, kernel: Any, strides: Any, padding: Any, dilations: Any, groups: Any
) -> Any:
    from coremltools.converters.mil import Builder as mb

    return mb.conv(
        x=x,
        weight=_constant(weight, x.dtype, tuple(kernel[1:])),
        bias=_bias(weight, x.dtype),
        strides=strides,
        pad_type="custom",
        pad=np.repeat(padding, 2).astype(np.int32),
        dilations=dilations,
        groups=groups,
        name=name,
    )


def _convert_rounded(x: Any, step: Any, zero_point: Any, name: str) -> Any:
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    scale, zero = types.nptype_from_builtin(x.dtype)(step), np.int8(zero_point)
    codes = mb.quantize(input=x, scale=scale, zero_point=zero, output_dtype="int8")
    return mb.dequantize(input=codes, scale=scale, zero_point=zero, name=name)


def _convert_rows(x: Any, weight: Weight, name: str, size: int) -> Any:
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    return mb.gather(x=_constant(weight, types.fp16), indices=x, axis=0, name=name)


def _bias(weight: Weight, dtype: Any) -> NDArray[Any] | None:
    from coremltools.converters.mil.mil import types

    if weight.bias is None:
        return None
    return weight.bias.float().numpy().astype(types.nptype_from_builtin(dtype))


def _constant(weight: Weight, dtype: Any, row: tuple[int, ...] = ()) -> Any:
    """The matrix as a MIL value of `dtype`, each row in the shape of `row`, if given."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    real = types.nptype_from_builtin(dtype)
    name = f"{weight.label}_weight"

    row = row or weight.shape[1:]
    trailing = (1,) * (len(row) - 1)

    def stored(array: NDArray[Any], kind: Any) -> NDArray[Any]:
        return array.reshape(len(array), *row).astype(kind)

    def by_block(array: NDArray[Any], kind: Any) -> NDArray[Any]:
        return array.reshape(*array.shape, *trailing).astype(kind)

    if isinstance(weight.value, Tensor):
        half = weight.value if dtype == types.fp32 else weight.value.half()
        array = half.float().numpy() if dtype == types.fp32 else half.numpy()
        return mb.const(val=stored(array, real), name=name)
    if (palette := weight.value.palette) is not None:
        codes = weight.value.codes()[:, 0, : weight.shape[1]].numpy()
        kind = types.nptype_from_builtin(types.uint4 if weight.value.bits == 4 else types.uint6)
        table = palette.numpy().reshape(len(palette), 1, *trailing, -1, 1).astype(real)
        return mb.constexpr_lut_to_dense(indices=stored(codes, kind), lut=table, name=name)
    blocks = blocks_of(weight.value)
    scale = by_block(blocks.scales, real)
    signed = blocks.offsets is None
    builtin = {
        (4, True): types.int4,
        (4, False): types.uint4,
        (8, True): types.int8,
        (8, False): types.uint8,
    }
    kind = types.nptype_from_builtin(builtin[blocks.bits, signed])
    offset = {} if blocks.offsets is None else {"offset": by_block(blocks.offsets, kind)}
    data = stored(blocks.data, kind)
    return mb.constexpr_blockwise_shift_scale(data=data, scale=scale, **offset, name=name)
