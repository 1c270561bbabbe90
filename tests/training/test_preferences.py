"""Preference tuning: the loss is the papers', and it moves unseen pairs as well."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mobilemm
from mobilemm.data.mixture import collate, encode, last_answer
from mobilemm.data.sources import open_source
from mobilemm.errors import MobileMMError
from mobilemm.training.preferences import PreferenceObjective, log_likelihoods
from mobilemm.training.recipe import Preferences, Recipe
from mobilemm.training.stage import train
from tests.training.conftest import COLOURS


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pairs about coloured pictures, to learn from and others to look at."""
    folder = tmp_path_factory.mktemp("preferences")
    draw = random.Random(0)
    paths = []
    for name, count in (("train", 24), ("other", 8)):
        rows = []
        for index in range(count):
            colour, wrong = draw.sample(list(COLOURS), 2)
            size = (draw.randint(20, 60), draw.randint(20, 60))
            Image.new("RGB", size, COLOURS[colour]).save(folder / f"{name}{index}.png")
            messages = [
                {"role": "user", "content": "<image>\nis it red"},
                {"role": "assistant", "content": "yes" if colour == "red" else "no"},
                {"role": "user", "content": "what is it"},
                {"role": "assistant", "content": colour},
            ]
            rows.append({"images": [f"{name}{index}.png"], "messages": messages, "rejected": wrong})
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(rows), encoding="utf-8")
    return paths[0], paths[1]


def _batch(processor: Any, path: Path) -> dict[str, torch.Tensor]:
    """All pairs of a file, put together by hand: chosen answers, then rejected ones."""
    rows = []
    source = open_source("preferences", path)
    samples = [source.sample(index, random.Random(0)) for index in range(len(source))]
    for rejected in (False, True):
        for sample in samples:
            said = sample.rejected if rejected else sample.messages[-1]["content"][0]["text"]
            messages = [*sample.messages[:-1], {"role": "assistant", "content": said}]
            ids, labels = processor.encode_for_training(messages)
            start = (
                max(
                    place
                    for place, label in enumerate(labels)
                    if label == -100 and labels[place + 1 :] and labels[place + 1] != -100
                )
                + 1
            )
            labels = [-100] * start + labels[start:]
            pictures = [Image.open(image) for image in sample.images]  # type: ignore[arg-type]
            pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
            rows.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    return collate(rows)


def _margin(model: Any, reference: Any, processor: Any, path: Path) -> float:
    batch = _batch(processor, path)
    labels = batch.pop("labels")
    with torch.no_grad():
        gains = log_likelihoods(model, batch, labels)[0] - log_likelihoods(reference, batch, labels)[0]
    half = len(gains) // 2
    return (gains[:half] - gains[half:]).mean().item()


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_the_margin_grows_on_unseen_pairs(
    make_recipe: Callable[..., Recipe],
    model_folder: Path,
    preferences: tuple[Path, Path],
    loss: str,
) -> None:
    recipe = make_recipe(
        data=[{"format": "preferences", "path": preferences[0]}],
        preferences={"loss": loss, "beta": 0.5},
        train={"projector": 3e-3, "language_model": {"learning_rate": 3e-3, "method": "lora", "rank": 4}},
        batch_size=8,
        max_steps=40,
        save_every=100,
        log_every=10,
    )
    adapter = train(recipe, lambda line: None)
    model, processor = mobilemm.load(adapter)
    reference, _ = mobilemm.load(model_folder)
    assert _margin(model.eval(), reference.eval(), processor, preferences[1]) > 1
    assert json.loads((recipe.output / "result.json").read_text())["loss"][-1][1] >= 0


def test_losses_by_hand(model_folder: Path, preferences: tuple[Path, Path]) -> None:
    model, processor = mobilemm.load(model_folder)
    batch = _batch(processor, preferences[1])
    start = PreferenceObjective(model, Preferences(beta=0.3))
    assert start(model, batch).item() == pytest.approx(math.log(2), rel=1e-5)  # nothing has moved
    moved = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in moved.projector.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    sums, counts = [], []
    for system in (moved, model):
        for row in range(16):
            inputs = {
                name: batch[name][row : row + 1] for name in ("input_ids", "attention_mask", "pixel_values")
            }
            with torch.no_grad():
                logits = system(**inputs).logits[0, :-1].log_softmax(-1)
            wanted = batch["labels"][row, 1:]
            places = (wanted != -100).nonzero()[:, 0].tolist()
            sums.append(sum(logits[place, wanted[place]].item() for place in places))
            counts.append(len(places))
    gains = [sums[row] - sums[16 + row] for row in range(16)]
    dpo = [math.log1p(math.exp(-0.3 * (gains[row] - gains[8 + row]))) for row in range(8)]
    assert PreferenceObjective(model, Preferences(beta=0.3))(moved, batch).item() == pytest.approx(
        sum(dpo) / 8, rel=1e-4
    )
    ipo = [(gains[row] / counts[row] - gains[8 + row] / counts[8 + row] - 1 / 0.6) ** 2 for row in range(8)]
    assert PreferenceObjective(model, Preferences(beta=0.3, loss="ipo"))(moved, batch).item() == (
        pytest.approx(sum(ipo) / 8, rel=1e-4)
    )
    with_sft = PreferenceObjective(model, Preferences(beta=0.3, sft_weight=0.5))(moved, batch).item()
    sft = [-0.5 * sums[row] / counts[row] for row in range(8)]
    assert with_sft == pytest.approx((sum(dpo) + sum(sft)) / 8, rel=1e-4)


def test_only_the_last_answer_counts(model_folder: Path, preferences: tuple[Path, Path]) -> None:
    _, processor = mobilemm.load(model_folder)
    sample = open_source("preferences", preferences[0]).sample(0, random.Random(0))
    encoded = last_answer(encode(processor, sample, 512))
    learned = [label for label in encoded.labels if label != -100]
    said = sample.messages[-1]["content"][0]["text"]
    assert processor.tokenizer.decode(learned).split() == [said, "<|im_end|>"]


def test_preferences_and_their_data_belong_together(
    make_recipe: Callable[..., Recipe], preferences: tuple[Path, Path]
) -> None:
    with pytest.raises(ValueError, match="learned with the key 'preferences'"):
        make_recipe(data=[{"format": "preferences", "path": preferences[0]}])
    with pytest.raises(ValueError, match="learned with the key 'preferences'"):
        make_recipe(preferences={"loss": "dpo"})


def test_a_row_without_a_rejected_answer(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    (tmp_path / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
    with pytest.raises(MobileMMError, match="no text 'rejected'"):
        open_source("preferences", tmp_path / "rows.json").sample(0, random.Random(0))
