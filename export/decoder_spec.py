"""What a language model's config says of its decoder, in the few terms that export knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mobilemm.errors import MobileMMError

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "qwen2_5_vl_text", "qwen2_vl_text")
GEMMA_LIKE = ("gemma", "gemma2", "gemma3_text")


@dataclass(frozen=True)
class RopeTable:
    """Frequencies of rotary positions, (head_dim / 2,), and the factor on their cosines and sines."""

    inverse_frequencies: Tensor
    scaling: float


@dataclass(frozen=True)
class LayerSpec:
    """One layer's attention: which rope table it uses (None: no positions), and how far it looks back."""

    rope: int | None
    window: int | None


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder-only transformer with RMS norms, grouped-query attention and a gated MLP.

    Attributes:
        context_length: longest sequence, as far as the rope tables go.
        norm_offset: added to each norm's stored weight (Gemma keeps weight - 1).
        sandwich_norms: a norm behind attention and MLP as well (Gemma 2 and 3).
        embedding_scale: text embeddings are multiplied by it.
        attention_scale: of queries times keys.
        attention_softcap, logit_softcap: c · tanh(x / c), None where there is none.
        mrope_section: how many frequencies follow time, height and width (Qwen-VL), None for plain positions.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    activation: str
    layers: tuple[LayerSpec, ...]
    rope_tables: tuple[RopeTable, ...]
    attention_scale: float
    tied: bool
    norm_offset: float = 0.0
    sandwich_norms: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    mrope_section: tuple[int, ...] | None = None


def decoder_spec(config: Any, context_length: int | None = None) -> DecoderSpec:
    """The spec of transformers' text config; `context_length` cuts it, and with it the rope tables.

    Raises MobileMMError naming the piece that export does not know.
    """
    kind = config.model_type
    if kind not in (*LLAMA_LIKE, *GEMMA_LIKE):
        raise MobileMMError(
            f"language model {kind!r} cannot be exported yet; known: {', '.join((*LLAMA_LIKE, *GEMMA_LIKE))}"
        )
    gemma = kind in GEMMA_LIKE
    for key, plain in (("pretraining_tp", 1), ("use_bidirectional_attention", False), ("num_experts", None)):
        if getattr(config, key, None) not in (None, plain):
            raise MobileMMError(
                f"language model {kind!r}: {key} {getattr(config, key)!r} is unknown to export"
            )
    name = getattr(config, "hidden_activation", None) if gemma else config.hidden_act
    name = name or getattr(config, "hidden_act", None) or "gelu_pytorch_tanh"
    if gemma and name == "gelu":
        name = "gelu_pytorch_tanh"  # as transformers reads Gemma's first configs
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise MobileMMError(
            f"language model {kind!r}: activation {name!r} is unknown to export; known: {known}"
        )
    longest = int(config.max_position_embeddings)
    if context_length is not None and context_length > longest:
        raise MobileMMError(f"context length {context_length}: this language model has {longest} positions")
    length = context_length or longest
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    tables, table_of, sections = _ropes(config, length)
    bias = bool(getattr(config, "attention_bias", False))
    scalar = getattr(config, "query_pre_attn_scalar", None)
    return DecoderSpec(
        model_type=kind,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        context_length=length,
        norm_eps=config.rms_norm_eps,
        activation=ACTIVATIONS[name],
        layers=tuple(_layer(config, index, table_of, length) for index in range(config.num_hidden_layers)),
        rope_tables=tables,
        attention_scale=(scalar or head_dim) ** -0.5,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        norm_offset=1.0 if gemma else 0.0,
        sandwich_norms=kind in ("gemma2", "gemma3_text"),
        qkv_bias=bias or kind.startswith("qwen2"),
        o_bias=bias and not kind.startswith("qwen2"),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=kind in ("qwen3", "gemma3_text"),
        embedding_scale=config.hidden_size**0.5 if gemma else 1.0,
        attention_softcap=getattr(config, "attn_logit_softcapping", None) if kind == "gemma2" else None,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        mrope_section=sections,
    )


def _layer(config: Any, index: int, table_of: dict[str, int], length: int) -> LayerSpec:
    kinds = getattr(config, "layer_types", None)
    kind = kinds[index] if kinds else "full_attention"
    if kind not in ("full_attention", "sliding_attention"):
        raise MobileMMError(f"language model {config.model_type!r}: layers of {kind!r} are unknown to export")
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    slides = kind == "sliding_attention" or (config.model_type == "mistral" and not kinds)
    rope: int | None = table_of.get(kind, 0)
    uses_rope = getattr(config, "no_rope_layers", None)  # SmolLM3: 1 where a layer has positions
    if uses_rope and not uses_rope[index]:
        rope = None
    return LayerSpec(rope, window if slides and window is not None and window < length else None)


def _ropes(config: Any, length: int) -> tuple[tuple[RopeTable, ...], dict[str, int], tuple[int, ...] | None]:
    """Rope tables, which kind of layer uses which, and M-RoPE's sections."""
    parameters = config.rope_parameters
    by_kind = {name: value for name, value in parameters.items() if name.endswith("_attention")}
    if by_kind:
        kinds = [kind for kind, value in by_kind.items() if value is not None]
        tables = tuple(_table(config, by_kind[kind], length, kind) for kind in kinds)
        return tables, {kind: index for index, kind in enumerate(kinds)}, None
    sections = parameters.get("mrope_section")
    return (_table(config, parameters, length, None),), {}, tuple(sections) if sections else None


def _table(config: Any, parameters: dict[str, Any], length: int, kind: str | None) -> RopeTable:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    name = parameters.get("rope_type", "default")
    if parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise MobileMMError(
            f"language model {config.model_type!r}: partial rotary embeddings are unknown to export"
        )
    if name in ("default", "mrope"):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return RopeTable(1.0 / parameters["rope_theta"] ** exponents, 1.0)
    if name not in ("linear", "dynamic", "llama3", "yarn"):
        raise MobileMMError(
            f"language model {config.model_type!r}: rope type {name!r} is unknown to export; known: default,"
            " linear, dynamic, llama3, yarn"
        )
    options = {} if kind is None else {"layer_type": kind}
    # Dynamic scaling grows with the sequence. Keys in a cache cannot be turned anew, so the tables are those
    # of the longest sequence, which are the unscaled ones up to the length of training.
    frequencies, scaling = ROPE_INIT_FUNCTIONS[name](config, torch.device("cpu"), seq_len=length, **options)
    return RopeTable(frequencies.float(), float(scaling))
