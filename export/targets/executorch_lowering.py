"""Lowering to ExecuTorch: modules in the forms that XNNPACK's delegate takes whole.

XNNPACK has no layer norm, no fused attention, and computes a GELU by tanh as one by erf: each is written here
in operators that it has. Quantized layers become the patterns that it recognizes, with the plan's own codes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mobilemm.errors import MobileMMError
from mobilemm.export.decoder import DecoderLayer, ResidualNorm, RMSNorm
from mobilemm.export.memory import page_out, untouched_zeros
from mobilemm.export.quantization import QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from mobilemm.export.targets.executorch_decoder import Heads

# Columns that share a scale, in XNNPACK's 4-bit kernels: multiples of this.
GROUP = 32
PAD = torch.ops.aten.pad.default


def lower(module: nn.Module, *, delegated: bool) -> nn.Module:
    """Puts modules that ExecuTorch can express in the places of quantized layers and norms.

    Args:
        delegated: to XNNPACK; otherwise linear layers are dequantized, for which alone there are kernels.
    """
    for name, child in list(module.named_children()):
        replacement = _lowered(child, delegated)
        if replacement is not None:
            setattr(module, name, replacement)
        else:
            lower(child, delegated=delegated)
    return module


def _lowered(module: nn.Module, delegated: bool) -> nn.Module | None:
    if isinstance(module, QuantizedLinear):
        return DynamicLinear(module) if delegated else _dequantized(module)
    if isinstance(module, QuantizedEmbedding):
        return CodedEmbedding(module)
    if not delegated:
        return None
    if isinstance(module, DecoderLayer):
        module.qkv = Heads(module.qkv, module.attention)  # type: ignore[assignment]
        return None
    if isinstance(module, RMSNorm):
        return LinearRMSNorm(module.weight, module.eps)
    if isinstance(module, ResidualNorm):
        return LinearResidualNorm(module.weight, module.eps)
    if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
        return LinearLayerNorm(module)
    if type(module) is nn.GroupNorm:
        return LinearGroupNorm(module)
    # Over channels: those of timm, and of MobileVLM V1.
    if isinstance(module, nn.LayerNorm) and type(module).__name__ in ("LayerNorm2d", "ChannelLayerNorm"):
        return ChannelLayerNorm(module)
    eps = getattr(module, "variance_epsilon", None)  # of transformers' many classes of this make
    if type(module).__name__.endswith("RMSNorm") and isinstance(eps, float):
        assert isinstance(module.weight, Tensor)
        return LinearRMSNorm(module.weight, eps)
    return None


# --- norms --------------------------------------------------------------------------------------------------


class _Mean(nn.Module):
    """The mean over the last dimension as a matrix product, which is delegated where a reduction is not."""

    ones: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("ones", torch.full((1, size), 1 / size))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.ones)


class LinearRMSNorm(nn.Module):
    """`RMSNorm`, its mean a matrix product."""

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps
        self.mean = _Mean(len(weight))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(self.mean(x * x) + self.eps) * self.weight


class LinearResidualNorm(LinearRMSNorm):
    """`ResidualNorm`, its mean a matrix product."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        total = x if residual is None else x + residual
        return super().forward(total), total


class LinearLayerNorm(nn.Module):
    """`nn.LayerNorm` over the last dimension, its means matrix products."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.mean = _Mean(norm.normalized_shape[0])

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_contiguous():  # what a layer norm gives always is
            x = x.contiguous()
        centred = x - self.mean(x)
        normed = centred * torch.rsqrt(self.mean(centred * centred) + self.eps)
        if self.weight is not None:
            normed = normed * self.weight
        return normed if self.bias is None else normed + self.bias


class LinearGroupNorm(nn.Module):
    """`nn.GroupNorm` of (n, channels, …), its means matrix products. It is run once before it is exported."""

    ones: Tensor | None

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("ones", None)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(x.shape[0], self.groups, -1)
        if self.ones is None:
            self.ones = torch.full((1, rows.shape[2]), 1 / rows.shape[2])
        centred = rows - F.linear(rows, self.ones)
        normed = centred * torch.rsqrt(F.linear(centred * centred, self.ones) + self.eps)
        normed = normed.reshape(x.shape)
        if self.weight is None:
            return normed
        shape = (1, -1, *[1] * (x.ndim - 2))
        return normed * self.weight.view(shape) + self.bias.view(shape)


class ChannelLayerNorm(LinearLayerNorm):
    """The same over the channels of (batch, channels, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# --- quantized layers ---------------------------------------------------------------------------------------


def express(module: nn.Module) -> nn.Module:
    """Changes quantized linear layers into ones that XNNPACK can hold, as near to the plan's as may be.

    Raises MobileMMError for those that it cannot come near.
    """
    for name, child in list(module.named_modules()):
        if isinstance(child, QuantizedLinear):
            module.set_submodule(name, QuantizedLinear(expressible(child.quantized), child.bias))
            page_out(child.packed)
    return module


def expressible(weight: QuantizedWeight) -> QuantizedWeight:
    """A weight in XNNPACK's terms: 4 bits in groups, or 8 with a scale a row; no scale is below zero.

    4-bit groups are multiples of 32 that divide the row: a block of 128 over 576 columns becomes two of 64
    with the same scale. Their scales are rounded to bfloat16. 8-bit codes in blocks are rounded once more to
    a scale a row.
    """
    columns = weight.shape[1]
    if weight.bits not in (4, 8):
        raise MobileMMError(
            f"ExecuTorch stores weights in 4 or 8 bits, not {weight.bits}: choose int4 or int8"
        )
    if weight.zero_points is not None:
        raise MobileMMError("XNNPACK's linear layers have no zero points: leave --asymmetric out")
    if weight.bits == 8:
        codes, scales = weight.codes().to(torch.int16) - 128, weight.scales
        if scales.shape[1] > 1:
            values = weight.dequantize()
            scales = values.abs().amax(1, keepdim=True) / 127
            codes = (values / torch.where(scales == 0, 1.0, scales)).round().to(torch.int16)[:, None]
        codes, scales = _positive(codes, scales, 8)
        return QuantizedWeight.from_codes((codes + 128).to(torch.uint8), scales, None, 8, columns)
    one = weight.scales.shape[1] == 1
    if weight.block_size % GROUP and not one:
        raise MobileMMError(
            f"XNNPACK's 4-bit weights share a scale in groups of {GROUP} and its multiples, not"
            f" {weight.block_size}: --block-size {GROUP}"
        )
    codes, scales = _positive(weight.codes().to(torch.int16) - 8, weight.scales, 4)
    # At least two groups: XNNPACK takes a single one for a scale a row, which its 4-bit kernels have not.
    padded = max(math.ceil(columns / GROUP), 2) * GROUP
    block = padded if one else weight.block_size
    group = math.gcd(block, padded)
    group = group if group < padded else GROUP
    codes, scales = codes.flatten(1), scales.repeat_interleave(block, 1)
    codes = F.pad(codes, (0, max(0, padded - codes.shape[1])))[:, :padded]
    scales = F.pad(scales, (0, max(0, padded - scales.shape[1])), value=1.0)[:, :padded:group]
    codes = (codes + 8).to(torch.uint8).unflatten(1, (-1, group))
    return QuantizedWeight.from_codes(codes, scales.bfloat16().float(), None, 4, columns)


def _positive(codes: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The same weights with scales above zero: codes int16 (rows, blocks, block size), scales (rows, blocks).

    A negative scale is there because the codes reach one further below zero than above. The code at that end
    has no counterpart: it is cut off by one, or the block's scale is widened and its codes rounded once more,
    whichever has the smaller squared error.
    """
    most = 2 ** (bits - 1) - 1
    negative = scales < 0
    flipped = -codes[negative].float()
    best = flipped.clamp(max=most)
    error = (best - flipped).square().sum(-1)
    factor = torch.ones_like(error)
    for wider in (1 + 0.5 / most, 1 + 1 / most):
        tried = (flipped / wider).round().clamp(max=most)
        other = (tried * wider - flipped).square().sum(-1)
        better = other < error
        error, factor = torch.where(better, other, error), torch.where(better, wider, factor)
        best = torch.where(better[..., None], tried, best)
    codes, scales = codes.clone(), scales.abs()
    codes[negative] = best.to(torch.int16)
    scales[negative] *= factor
    # A block of zeros has the scale 0.
    return codes, torch.where(scales > 0, scales, 1.0)


class DynamicLinear(nn.Module):
    """A linear layer over an expressible weight; activations become int8, row by row, at each run.

    Written in the operators that XNNPACK's partitioner recognizes.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    bias: Tensor | None

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        import torch.ao.quantization.fx._decomposed

        codes, scales = _signed(linear.quantized.codes(), linear.bits), linear.scales
        self.bits, self.group = linear.bits, codes.shape[1] // scales.shape[1]
        if self.bits == 8:
            codes, scales = codes[:, : linear.in_features].contiguous(), scales[:, 0].clone()
        self.padding = codes.shape[1] - linear.in_features
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", untouched_zeros(scales.shape, torch.int64))
        self.register_buffer("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.ops.quantized_decomposed
        if self.padding:
            x = F.pad(x, (0, self.padding))
        scales, zero_points = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
        x = ops.quantize_per_token(x, scales, zero_points, -128, 127, torch.int8)
        x = ops.dequantize_per_token(x, scales, zero_points, -128, 127, torch.int8, torch.float32)
        weight = (self.codes, self.scales, self.zero_points)
        if self.bits == 4:
            values = ops.dequantize_per_channel_group(*weight, -8, 7, torch.int8, self.group, torch.float32)
        else:
            values = ops.dequantize_per_channel(*weight, 0, -128, 127, torch.int8)
        return F.linear(x, values, self.bias)


def quantize_once(graph: torch.fx.Graph) -> None:
    """Lets linear layers over one input share its quantization: queries, keys, values; gate and up."""
    found: dict[Any, torch.fx.Node] = {}
    for node in list(graph.nodes):
        name = str(node.target)
        if node.op == "call_function" and ("_per_token" in name or node.target in (operator.getitem, PAD)):
            first = found.setdefault((node.target, node.args), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _signed(codes: Tensor, bits: int) -> Tensor:
    """uint8 (rows, blocks, block size), zero in the middle → int8 (rows, blocks · block size)."""
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8).flatten(1)


def _dequantized(linear: QuantizedLinear) -> nn.Linear:
    plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    plain.weight = nn.Parameter(linear.quantized.dequantize(), requires_grad=False)
    if linear.bias is not None:
        plain.bias = nn.Parameter(linear.bias, requires_grad=False)
    return plain


class CodedEmbedding(nn.Module):
    """A look-up in the plan's codes, by ExecuTorch's own kernels for 4 and 8 bits."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        weight = embedding.quantized
        columns = weight.shape[1]
        if weight.bits not in (4, 8):
            raise MobileMMError(
                f"ExecuTorch stores weights in 4 or 8 bits, not {weight.bits}: choose int4 or int8"
            )
        # Groups divide the row; a shorter last block shares its scale with the one that it is cut out of.
        group = columns if weight.scales.shape[1] == 1 else math.gcd(weight.block_size, columns)
        codes = _signed(weight.codes(), weight.bits)[:, :columns]
        self.width = columns
        if weight.bits == 4:
            if columns % 2:
                raise MobileMMError(f"an embedding of {columns} columns has no 4-bit kernel: --q-embed int8")
            biased = (codes + 8).to(torch.uint8)
            codes = (biased[:, 0::2] << 4) | biased[:, 1::2]
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scales", _by_group(weight.scales, weight.block_size, group, columns))
        zero = None
        if weight.zero_points is not None:
            shifted = (weight.zero_points.to(torch.int16) - 2 ** (weight.bits - 1)).float()
            zero = _by_group(shifted, weight.block_size, group, columns)
        self.register_buffer("zero_points", zero)
        self.bits = weight.bits

    def forward(self, ids: Tensor) -> Tensor:
        import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401 (registers the operators)

        ops = torch.ops.quantized_decomposed
        look_up = ops.embedding_4bit.dtype if self.bits == 4 else ops.embedding_byte.dtype
        least, most = (-8, 7) if self.bits == 4 else (-128, 127)
        return look_up(self.codes, self.scales, self.zero_points, least, most, ids, dtype=torch.float32)


def _by_group(values: Tensor, block: int, group: int, columns: int) -> Tensor:
    """(rows, blocks) → (rows, columns / group), each group with its block's value."""
    return values.repeat_interleave(block, 1)[:, :columns:group].contiguous()


# --- functions ----------------------------------------------------------------------------------------------


class DelegatedForms(TorchFunctionMode):
    """Within it, PyTorch's functions that XNNPACK lacks, or gets wrong, are made of those that it has."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        form = FORMS.get(func)
        return (form or func)(*args, **(kwargs or {}))


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU; by tanh as x · sigmoid(√(8/π) · (x + 0.044715 x³)), which is the same function."""
    if approximate == "none":
        return torch.ops.aten.gelu.default(x)
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` in three steps; heads are the batch of both products.

    Shapes: (batch, heads, length, head_dim). A row of the mask that sees nothing gives NaN, as the formula
    does.
    """
    if is_causal or enable_gqa:
        raise MobileMMError("causal and grouped attention of an encoder are unknown to --target executorch")
    batch, heads, _, width = query.shape
    scale = width**-0.5 if scale is None else scale
    q, k, v = ((query * scale).flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1))
    scores = torch.bmm(q, k.transpose(1, 2))
    if attn_mask is not None:
        scores = scores.unflatten(0, (batch, heads))
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask
        scores = scores.flatten(0, 1)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (batch, heads))


def normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    """`F.normalize` over the last dimension, its sum of squares a matrix product."""
    if p != 2.0 or dim not in (-1, x.ndim - 1):
        raise MobileMMError(
            "vectors are made of length 1 over their last dimension alone, by --target executorch"
        )
    squares = F.linear(x * x, x.new_ones(1, x.shape[-1]))
    return x * torch.rsqrt(squares + eps**2)


FORMS: Mapping[Any, Callable[..., Tensor]] = {
    F.gelu: gelu,
    F.normalize: normalize,
    F.scaled_dot_product_attention: attention,
}
