"""Bundles, one of them with a decoder of some milliseconds a token: a loop's own cost is small beside it."""

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
    return random_bundle(tmp_path_factory.mktemp("bench") / "a bundle", 512, 8)


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of 0.4 M parameters, in a folder that shells stumble over."""
    return random_bundle(tmp_path_factory.mktemp("bench") / 'it\'s a "small" $bundle', 128, 2)


def random_bundle(folder: Path, hidden_size: int, layers: int) -> Path:
    """Of a language model of that size."""
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
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
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
    return write_bundle(model, processor, folder)
