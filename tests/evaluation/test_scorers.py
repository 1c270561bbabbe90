"""A model's likelihoods are those of the plain forward pass; the command writes them down."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mobilemm
from mobilemm.cli import app
from mobilemm.evaluation.scorers import ModelScorer
from tests.export.tiny_checkpoint import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


def test_losses_are_those_of_the_whole_pass(checkpoint: Path) -> None:
    model, processor = mobilemm.load(checkpoint)
    picture = Image.new("RGB", (32, 20), (200, 10, 10))
    choices = ["red", "What is in this picture", "is"]
    expected = []
    for choice in choices:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": choice}]
        ids, labels = processor.encode_for_training(messages)
        pixels = processor.image_processor([picture], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            loss = model(torch.tensor([ids]), pixel_values=pixels, labels=torch.tensor([labels])).loss
        expected.append(loss.item())
    found = ModelScorer(model, processor).losses(picture, "What is this", choices)
    assert found == pytest.approx(expected, rel=1e-5)


def test_text_is_read_in_windows(checkpoint: Path) -> None:
    model, processor = mobilemm.load(checkpoint)
    text = "What is in this picture? " * 12
    ids = torch.tensor([processor.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    total, count, right = ModelScorer(model, processor).text(text)
    assert (total, count) == (pytest.approx(expected, rel=1e-5), ids.shape[1] - 1)
    assert right == int((logits.argmax(-1) == ids[0, 1:]).sum())


def test_the_command_writes_scores(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"{name}.png")
    rows = [
        {"image": "a.png", "choices": ["this", "picture"], "answer": 0},
        {"image": "b.png", "choices": ["this", "picture"], "answer": 1},
    ]
    (tmp_path / "index.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "text.txt").write_text("What is in this picture?", encoding="utf-8")
    arguments = ["eval", str(checkpoint), "--data", str(tmp_path), "--json", str(tmp_path / "score.json")]
    ended = CliRunner().invoke(app, [*arguments, "-t", "multiple-choice", "-t", "perplexity"])
    assert ended.exit_code == 0, ended.output
    choice, perplexity = json.loads((tmp_path / "score.json").read_text())
    assert (choice["task"], choice["samples"]) == ("multiple-choice", 2)
    assert choice["accuracy"] == 0.5  # two equal pictures, each other's answers
    assert math.isfinite(perplexity["figures"]["perplexity"])
    assert choice["model"] == str(checkpoint)
