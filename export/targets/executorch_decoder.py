"""The decoder as ExecuTorch's runners call it: its cache is buffers that ExecuTorch's own operators write."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.decoder import Attention, Decoder, Rotary
from mobilemm.export.memory import untouched_zeros
from mobilemm.export.quantization import QuantizedLinear


class TextDecoder(nn.Module):
    """The decoder as ExecuTorch's runner calls it, keys and values in buffers of `context` positions.

    Shapes: `inputs_embeds` (1, length, hidden), `cache_position` int64 (1,), the first one's position;
    `position_ids` (3, 1, length) with M-RoPE only → logits (1, 1, vocabulary) of the last position.
    """

    turn: Tensor
    ones: Tensor
    zeros: Tensor

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (registers the operators)

        spec = decoder.spec
        self.decoder, self.context = decoder, spec.context_length
        # Heads as a batch, so that what one of them reads lies together: up to 1.4 times as fast.
        shape = (spec.num_key_value_heads, self.context, 1, spec.head_dim)
        attentions = [module for module in decoder.modules() if isinstance(module, Attention)]
        self.int8 = any(attention.key_scale is not None for attention in attentions)
        for index in range(spec.num_layers):
            for kind in ("key", "value"):
                cache = untouched_zeros(shape, torch.int8 if self.int8 else torch.float32)
                self.register_buffer(f"{kind}_{index}", cache)
        if self.int8:
            # A scale and a zero point for each row of a cache are asked for; ours has one step a layer.
            self.register_buffer("ones", torch.ones(*shape[:-1], 1))
            self.register_buffer("zeros", torch.zeros(*shape[:-1], 1, dtype=torch.int8))
        # Tables as they are multiplied with (length, heads, head_dim).
        self.tables = len(spec.rope_tables) if spec.mrope_section is None else 0
        for index in range(self.tables):
            for kind in ("cos", "sin"):
                table = getattr(decoder, f"{kind}_{index}")
                delattr(decoder, f"{kind}_{index}")
                self.register_buffer(f"{kind}_{index}", _doubled(table).contiguous())
        # Rotary embedding turns (a, b) to (-b, a): a matrix, which is delegated where halves of heads are
        # not.
        half = torch.eye(spec.head_dim // 2)
        zero = torch.zeros_like(half)
        self.register_buffer("turn", torch.cat([torch.cat([zero, -half], 1), torch.cat([half, zero], 1)]))

    def forward(
        self, inputs_embeds: Tensor, cache_position: Tensor, position_ids: Tensor | None = None
    ) -> Tensor:
        length = inputs_embeds.shape[1]
        start = cache_position[0].item()
        torch._check_is_size(start)
        torch._check(start < self.context)
        torch._check(start + length <= self.context)
        cache = StaticCache(self, start, length)
        return self.decoder.run(
            inputs_embeds, cache, self._rotary(start, length, position_ids), slice(-1, None)
        )

    def _rotary(self, start: Any, length: Any, position_ids: Tensor | None) -> list[Rotary]:
        """Cosines and sines of these positions, (length, 1, head_dim)."""
        if not self.tables:
            turned = self.decoder.rotary(position_ids)
            return [Rotary(_doubled(one.cos)[0], _doubled(one.sin)[0], per_token=True) for one in turned]
        found = []
        for index in range(self.tables):
            cos, sin = (getattr(self, f"{kind}_{index}").narrow(0, start, length) for kind in ("cos", "sin"))
            found.append(Rotary(cos, sin, per_token=True))
        return found


def _doubled(table: Tensor) -> Tensor:
    """(…, head_dim / 2) → (…, 1, head_dim), for both halves of a head."""
    return torch.cat([table, table], -1)[..., None, :]


class StaticCache:
    """Keys and values written in place by ExecuTorch's own operators, which attend over them as well."""

    def __init__(self, buffers: TextDecoder, start: Any, length: Any) -> None:
        self.buffers, self.start, self.length = buffers, start, length

    def attend(self, attention: Attention, qkv: Any, rotary: Rotary | None) -> Tensor:
        q, k, v = qkv if isinstance(qkv, tuple) else attention.split(qkv)
        if rotary is not None:
            q, k = self._turned(q, rotary), self._turned(k, rotary)
        q, k, v = (self._by_head(part, attention) for part in (q, k, v))
        keys, values = (getattr(self.buffers, f"{kind}_{attention.index}") for kind in ("key", "value"))
        if self.buffers.int8:
            return self._int8(attention, q, k, v, keys, values)
        torch.ops.llama.update_cache(k, keys, self.start)
        torch.ops.llama.update_cache(v, values, self.start)
        if attention.softcap is not None:
            return self._capped(attention, q, keys, values)
        mask = None if attention.window is None else self._mask(attention.window)
        output = torch.ops.llama.custom_sdpa(
            q, keys, values, self.start, mask, 0.0, mask is None, attention.scale
        )
        return self._joined(output, attention)

    def _by_head(self, x: Tensor, attention: Attention) -> Tensor:
        """(1, length, heads, head_dim) → (kv heads, length, heads that share one, head_dim)."""
        shared = x.shape[2] // attention.kv_heads
        return x.view(-1, attention.kv_heads, shared, attention.head_dim).transpose(0, 1)

    def _joined(self, x: Tensor, attention: Attention) -> Tensor:
        """(kv heads, length, heads that share one, head_dim) → (1, length, heads · head_dim)."""
        # Not `reshape`, which asks for a length by name, and is not delegated.
        return x.transpose(0, 1).contiguous().view(1, -1, attention.heads * attention.head_dim)

    def _int8(
        self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Over keys and values in int8; queries become int8 as well, each with a step of its own."""
        if attention.softcap is not None:
            raise MobileMMError(
                "--kv-cache int8 with capped attention scores is not possible with --target executorch"
            )
        import executorch.kernels.quantized  # noqa: F401 (registers the operators)
        import torch.ao.quantization.fx._decomposed

        ops, buffers = torch.ops.quantized_decomposed, self.buffers
        assert attention.key_scale is not None
        assert attention.value_scale is not None
        key_step, value_step = float(attention.key_scale), float(attention.value_scale)
        for numbers, step, cache in ((k, key_step, keys), (v, value_step, values)):
            codes = ops.quantize_per_tensor(numbers, step, 0, -128, 127, torch.int8)
            torch.ops.llama.update_cache(codes, cache, self.start)
        q = q * key_step  # scores are of the keys themselves, not of their codes
        scales, zero_points = ops.choose_qparams_per_token_asymmetric(q, torch.int8)
        queries = ops.quantize_per_token(q, scales, zero_points, -128, 127, torch.int8)
        mask = None if attention.window is None else self._mask(attention.window)
        output = torch.ops.llama.custom_quantized_sdpa(
            *(queries, keys, values, self.start, mask, 0.0, mask is None, attention.scale),
            *(zero_points.to(torch.int8), scales.to(torch.float32)),
            *(buffers.zeros, buffers.ones, buffers.zeros, buffers.ones),
        )
        return self._joined(output, attention) * value_step

    def _turned(self, x: Tensor, rotary: Rotary) -> Tensor:
        """As `rotate`."""
        return x * rotary.cos + F.linear(x, self.buffers.turn) * rotary.sin

    def _mask(self, window: int | None) -> Tensor:
        """0 where a position sees another, -inf elsewhere: (length, context)."""
        rows = torch.arange(self.length)[:, None] + self.start
        columns = torch.arange(self.buffers.context)[None]
        seen = columns <= rows
        if window is not None:
            seen = seen & (columns > rows - window)
        return torch.where(seen, 0.0, float("-inf"))

    def _capped(self, attention: Attention, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention with capped scores, for which there is no operator."""
        q, k, v = (part.transpose(1, 2) for part in (q, keys, values))
        scores = q @ k.transpose(2, 3) * attention.scale
        assert attention.softcap is not None
        scores = torch.tanh(scores / attention.softcap) * attention.softcap + self._mask(attention.window)
        return self._joined((scores.softmax(-1) @ v).transpose(1, 2), attention)


class Heads(nn.Module):
    """A layer's packed projection as three, since what cuts its output in pieces is not delegated.

    Shapes: (1, length, hidden) → queries (1, length, heads, head_dim), keys and values (…, kv heads,
    head_dim), normed as `Attention.split` does.
    """

    def __init__(self, qkv: nn.Module, attention: Attention) -> None:
        super().__init__()
        self.head_dim = attention.head_dim
        self.counts = (attention.heads, attention.kv_heads, attention.kv_heads)
        ends = [self.head_dim * sum(self.counts[: index + 1]) for index in range(3)]
        starts = (0, *ends)
        self.projections = nn.ModuleList(
            output_rows(qkv, slice(start, end)) for start, end in zip(starts, ends, strict=False)
        )
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        attention.q_norm = attention.k_norm = None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        flat = [project(x) for project in self.projections]
        q, k, v = (
            one.view(1, -1, count, self.head_dim) for one, count in zip(flat, self.counts, strict=True)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


def output_rows(linear: nn.Module, rows: slice) -> nn.Module:
    """The layer that gives these of its outputs."""
    assert isinstance(linear, nn.Linear | QuantizedLinear)
    bias = None if linear.bias is None else linear.bias[rows]
    count = rows.stop - rows.start
    if isinstance(linear, QuantizedLinear):
        weight = replace(
            linear.quantized,
            packed=linear.packed[rows],
            scales=linear.scales[rows],
            zero_points=None if linear.zero_points is None else linear.zero_points[rows],
            shape=(count, linear.in_features),
        )
        return QuantizedLinear(weight, bias)
    part = nn.Linear(linear.in_features, count, bias is not None, device="meta")
    part.weight = nn.Parameter(linear.weight[rows], requires_grad=False)
    if bias is not None:
        part.bias = nn.Parameter(bias, requires_grad=False)
    return part
