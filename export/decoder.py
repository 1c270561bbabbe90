"""The decoder, written once for export. How keys and values are kept is what the target hands in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.decoder_spec import DecoderSpec, LayerSpec
from mobilemm.export.memory import page_out


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of rotary positions, rotating a head's first half against its second.

    Shapes: (positions, head_dim / 2), a table to be looked up by position; or, with `per_token`, (batch,
    length, head_dim / 2), already those of each token.
    """

    cos: Tensor
    sin: Tensor
    per_token: bool = False


class Cache(Protocol):
    """A target's way of keeping keys and values."""

    def attend(self, attention: Attention, qkv: Tensor, rotary: Rotary | None) -> Tensor:
        """Attention's output; keys and values are appended to the cache.

        Shapes: packed queries, keys and values (batch, length, (heads + 2 · kv heads) · head_dim), before
        rotation → (batch, length, heads · head_dim).
        """


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class ResidualNorm(nn.Module):
    """Adds a block's output to the residual stream: x, residual → norm(x + residual), x + residual."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        return F.rms_norm(total, (total.shape[-1],), self.weight, self.eps), total


class Attention(nn.Module):
    """The facts of one layer's attention, and its norms of queries and keys; a `Cache` does the rest."""

    def __init__(self, spec: DecoderSpec, index: int) -> None:
        super().__init__()
        self.index = index
        self.heads, self.kv_heads = spec.num_attention_heads, spec.num_key_value_heads
        self.head_dim = spec.head_dim
        self.scale = spec.attention_scale
        self.softcap = spec.attention_softcap
        self.window = spec.layers[index].window
        # Steps of an int8 cache, one each for all keys and all values of the layer: (1,) float32.
        self.key_scale: Tensor | None = None
        self.value_scale: Tensor | None = None
        self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps) if spec.qk_norm else None

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Packed → normed queries (batch, length, heads, head_dim), keys, values (…, kv heads, head_dim)."""
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv.split(sizes, -1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class DecoderLayer(nn.Module):
    """Attention and gated MLP. Takes and gives the residual stream in two pieces, yet to be added."""

    def __init__(self, spec: DecoderSpec, index: int) -> None:
        super().__init__()
        hidden, heads = spec.hidden_size, spec.num_attention_heads
        packed = (heads + 2 * spec.num_key_value_heads) * spec.head_dim
        self.spec: LayerSpec = spec.layers[index]
        self.activation = spec.activation
        self.input_norm = ResidualNorm(hidden, spec.norm_eps)
        self.qkv = nn.Linear(hidden, packed, bias=spec.qkv_bias)
        self.attention = Attention(spec, index)
        self.o = nn.Linear(heads * spec.head_dim, hidden, bias=spec.o_bias)
        self.mlp_norm = ResidualNorm(hidden, spec.norm_eps)
        self.gate = nn.Linear(hidden, spec.intermediate_size, bias=spec.mlp_bias)
        # A target may put one module that gives both in the place of `gate`, and None here.
        self.up: nn.Module | None = nn.Linear(hidden, spec.intermediate_size, bias=spec.mlp_bias)
        self.down = nn.Linear(spec.intermediate_size, hidden, bias=spec.mlp_bias)
        sandwich = spec.sandwich_norms
        self.attention_post_norm = RMSNorm(hidden, spec.norm_eps) if sandwich else None
        self.mlp_post_norm = RMSNorm(hidden, spec.norm_eps) if sandwich else None

    def forward(
        self, hidden: Tensor, residual: Tensor | None, cache: Cache, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        """(batch, length, hidden) twice → the same; their sum is the residual stream."""
        normed, residual = self.input_norm(hidden, residual)
        attended = self.o(cache.attend(self.attention, self.qkv(normed), rotary))
        if self.attention_post_norm is not None:
            attended = self.attention_post_norm(attended)
        normed, residual = self.mlp_norm(attended, residual)
        gate = self.gate(normed)
        if self.up is None:
            gate, up = gate.chunk(2, -1)
        else:
            up = self.up(normed)
        output = self.down(_activate(gate, self.activation) * up)
        if self.mlp_post_norm is not None:
            output = self.mlp_post_norm(output)
        return output, residual


class Decoder(nn.Module):
    """Embeddings in, logits out, for every language model that `DecoderSpec` can describe.

    Built on the meta device it takes no memory; `DecoderWeights` holds what belongs into it.
    """

    spec: DecoderSpec
    frequencies: Tensor

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleList(DecoderLayer(spec, index) for index in range(spec.num_layers))
        self.norm = ResidualNorm(spec.hidden_size, spec.norm_eps)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        # Tables are facts of the spec, not weights: they are there even when the rest lies on meta.
        with torch.device("cpu"):
            positions = torch.arange(spec.context_length, dtype=torch.float32)
            for index, table in enumerate(spec.rope_tables):
                if spec.mrope_section is None:
                    angles = torch.outer(positions, table.inverse_frequencies)
                    self.register_buffer(f"cos_{index}", angles.cos() * table.scaling, persistent=False)
                    self.register_buffer(f"sin_{index}", angles.sin() * table.scaling, persistent=False)
                else:
                    self.register_buffer("frequencies", table.inverse_frequencies.clone(), persistent=False)

    def forward(
        self,
        inputs_embeds: Tensor,
        cache: Cache,
        position_ids: Tensor | None = None,
        logits_positions: Tensor | None = None,
    ) -> Tensor:
        """(batch, length, hidden) → logits (batch, n, vocabulary).

        Args:
            position_ids: (3, batch, length), only with M-RoPE; other positions are counted by the cache.
            logits_positions: (n,) which positions' logits are wanted, -1 the last; None for all.
        """
        return self.run(inputs_embeds, cache, self.rotary(position_ids), logits_positions)

    def run(
        self,
        inputs_embeds: Tensor,
        cache: Cache,
        rotary: Sequence[Rotary],
        logits_positions: Tensor | slice | None = None,
    ) -> Tensor:
        """As `forward`, with the cosines and sines that `cache` turns by, one for each rope table."""
        return self.logits(*self._through_layers(inputs_embeds, cache, rotary), logits_positions)

    def states(self, inputs_embeds: Tensor, cache: Cache, rotary: Sequence[Rotary]) -> Tensor:
        """Last hidden states (batch, length, hidden), as the head reads them."""
        normed: Tensor = self.norm(*self._through_layers(inputs_embeds, cache, rotary))[0]
        return normed

    def _through_layers(
        self, hidden: Tensor, cache: Cache, rotary: Sequence[Rotary]
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream behind the last layer, in two pieces."""
        residual: Tensor | None = None
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            rope = layer.spec.rope
            hidden, residual = layer(hidden, residual, cache, None if rope is None else rotary[rope])
        return hidden, residual

    def logits(
        self, hidden: Tensor, residual: Tensor | None, logits_positions: Tensor | slice | None = None
    ) -> Tensor:
        """The last layer's output → logits, at the positions asked for."""
        normed, _ = self.norm(hidden, residual)
        if logits_positions is not None:
            normed = take_positions(normed, logits_positions)
        logits = self.lm_head(normed)
        if (cap := self.spec.logit_softcap) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def rotary(self, position_ids: Tensor | None = None) -> list[Rotary]:
        """The rope tables, or with M-RoPE the cosines and sines of these positions (3, batch, length)."""
        sections = self.spec.mrope_section
        if sections is None:
            count = len(self.spec.rope_tables)
            return [Rotary(getattr(self, f"cos_{i}"), getattr(self, f"sin_{i}")) for i in range(count)]
        if position_ids is None:
            raise MobileMMError("this decoder counts positions in three dimensions: position_ids are needed")
        angles = position_ids[..., None].float() * self.frequencies
        # Section by section the frequencies follow time, height and width.
        angles = torch.cat([part[i % 3] for i, part in enumerate(angles.split(list(sections), -1))], -1)
        scaling = self.spec.rope_tables[0].scaling
        return [Rotary(angles.cos() * scaling, angles.sin() * scaling, per_token=True)]


def take_positions(hidden: Tensor, positions: Tensor | slice) -> Tensor:
    """(batch, length, hidden), (n,) → (batch, n, hidden); negative positions count from the end."""
    if isinstance(positions, Tensor) and torch.onnx.is_in_onnx_export():
        # ONNX's Gather counts from the end by itself; PyTorch's index would export to more nodes.
        shape = (hidden.shape[0], positions.shape[0], hidden.shape[2])
        return torch.onnx.ops.symbolic(
            "Gather", [hidden, positions], {"axis": 1}, dtype=hidden.dtype, shape=shape
        )
    return hidden[:, positions]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(batch, length, heads, head_dim) turned by (batch or 1, length, head_dim / 2)."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class EagerCache:
    """The reference: keys and values concatenated, PyTorch's attention. One row, or rows of equal length."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def repeated(self, rows: int) -> EagerCache:
        """One row's cache as that of several rows which begin like it; the original stays as it is."""
        copies = EagerCache()
        copies.keys = {index: keys.expand(rows, -1, -1, -1) for index, keys in self.keys.items()}
        copies.values = {index: values.expand(rows, -1, -1, -1) for index, values in self.values.items()}
        return copies

    def attend(self, attention: Attention, qkv: Tensor, rotary: Rotary | None) -> Tensor:
        q, k, v = attention.split(qkv)
        past = self.keys[attention.index].shape[1] if attention.index in self.keys else 0
        if rotary is not None:
            cos, sin = rotary.cos, rotary.sin
            if not rotary.per_token:
                cos, sin = (table[None, past : past + q.shape[1]] for table in (cos, sin))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = _rounded(k, attention.key_scale), _rounded(v, attention.value_scale)
        if past:
            k = torch.cat([self.keys[attention.index], k], 1)
            v = torch.cat([self.values[attention.index], v], 1)
        self.keys[attention.index], self.values[attention.index] = k, v
        return scaled_dot_product(attention, q, k, v, past)


def scaled_dot_product(attention: Attention, q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
    """Causal attention of queries at positions past, past + 1, … over all keys, within the layer's window.

    Shapes: (batch, length, heads, head_dim), keys and values (batch, past + length, kv heads, head_dim).
    """
    length, total = q.shape[1], k.shape[1]
    rows = torch.arange(past, past + length)[:, None]
    columns = torch.arange(total)[None]
    seen = columns <= rows
    if attention.window is not None:
        seen &= columns > rows - attention.window
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    if attention.softcap is None:
        grouped = attention.heads != attention.kv_heads
        out = F.scaled_dot_product_attention(q, k, v, seen, scale=attention.scale, enable_gqa=grouped)
    else:
        k, v = (part.repeat_interleave(attention.heads // attention.kv_heads, 1) for part in (k, v))
        scores = q @ k.mT * attention.scale
        scores = torch.tanh(scores / attention.softcap) * attention.softcap
        out = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2)


class DecoderWeights(Mapping[str, Tensor]):
    """A `Decoder`'s parameters out of a language model's tensors, each made when asked for.

    Tensors that are fused here (queries, keys, values) are concatenated; Gemma's norm offset is added. Values
    are in the checkpoint's dtype, and those that need no work are the checkpoint's own tensors.

    Raises MobileMMError for a tensor that the checkpoint has not, or one of another shape.
    """

    def __init__(self, spec: DecoderSpec, tensors: Mapping[str, Tensor]) -> None:
        self.spec, self.tensors = spec, tensors
        with torch.device("meta"):
            self.shapes = {name: value.shape for name, value in Decoder(spec).named_parameters()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        sources = self.sources(name)
        for source in sources:
            if source not in self.tensors:
                raise MobileMMError(f"language model {self.spec.model_type!r}: tensor {source!r} is missing")
        found = [self.tensors[source] for source in sources]
        tensor = found[0]
        if len(found) > 1:
            tensor = torch.cat(found)
            for part in found:
                page_out(part)
        if tensor.shape != self.shapes[name]:
            raise MobileMMError(
                f"language model {self.spec.model_type!r}: tensor {sources[0]!r} has the shape"
                f" {tuple(tensor.shape)}; {tuple(self.shapes[name])} is expected"
            )
        return tensor.float() + self.spec.norm_offset if "norm" in name and self.spec.norm_offset else tensor

    def sources(self, name: str) -> list[str]:
        """The names, in the checkpoint, of what makes up one parameter."""
        if name == "lm_head.weight":
            return ["model.embed_tokens.weight" if self.spec.tied else name]
        if name == "norm.weight":
            return ["model.norm.weight"]
        _, index, *path = name.split(".")
        layer, kind = f"model.layers.{index}", path[-1]
        match path[:-1]:
            case ["qkv"]:
                return [f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            case ["o"]:
                return [f"{layer}.self_attn.o_proj.{kind}"]
            case ["gate" | "up" | "down" as part]:
                return [f"{layer}.mlp.{part}_proj.{kind}"]
            case ["attention", "q_norm" | "k_norm" as part]:
                return [f"{layer}.self_attn.{part}.{kind}"]
            case ["input_norm"]:
                return [f"{layer}.input_layernorm.{kind}"]
            case ["mlp_norm"]:
                sandwich = self.spec.sandwich_norms
                return [f"{layer}.{'pre_feedforward' if sandwich else 'post_attention'}_layernorm.{kind}"]
            case ["attention_post_norm"]:
                return [f"{layer}.post_attention_layernorm.{kind}"]
            case ["mlp_post_norm"]:
                return [f"{layer}.post_feedforward_layernorm.{kind}"]
        raise KeyError(name)


def _rounded(x: Tensor, scale: Tensor | None) -> Tensor:
    """What an int8 cache keeps of it."""
    return x if scale is None else (x / scale).round().clamp(-128, 127) * scale


def _activate(x: Tensor, name: str) -> Tensor:
    if name == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
