"""Lowering to ONNX: modules that emit onnxruntime's operators in the places of quantized layers and norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.decoder import DecoderLayer, ResidualNorm, RMSNorm
from mobilemm.export.quantization import QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from mobilemm.export.static_quantization import QuantizedConv2d

# Symbolic operators give zeros outside an export: a lowered module is only good for exporting.
OPS = torch.onnx.ops
CONTRIB = "com.microsoft::"


@dataclass(frozen=True)
class OnnxOptions:
    """How parts become ONNX.

    Attributes:
        opset: of the decoder and the embedding; vision keeps to 20, at which every operator of convolutional
            encoders has a kernel.
        standard_ops: no contrib operators; the cache is then concatenated, not shared.
        accuracy_level: of MatMulNBits; 4 computes with activations in int8, 1 in float32.
        ort_format: `NAME.ort` beside each file.
    """

    opset: int = 21
    vision_opset: int = 20
    standard_ops: bool = False
    accuracy_level: int = 4
    ort_format: bool = False


def lower(module: nn.Module, options: OnnxOptions) -> nn.Module:
    """Puts modules that emit ONNX operators in the places of quantized layers and norms."""
    for name, child in list(module.named_children()):
        replacement = _lowered(child, options)
        if replacement is not None:
            setattr(module, name, replacement)
        else:
            lower(child, options)
    return module


def fuse_gate_up(layer: DecoderLayer) -> None:
    """One product for gate and up where both are stored alike: their rows one below the other."""
    gate, up = layer.gate, layer.up
    if not isinstance(gate, QuantizedLinear) or not isinstance(up, QuantizedLinear):
        return
    zero = (gate.zero_points, up.zero_points)
    if (gate.bits, gate.block_size) != (up.bits, up.block_size) or (zero[0] is None) != (zero[1] is None):
        return
    rows, columns = gate.out_features + up.out_features, gate.in_features
    weight = QuantizedWeight(
        torch.cat([gate.packed, up.packed]),
        torch.cat([gate.scales, up.scales]),
        None if zero[0] is None or zero[1] is None else torch.cat([zero[0], zero[1]]),
        gate.bits,
        gate.block_size,
        (rows, columns),
    )
    bias = None if gate.bias is None or up.bias is None else torch.cat([gate.bias, up.bias])
    layer.gate, layer.up = QuantizedLinear(weight, bias), None


def _lowered(module: nn.Module, options: OnnxOptions) -> nn.Module | None:
    if isinstance(module, QuantizedConv2d):
        return _DequantizedConv2d(module)
    if isinstance(module, QuantizedLinear):
        if options.standard_ops:
            return _DequantizedLinear(module)
        whole_row = module.block_size >= module.in_features and module.bits == 8
        whole_row &= options.accuracy_level == 4  # at others activations are left alone
        return _DynamicInt8Linear(module) if whole_row else _MatMulNBits(module, options.accuracy_level)
    if isinstance(module, QuantizedEmbedding):
        return _DequantizedEmbedding(module) if options.standard_ops else _GatherBlockQuantized(module)
    if options.standard_ops:
        return None
    if isinstance(module, ResidualNorm):
        return _SkipSimplifiedLayerNorm(module)
    if isinstance(module, RMSNorm):
        return _SimplifiedLayerNorm(module)
    return None


class _SimplifiedLayerNorm(nn.Module):
    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return _simplified_layer_norm(x, self.weight, self.eps)


class _SkipSimplifiedLayerNorm(nn.Module):
    def __init__(self, norm: ResidualNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            return _simplified_layer_norm(x, self.weight, self.eps), x
        per_row = (*x.shape[:-1], 1)
        normed, _, _, total = OPS.symbolic_multi_out(
            f"{CONTRIB}SkipSimplifiedLayerNormalization",
            [x, residual, self.weight],
            {"epsilon": self.eps},
            dtypes=[x.dtype, torch.float32, torch.float32, x.dtype],
            shapes=[x.shape, per_row, per_row, x.shape],
            version=1,
        )
        return normed, total


def _simplified_layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # onnxruntime registers this operator of its own in the standard's domain.
    attributes: dict[str, Any] = {"epsilon": eps, "axis": -1, "stash_type": 1}
    return OPS.symbolic("SimplifiedLayerNormalization", [x, weight], attributes, dtype=x.dtype, shape=x.shape)


class _MatMulNBits(nn.Module):
    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bias: Tensor | None

    def __init__(self, linear: QuantizedLinear, accuracy_level: int) -> None:
        super().__init__()
        _require_stored(linear)
        self.register_buffer("packed", linear.packed)
        self.register_buffer("scales", linear.scales)
        self.register_buffer("zero_points", _packed_zero_points(linear))
        self.register_buffer("bias", linear.bias)
        self.rows, self.columns = linear.out_features, linear.in_features
        self.attributes: dict[str, Any] = {
            "K": self.columns,
            "N": self.rows,
            "bits": linear.bits,
            "block_size": linear.block_size,
            "accuracy_level": accuracy_level,
        }

    def forward(self, x: Tensor) -> Tensor:
        inputs: list[Tensor | None] = [x, self.packed, self.scales, self.zero_points, None, self.bias]
        while inputs[-1] is None:
            inputs.pop()
        shape = (*x.shape[:-1], self.rows)
        return OPS.symbolic(
            f"{CONTRIB}MatMulNBits", inputs, self.attributes, dtype=x.dtype, shape=shape, version=1
        )


class _DynamicInt8Linear(nn.Module):
    """Weights int8 per row, activations quantized to uint8 at each run."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        codes = linear.quantized.codes()[:, 0, : linear.in_features]
        zero = 128 if linear.zero_points is None else linear.zero_points
        self.register_buffer("weight", (codes.to(torch.int16) - zero).to(torch.int8).T.contiguous())
        self.register_buffer("scales", linear.scales[:, 0].contiguous())
        self.register_buffer("bias", linear.bias)
        self.rows = linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        return OPS.symbolic(
            f"{CONTRIB}DynamicQuantizeMatMul",
            [x, self.weight, self.scales, None, *([] if self.bias is None else [self.bias])],
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.rows),
            version=1,
        )


class _GatherBlockQuantized(nn.Module):
    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        _require_stored(embedding)
        # The same bytes as a head's MatMulNBits, so that a tied table is stored once: rows are padded.
        self.register_buffer("packed", embedding.packed.flatten(1))
        self.register_buffer("scales", embedding.scales)
        self.register_buffer("zero_points", _packed_zero_points(embedding))
        self.width = embedding.embedding_dim
        self.padded = embedding.packed.shape[1] * embedding.block_size
        self.attributes: dict[str, Any] = {
            "bits": embedding.bits,
            "block_size": embedding.block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }

    def forward(self, ids: Tensor) -> Tensor:
        zero_points = [] if self.zero_points is None else [self.zero_points]
        rows = OPS.symbolic(
            f"{CONTRIB}GatherBlockQuantized",
            [self.packed, ids, self.scales, *zero_points],
            self.attributes,
            dtype=torch.float32,
            shape=(*ids.shape, self.padded),
            version=1,
        )
        return rows[..., : self.width] if self.padded != self.width else rows


class _DequantizedLinear(nn.Module):
    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.table = _BlockDequantize(linear)
        self.register_buffer("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.table().T
        return product if self.bias is None else product + self.bias


class _DequantizedConv2d(nn.Module):
    bias: Tensor | None

    def __init__(self, convolution: QuantizedConv2d) -> None:
        super().__init__()
        self.kernel = _BlockDequantize(convolution)
        self.shape = convolution.kernel
        made = convolution
        self.geometry = (made.stride, made.padding, made.dilation, made.groups)
        self.register_buffer("bias", convolution.bias)

    @property
    def weight(self) -> Tensor:
        """A tensor of the dtype that it computes in: models ask for no more."""
        return self.kernel.scales

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.kernel().view(self.shape), self.bias, *self.geometry)


class _DequantizedEmbedding(nn.Module):
    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        self.table = _BlockDequantize(embedding)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.table())


class _BlockDequantize(nn.Module):
    """A quantized table by ONNX's DequantizeLinear, eight bits a code: in blocks from opset 21 on."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor

    def __init__(self, module: QuantizedLinear | QuantizedEmbedding | QuantizedConv2d) -> None:
        super().__init__()
        weight = module.quantized
        columns = weight.shape[1]
        self.register_buffer("codes", weight.codes().flatten(1)[:, :columns].contiguous())
        zero = weight.zero_points
        if zero is None:
            zero = torch.full(weight.scales.shape, 2 ** (weight.bits - 1), dtype=torch.uint8)
        whole_rows = weight.scales.shape[1] == 1
        self.register_buffer("scales", weight.scales[:, 0] if whole_rows else weight.scales)
        self.register_buffer("zero_points", zero[:, 0] if whole_rows else zero)
        self.shape = weight.shape
        self.attributes: dict[str, Any] = (
            {"axis": 0} if whole_rows else {"axis": 1, "block_size": weight.block_size}
        )

    def forward(self) -> Tensor:
        return OPS.symbolic(
            "DequantizeLinear",
            [self.codes, self.scales, self.zero_points],
            self.attributes,
            dtype=torch.float32,
            shape=self.shape,
        )


def dequantizes_blocks(module: nn.Module) -> bool:
    """Whether there is a DequantizeLinear as only opset 21 has it."""
    return any(
        isinstance(child, _BlockDequantize) and "block_size" in child.attributes for child in module.modules()
    )


def _require_stored(module: QuantizedLinear | QuantizedEmbedding) -> None:
    if module.bits not in (4, 8):
        raise MobileMMError(f"ONNX stores weights in 4 or 8 bits, not {module.bits}: choose int4 or int8")


def _packed_zero_points(module: QuantizedLinear | QuantizedEmbedding) -> Tensor | None:
    """Zero points in the codes' own width: two a byte along the blocks for 4 bit."""
    zero = module.zero_points
    if zero is None or module.bits == 8:
        return zero
    if zero.shape[1] % 2:
        zero = nn.functional.pad(zero, (0, 1))
    return (zero[:, 0::2] | (zero[:, 1::2] << 4)).contiguous()
