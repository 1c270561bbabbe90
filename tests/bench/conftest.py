"""A bundle whose decoder takes some milliseconds a token, so that a loop's own cost is small beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from mobilemm.models import MobileMMConfig, MobileMMForConditionalGeneration
from mobilemm.models.checkpoints.parts import make_processor
from tests.runtime.bundles import write_bundle
from tests.runtime.conftest import llama_tokenizer


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP → LDPv2 (4 image tokens) → LLaMA of 25 M parameters, random, as ONNX in float32."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    tokenizer = llama_tokenizer("▁What", "▁is", "▁this", "▁a", "▁line")
    config = MobileMMConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        template="v1",
    )
    model = MobileMMForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = 2
    processor = make_processor(model, tokenizer, [0.5] * 3, [0.5] * 3)
    return write_bundle(model, processor, tmp_path_factory.mktemp("bench") / "a bundle")
