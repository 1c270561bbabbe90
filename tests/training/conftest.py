"""A tiny random model with a tokenizer of words, and picture-answer data that it can learn in seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mobilemm.data.processor import MobileMMProcessor
from mobilemm.models import MobileMMConfig, MobileMMForConditionalGeneration
from mobilemm.models.checkpoints import save
from mobilemm.training.recipe import Recipe

# The last of these does not run: the projector takes the second's output.
LAYERS = {"num_hidden_layers": 3}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "black": (5, 5, 5)}
WORDS = [
    *("<pad>", "<|im_start|>", "<|im_end|>", "user", "assistant", "what", "is", "it", "yes", "no", "and"),
    *COLOURS,
]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_word_tokenizer(), pad_token="<pad>", eos_token="<|im_end|>"
    )
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = MobileMMConfig(
        vision_config=CLIPVisionConfig(**sizes | LAYERS, num_attention_heads=2, image_size=32, patch_size=8),
        text_config=LlamaConfig(
            **sizes,
            vocab_size=len(WORDS),
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=2,
            initializer_range=0.3,  # at the usual 0.02 a random, frozen model says the same to every input
        ),
        template="chatml",
    )
    model = MobileMMForConditionalGeneration(config).eval()
    image_processor = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor = MobileMMProcessor(
        image_processor,
        tokenizer,
        num_image_tokens=model.num_image_tokens,
        image_token_id=config.image_token_id,
        template="chatml",
    )
    return save(model, tmp_path_factory.mktemp("training") / "model", processor)


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 rows in LLaVA's JSON: one picture, two pictures, two turns, text alone."""
    folder = tmp_path_factory.mktemp("conversations")
    rows = []
    for index in range(32):
        names = [list(COLOURS)[index % 4], list(COLOURS)[index // 4 % 4]]
        pictures = []
        for place, name in enumerate(names):
            pictures.append(f"{index}-{place}.png")
            size = (20 + index, 40 + place)
            Image.new("RGB", size, COLOURS[name]).save(folder / pictures[-1])
        kind = index % 4
        if kind == 0:
            turns = [("human", "<image>\nwhat is it"), ("gpt", names[0])]
            pictures = pictures[:1]
        elif kind == 1:
            turns = [("human", "<image>\n<image>\nwhat is it"), ("gpt", " and ".join(names))]
        elif kind == 2:
            turns = [
                ("human", "<image>\nis it red"),
                ("gpt", "no"),
                ("human", "what is it"),
                ("gpt", names[0]),
            ]
            pictures = pictures[:1]
        else:
            turns = [("human", f"what is {names[1]}"), ("gpt", f"it is {names[1]}")]
            pictures = []
        row: dict[str, Any] = {"conversations": [{"from": who, "value": text} for who, text in turns]}
        rows.append(row | ({"image": pictures} if pictures else {}))
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "rows.json"


@pytest.fixture
def make_recipe(model_folder: Path, conversations: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe over these, with other values for some keys."""

    def make(**values: Any) -> Recipe:
        return Recipe.model_validate(
            {
                "model": str(model_folder),
                "output": tmp_path / "run",
                "data": [{"format": "llava", "path": conversations}],
                "train": {"projector": 1e-2},
                "batch_size": 4,
                "max_steps": 4,
                "save_every": 2,
                "show_samples": 0,
                "report_to": [],
            }
            | values
        )

    return make


def _word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[:3])
    return tokenizer
