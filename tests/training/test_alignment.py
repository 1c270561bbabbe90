"""The first alignment stage: what it trains, that it resumes to the bit, and that its shortcuts are exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mobilemm.data.processor import MobileMMProcessor
from mobilemm.errors import MobileMMError
from mobilemm.models import MobileMMConfig, MobileMMForConditionalGeneration
from mobilemm.training.alignment import AlignmentRecipe, CaptionLoss, align, read_recipe

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "black": (5, 5, 5)}
WORDS = ["<pad>", "<|im_start|>", "<|im_end|>", "user", "assistant", "what", "is", "it", *COLOURS]


@pytest.fixture
def parts() -> tuple[MobileMMForConditionalGeneration, Any]:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_word_tokenizer(), pad_token="<pad>", eos_token="<|im_end|>"
    )
    torch.manual_seed(0)
    config = MobileMMConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            initializer_range=0.3,  # at the usual 0.02 a random, frozen model says the same to every input
        ),
        template="chatml",
    )
    model = MobileMMForConditionalGeneration(config).eval()
    image_processor = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    return model, MobileMMProcessor(
        image_processor,
        tokenizer,
        num_image_tokens=model.num_image_tokens,
        image_token_id=config.image_token_id,
        template="chatml",
    )


@pytest.fixture
def recipe(tmp_path: Path) -> AlignmentRecipe:
    rows = []
    (tmp_path / "pairs" / "images").mkdir(parents=True)
    for index in range(24):
        colour = list(COLOURS)[index % 4]
        size = (20 + index, 40)
        Image.new("RGB", size, COLOURS[colour]).save(tmp_path / "pairs" / "images" / f"{index}.png")
        rows.append(
            {
                "image": f"images/{index}.png",
                "caption": colour,
                "keywords": [],
                "group": colour,
                "source": "test",
                "license": "public domain",
                "split": "train" if index < 16 else "validation",
            }
        )
    (tmp_path / "pairs" / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return AlignmentRecipe(
        data=tmp_path / "pairs",
        output=tmp_path / "run",
        questions=["what is it", "what it is"],
        warm_start_epochs=1,
        epochs=30,
        batch_size=8,
        learning_rate=1e-2,
        warmup_steps=2,
        save_every=10,
    )


def _word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(WORDS[:3])
    return tokenizer


def test_caption_loss_equals_the_plain_forward_pass(
    parts: tuple[MobileMMForConditionalGeneration, Any],
) -> None:
    model, processor = parts
    picture = Image.new("RGB", (32, 20), (200, 10, 10))
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what it is"}],
        },
        {"role": "assistant", "content": "red"},
    ]
    ids, labels = processor.encode_for_training(messages)
    pixels = processor.image_processor([picture], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(torch.tensor([ids]), pixel_values=pixels, labels=torch.tensor([labels])).loss
        embeds = model.get_image_features(pixels).expand(2, -1, -1)
        losses = CaptionLoss(model, processor)(embeds, ["what it is", "what"], ["red", "green blue"])
    assert losses[:, 1].tolist() == [2, 3]  # the answer's words and the end token
    torch.testing.assert_close(losses[0, 0] / losses[0, 1], expected)


def test_it_learns_only_the_projector_and_names_unseen_pictures(
    parts: tuple[MobileMMForConditionalGeneration, Any], recipe: AlignmentRecipe
) -> None:
    model, processor = parts
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lines: list[str] = []
    path = align(recipe, model, processor, lines.append)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.startswith("projector.")}
    history = json.loads((recipe.output / "history.json").read_text())
    assert history[-1] < 0.5 * history[0]
    assert lines[-1].endswith("validation: 1.000"), lines[-1]
    assert any(line.startswith("warm start: 1 epochs") for line in lines)
    saved = load_file(path)
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.projector.state_dict().items())


def test_an_interrupted_run_ends_with_the_same_weights(
    parts: tuple[MobileMMForConditionalGeneration, Any], recipe: AlignmentRecipe, tmp_path: Path
) -> None:
    model, processor = parts
    start = {name: tensor.clone() for name, tensor in model.projector.state_dict().items()}
    whole = load_file(align(recipe, model, processor, lambda line: None))

    def stop_at_ten(line: str) -> None:
        if line.startswith("step 20/"):
            raise KeyboardInterrupt

    again = recipe.model_copy(update={"output": tmp_path / "again"})
    model.projector.load_state_dict(start)
    with pytest.raises(KeyboardInterrupt):
        align(again, model, processor, stop_at_ten)
    lines: list[str] = []
    model.projector.load_state_dict(start)
    resumed = load_file(align(again, model, processor, lines.append))
    assert "going on from step 10" in lines
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epochs: three", "epochs"),
        ("epoch: 3", "epoch"),
        ("learning_rate: -1", "learning_rate"),
        ("- a list", "YAML mapping"),
        ("a: [", "YAML mapping"),
    ],
)
def test_a_wrong_recipe_names_file_and_key(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "recipe.yaml"
    complete = "data: d\noutput: o\nquestions: [q]\nepochs: 1\nbatch_size: 2\nlearning_rate: 1.0\n"
    key = text.split(":")[0]
    kept = (
        ""
        if text.startswith(("-", "a:"))
        else complete.replace(f"{key}: 1.0\n", "").replace(f"{key}: 1\n", "")
    )
    path.write_text(kept + text + "\n", encoding="utf-8")
    with pytest.raises(MobileMMError, match=named) as error:
        read_recipe(path)
    assert str(path) in str(error.value)


def test_the_shipped_recipe_is_valid() -> None:
    assert read_recipe(Path(__file__).parents[2] / "recipes" / "default" / "alignment.yaml").questions
