"""A tiny model with random weights, and a batch of unequal prompts with and without images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedConfig

from mobilemm.models import IMAGE_TOKEN_INDEX, MobileMMConfig, MobileMMForConditionalGeneration

VOCABULARY, WIDTH, SIDE = 50, 32, 32
PLACEHOLDER = VOCABULARY  # the first id behind the vocabulary
IMAGE = IMAGE_TOKEN_INDEX
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# Unequal prompts: one image, two in a row, none, one at the very end.
PROMPTS = [[1, 5, IMAGE, 7, 8], [1, IMAGE, IMAGE, 9], [1, 11, 12, 13, 14, 15, 16], [1, 20, IMAGE]]
IMAGES_PER_PROMPT = [1, 2, 0, 1]


def make_model(text: PreTrainedConfig | None = None, **options: Any) -> MobileMMForConditionalGeneration:
    """A tiny model whose weights are large enough for its answers to hang on every input."""
    torch.manual_seed(0)
    config = MobileMMConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text or LlamaConfig(**TEXT), **options
    )
    model = MobileMMForConditionalGeneration(config)
    randomize(model)
    return model.eval()


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm scales around one, the rest around zero.
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.2)


def pixels(count: int = 4) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def pad_left(rows: list[list[int]]) -> dict[str, Tensor]:
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def expanded(rows: list[list[int]], placeholder: int, count: int) -> list[list[int]]:
    return [[p for i in row for p in ([placeholder] * count if i == IMAGE else [i])] for row in rows]


@pytest.fixture(scope="module")
def model() -> MobileMMForConditionalGeneration:
    return make_model()
