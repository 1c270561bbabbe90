"""A tiny decoder with random weights, and inputs as unevenly spread as those of trained models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from mobilemm.export.decoder import Decoder
from mobilemm.export.decoder_spec import decoder_spec


@pytest.fixture
def tiny() -> tuple[Decoder, dict[str, Tensor], Tensor]:
    """A decoder of two layers on the meta device, its weights, and input embeddings (8, 48, 96)."""
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=120,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    spec = decoder_spec(config)
    with torch.device("meta"):
        decoder = Decoder(spec)
    generator = torch.Generator().manual_seed(5)
    weights: dict[str, Tensor] = {}
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 1:
            weights[name] = 0.5 + torch.rand(parameter.shape, generator=generator)
            weights[name][::11] *= 5
        else:
            weights[name] = (
                torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[1] ** 0.5
            )
    mixing = torch.randn(12, 96, generator=generator)
    embeddings = torch.randn(8, 48, 12, generator=generator) @ mixing
    return decoder, weights, embeddings + 0.2 * torch.randn(embeddings.shape, generator=generator)
