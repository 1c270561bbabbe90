"""A tiny random model of MobileVLM V2's make in a folder: CLIP, LDPv2, LLaMA, and a tokenizer of letters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from mobilemm.models import MobileMMConfig, MobileMMForConditionalGeneration
from mobilemm.models.checkpoints.parts import make_processor
from tests.runtime.conftest import llama_tokenizer

LICENSE = "Do as you like, and be kind.\n"


def write_checkpoint(folder: Path, tied: bool = False, padding: int = 0) -> Path:
    """Pictures of 32 × 32 pixels become 4 tokens; the context is 512 tokens.

    With `padding` the vocabulary has so many rows more than the tokenizer, and they always score best.
    """
    tokenizer = llama_tokenizer("▁What", "▁is", "▁in", "▁this", "▁picture")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = MobileMMConfig(
        vision_config=CLIPVisionConfig(**sizes, num_attention_heads=4, image_size=32, patch_size=8),
        text_config=LlamaConfig(
            **sizes,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tokenizer) + padding,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.3,
            tie_word_embeddings=tied,
        ),
        projector={"type": "ldpnetv2"},
        template="v1",
    )
    model = MobileMMForConditionalGeneration(config).eval()
    if not tied:  # a random model's bytes are no UTF-8: it says letters and words
        with torch.no_grad():
            model.get_output_embeddings().weight[2:259] = 0
            model.get_output_embeddings().weight[len(tokenizer) :] *= 10
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    make_processor(model, tokenizer, [0.5] * 3, [0.5] * 3).save_pretrained(folder)
    (folder / "LICENSE").write_text(LICENSE)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    return folder
