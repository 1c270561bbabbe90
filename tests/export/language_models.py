"""Tiny language models of every kind that export knows, with random weights, as transformers runs them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from mobilemm.export.decoder_spec import DecoderSpec, decoder_spec

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 256,
}
STRETCHED: dict[str, Any] = {"rope_theta": 10_000.0, "original_max_position_embeddings": 64}

# What there is beyond the sizes. The last layers of mixed kinds differ from the first ones.
LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_biases_tied": (
        "LlamaConfig",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "rope_linear": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
    ),
    "rope_dynamic": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}},
    ),
    "rope_llama3": (
        "LlamaConfig",
        {
            "rope_parameters": {
                **STRETCHED,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ),
    "rope_yarn": ("LlamaConfig", {"rope_parameters": {**STRETCHED, "rope_type": "yarn", "factor": 4.0}}),
    "mistral_window": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"attention_bias": True}),
    "smollm3": (
        "SmolLM3Config",
        {"no_rope_layer_interval": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1},
    ),
    "gemma": ("GemmaConfig", {}),
    "gemma2": (
        "Gemma2Config",
        {"sliding_window": 9, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 20.0},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def config_of(name: str, **changes: Any) -> Any:
    kind, options = LANGUAGE_MODELS[name]
    return getattr(transformers, kind)(**{**SIZES, **options, **changes})


def random_language_model(config: Any) -> Any:
    """transformers' causal LM, all weights and biases drawn anew: initial zeros and ones would hide them."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


@torch.no_grad()
def prompt_and_logits(model: Any, length: int = 40) -> tuple[DecoderSpec, Tensor, Tensor]:
    """The spec, random tokens' input embeddings (1, length, hidden), and transformers' logits."""
    spec = decoder_spec(model.config)
    ids = torch.randint(0, spec.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    table = model.get_input_embeddings().weight
    return spec, table[ids] * spec.embedding_scale, model(ids).logits
