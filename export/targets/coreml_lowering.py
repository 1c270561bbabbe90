"""Lowering to Core ML: a decoder step over states, norms that hold in float16, stored weights for layers."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.decoder import (
    Attention,
    Decoder,
    DecoderLayer,
    ResidualNorm,
    RMSNorm,
    Rotary,
    rotate,
)
from mobilemm.export.decoder_spec import RopeTable
from mobilemm.export.parts import TokenEmbedding
from mobilemm.export.quantization import QuantizedEmbedding, QuantizedLinear
from mobilemm.export.static_quantization import ActivationQuantizer, QuantizedConv2d
from mobilemm.export.targets.coreml_weights import (
    StoredConvolution,
    StoredEmbedding,
    StoredLinear,
    StoredQuantizer,
    Weight,
    weight_of,
)

Layout = Literal["gpu", "ane"]

# Added to the scores of positions that are not to be seen: its exponential is zero in float16, and it stays
# finite, so that a row that sees nothing gives no NaN, which would stay in the cache.
UNSEEN = -1e4
STATES = ("k_cache", "v_cache")
# The dimensions of a state that the Neural Engine takes are multiples of it.
STATE_ALIGNMENT = 32
# Numbers that stand for a norm's epsilon, twice: as many keep a row's length a multiple of 32.
FILLING = 16


def lower(module: nn.Module, layout: Layout = "gpu", prefix: str = "") -> nn.Module:
    """Puts what Core ML stores and computes in the places of quantized layers and norms; gives the module.

    Of a `Decoder`, and for the Neural Engine, every linear layer is replaced; else those that are quantized.
    """
    decoder, table = isinstance(module, (Decoder, DecoderLayer)), isinstance(module, TokenEmbedding)
    every = decoder or layout == "ane"
    for name, child in list(module.named_children()):
        path = f"{prefix}{name}"
        if isinstance(child, QuantizedLinear) or (every and type(child) is nn.Linear):
            channels_first = decoder and layout == "ane"
            linear = StoredLinear(weight_of(path, child), channels_first)
            setattr(module, name, _Transposed(linear) if layout == "ane" and not decoder else linear)
        elif isinstance(child, QuantizedConv2d):
            setattr(module, name, StoredConvolution(path, child))
        elif isinstance(child, ActivationQuantizer):
            setattr(module, name, StoredQuantizer(child.step, child.zero_point))
        elif isinstance(child, QuantizedEmbedding) or (table and isinstance(child, nn.Embedding)):
            setattr(module, name, StoredEmbedding(weight_of(path, child)))
        elif isinstance(child, ResidualNorm):
            setattr(module, name, _ResidualNorm(child, layout))
        elif isinstance(child, RMSNorm):
            # Norms of queries and keys lie behind the last dimension in every layout.
            setattr(module, name, rms_norm(child, "gpu" if isinstance(module, Attention) else layout))
        elif type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
            norm: Any = child  # transformers' own, one for each family
            setattr(module, name, _LastDimensionNorm(norm.weight, norm.variance_epsilon))
        else:
            lower(child, layout, f"{path}.")
    return module


# --- the decoder --------------------------------------------------------------------------------------------


class DecoderStep(nn.Module):
    """`length` positions of a conversation, keys and values in states.

    Shapes: `inputs_embeds` float16 (1, length, hidden); `position_ids` int32 (1, length), consecutive: where
    in the cache they are written; with M-RoPE `rope_position_ids` int32 (3, 1, length); where `length` is
    more than 1 `last_index` int32 (1,), whose logits are given → float16 (1, 1, vocabulary).

    Rows behind `last_index` may be anything finite, the last one again for example: what they write is
    written over by the next call, and not seen before. All positions must lie in the buffers, which are
    `buffer_length` long.
    """

    def __init__(
        self,
        decoder: Decoder,
        length: int,
        buffer_length: int,
        layout: Layout,
        states: tuple[str, str] = STATES,
    ) -> None:
        super().__init__()
        spec = decoder.spec
        self.decoder, self.length, self.layout = decoder, length, layout
        self.states = states
        self.sections = spec.mrope_section
        self.group = spec.num_attention_heads // spec.num_key_value_heads
        shape = (spec.num_layers, spec.num_key_value_heads, buffer_length, spec.head_dim)
        for name in states:
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float16))
        for index, table in enumerate(spec.rope_tables):
            for kind, values in zip(("cos", "sin"), rotary_values(table, buffer_length), strict=True):
                name = f"rope_{kind}_{index}"
                self.add_module(name, StoredEmbedding(Weight(name, values)))
        self.register_buffer("columns", torch.arange(buffer_length, dtype=torch.int32)[None])

    @property
    def input_names(self) -> list[str]:
        """The arguments, in order."""
        names = ["inputs_embeds", "position_ids"]
        if self.sections is not None:
            names.append("rope_position_ids")
        return names if self.length == 1 else [*names, "last_index"]

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, *more: Tensor) -> Tensor:
        given = dict(zip(self.input_names[2:], more, strict=True))
        positions = position_ids[0]
        rope = positions[None] if self.sections is None else given["rope_position_ids"][:, 0]
        hidden, residual = self.run(inputs_embeds, positions, rope)
        if self.length > 1:
            axis = 3 if self.layout == "ane" else 1
            hidden = hidden.index_select(axis, given["last_index"])
            residual = residual.index_select(axis, given["last_index"])
        return self.decoder.logits(hidden, residual).reshape(1, 1, -1)

    def run(self, inputs_embeds: Tensor, positions: Tensor, rope_positions: Tensor) -> tuple[Tensor, Tensor]:
        """All layers over all positions: what the head makes logits of, its two summands."""
        rotary = self._rotary(rope_positions)
        windows = {layer.window for layer in self.decoder.spec.layers}
        masks = {window: self._mask(positions, window) for window in sorted(windows, key=str)}
        # coremltools makes float32 of its inputs, and then of all constants, unless the graph says otherwise.
        hidden, residual = inputs_embeds.half(), None
        if self.layout == "ane":
            hidden = hidden.mT[:, :, None]
        for layer in self.decoder.layers:
            assert isinstance(layer, DecoderLayer)
            rope = layer.spec.rope
            cache = StateCache(self, positions[0], masks[layer.spec.window])
            hidden, residual = layer(hidden, residual, cache, None if rope is None else rotary[rope])
        assert residual is not None
        return hidden, residual

    def _rotary(self, positions: Tensor) -> list[Rotary]:
        """Cosines and sines, each (1, length, head_dim / 2), of positions (1 or 3, length)."""
        found = []
        for index in range(len(self.decoder.spec.rope_tables)):
            turned = []
            for table in (getattr(self, f"rope_cos_{index}"), getattr(self, f"rope_sin_{index}")):
                rows = [table(kind) for kind in positions]
                if self.sections is not None:
                    parts = [list(row.split(list(self.sections), -1)) for row in rows]
                    rows = [torch.cat([parts[i % 3][i] for i in range(len(self.sections))], -1)]
                turned.append(rows[0][None])
            cos, sin = turned
            found.append(Rotary(cos, sin, per_token=True))
        return found

    def _mask(self, positions: Tensor, window: int | None) -> Tensor:
        """(1, 1, group · length, buffer): what is added to the scores of a group's queries."""
        rows = torch.cat([positions] * self.group)[:, None]
        columns = self.columns
        assert isinstance(columns, Tensor)
        seen = columns <= rows
        if window is not None:
            seen = seen & (columns > rows - window)
        # Computed, as coremltools would store both sides of a `where` in full.
        return ((seen.half() - 1) * half(-UNSEEN))[None, None]


def rotary_values(table: RopeTable, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the first positions, float16 (length, head_dim / 2), to be stored as they are.

    Phases in float16 are wrong beyond a few hundred positions: only their cosines are rounded.
    """
    angles = torch.outer(torch.arange(length, dtype=torch.float32), table.inverse_frequencies.float())
    return (angles.cos() * table.scaling).half(), (angles.sin() * table.scaling).half()


class StateCache:
    """Keys and values written into a `DecoderStep`'s states from position `start` on."""

    def __init__(self, step: DecoderStep, start: Tensor, mask: Tensor) -> None:
        self.step, self.start, self.mask = step, start, mask

    def attend(self, attention: Attention, qkv: Tensor, rotary: Rotary | None) -> Tensor:
        if attention.key_scale is not None:
            raise MobileMMError("--kv-cache int8 is ONNX's alone: Core ML keeps states in float16")
        if self.step.layout == "ane":
            qkv = qkv.squeeze(2).mT
        q, k, v = attention.split(qkv)
        if rotary is not None:
            q, k = rotate(q, rotary.cos, rotary.sin), rotate(k, rotary.cos, rotary.sin)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        keys, values = self.step.states
        k = self._append(keys, attention.index, k)
        v = self._append(values, attention.index, v)
        # Queries that share keys lie one below the other, so that keys are not repeated for them.
        q = q.reshape(1, attention.kv_heads, -1, attention.head_dim)
        out = self._scaled_dot_product(attention, q, k, v)
        out = out.reshape(1, attention.heads, -1, attention.head_dim).transpose(1, 2).flatten(2)
        return out.mT[:, :, None] if self.step.layout == "ane" else out

    def _append(self, name: str, layer: int, new: Tensor) -> Tensor:
        """Writes (1, kv heads, length, head_dim) into a layer of a state; gives what that then holds."""
        state = getattr(self.step, name)
        # By a slice: coremltools drops what is assigned by a tensor of indices.
        state[layer : layer + 1, :, self.start : self.start + self.step.length] = new
        return state[layer : layer + 1].half()

    def _scaled_dot_product(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = attention.head_dim**-0.5
        if attention.softcap is None and self.step.layout == "gpu":
            # The operator knows one scale only.
            q = q if attention.scale == own else q * half(attention.scale / own)
            return F.scaled_dot_product_attention(q, k, v, self.mask)
        scores = (q * half(attention.scale)) @ k.mT
        if attention.softcap is not None:
            scores = torch.tanh(scores * half(1 / attention.softcap)) * half(attention.softcap)
        return (scores + self.mask).softmax(-1) @ v


def half(value: float) -> Tensor:
    """A constant in float16: by a plain number coremltools makes float32 of what it multiplies."""
    return torch.tensor(value, dtype=torch.float16)


# --- norms --------------------------------------------------------------------------------------------------


def rms_norm(norm: RMSNorm | ResidualNorm, layout: Layout) -> nn.Module:
    """A norm's like that holds in float16, where squares of what is beyond 256 do not."""
    kind = _ChannelNorm if layout == "ane" else _LastDimensionNorm
    return kind(norm.weight, norm.eps)


class _LastDimensionNorm(nn.Module):
    """By the layer norm of [x, c, -x, -c]: its mean is zero, its variance the mean square of x and c.

    coremltools' own RMSNorm divides by the largest value, with an epsilon that is not scaled: NaN for rows of
    zeros, and up to a quarter off for small ones. The constants c stand for epsilon here: as a number of its
    own, 1e-5 or 1e-6, it is subnormal in float16, and where processors take those for zero a row of zeros
    would be NaN.
    """

    flexible = False
    """Whether the number of rows is known only when the program runs."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        size = weight.shape[0]
        self.count = min(FILLING, size)
        # Σx² / size + eps is (Σx² + count c²) / size, of which the layer norm makes a larger row's mean.
        scaled = weight.detach().float() * (size / (size + self.count)) ** 0.5
        self.weight = nn.Parameter(scaled.to(weight.dtype), requires_grad=False)
        self.filling = (eps * size / self.count) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        size = self.weight.shape[0]
        if self.flexible:
            filling = x[..., : self.count] * half(0.0) + half(self.filling)
        else:
            filling = torch.full([*map(int, x.shape[:-1]), self.count], self.filling, dtype=x.dtype)
        normed = F.layer_norm(torch.cat([x, filling, -x, -filling], -1), (2 * (size + self.count),), eps=0.0)
        return normed[..., :size] * self.weight


def allow_any_length(module: nn.Module) -> None:
    """Lets norms take any number of rows, whose constants are otherwise part of the program."""
    for child in module.modules():
        if isinstance(child, _LastDimensionNorm):
            child.flexible = True


class _ChannelNorm(nn.Module):
    """Over dimension 1 of (1, channels, 1, length), scaled by the largest value, and epsilon with it."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone()[:, None, None], requires_grad=False)
        self.root = eps**0.5

    def forward(self, x: Tensor) -> Tensor:
        root = half(self.root)
        largest = torch.maximum(x.abs().amax(1, keepdim=True), root)
        scaled = x / largest
        eps = root / largest
        return scaled * torch.rsqrt((scaled * scaled).mean(1, keepdim=True) + eps * eps) * self.weight


class _ResidualNorm(nn.Module):
    def __init__(self, norm: ResidualNorm, layout: Layout) -> None:
        super().__init__()
        self.norm = rms_norm(norm, layout)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        return self.norm(total), total


class _Transposed(nn.Module):
    """A linear layer of (batch, length, columns) as a convolution."""

    def __init__(self, linear: StoredLinear) -> None:
        super().__init__()
        self.convolution = StoredLinear(linear.weight, channels_first=True)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 3:
            return self.linear(x)
        return self.convolution(x.mT[:, :, None]).squeeze(2).mT
