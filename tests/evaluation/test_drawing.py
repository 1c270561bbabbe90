"""The drawing score: its ranking by hand, the scorer on real pictures, and a generator that draws nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mobilemm.errors import MobileMMError
from mobilemm.evaluation.drawing import DrawingScorer, draw, evaluate_drawings, ranked
from mobilemm.generation.generator import load_generator
from mobilemm.generation.sampling import UnrolledGenerator
from mobilemm.runtime.noise import normal
from tests.generation.tiny_generator import write_generator


def test_a_name_counts_when_at_most_four_of_forty_nine_are_likelier() -> None:
    cosines = torch.zeros(2, 50)
    cosines[0, 7] = 0.5
    cosines[0, :4] = 0.9
    cosines[1, 7] = 0.5
    cosines[1, :5] = 0.9
    assert ranked(cosines, [7, 7]).tolist() == [True, False]
    # What all names share tells none of them apart.
    assert not ranked(torch.zeros(1, 50), [7]).any()


def test_chance_is_a_tenth() -> None:
    cosines = torch.randn(4000, 80, generator=torch.Generator().manual_seed(0))
    assert ranked(cosines, [row % 80 for row in range(4000)]).mean() == pytest.approx(0.1, abs=0.015)


@pytest.fixture(scope="module")
def scorer() -> DrawingScorer:
    return DrawingScorer()


def test_the_scorer_knows_real_drawings_by_name(scorer: DrawingScorer) -> None:
    """The drawings that ship for questions: names that the scorer was not fitted on are told above chance."""
    folder = Path("mobilemm/evaluation/held_out")
    rows = json.loads((folder / "index.json").read_text())
    pictures, choices = [], []
    for row in rows:
        image = Image.open(folder / row["image"]).convert("RGB").resize((224, 224))
        pictures.append(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(224, 224, 3))
        choices.append((row["choices"], row["answer"]))
    from mobilemm.generation.conditions import SentenceEncoder

    embedded = scorer.embed(torch.stack(pictures).permute(0, 3, 1, 2).float() / 255)
    encoder = SentenceEncoder()
    right = [
        int((encoder(names)[:, 0] @ embedded[row]).argmax()) == answer
        for row, (names, answer) in enumerate(choices)
    ]
    assert sum(right) / len(right) > 2 / len(choices[0][0])


def test_a_random_generator_scores_like_chance(tmp_path: Path) -> None:
    folder = write_generator(tmp_path / "one", "default", 1, 384)
    settings = json.loads((folder / "mobilemm_generator.json").read_text())
    settings["condition"] = "all-MiniLM-L6-v2"
    (folder / "mobilemm_generator.json").write_text(json.dumps(settings))
    score = evaluate_drawings(folder, [1, 2], limit=60, sheet=tmp_path / "sheet.png")
    assert set(score.top5) == {"1", "2"}
    assert score.top5["2"] < 0.3 < score.real_small <= 1
    assert score.ratio == pytest.approx(score.top5["2"] / score.real)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 16, 8 * 16)


def test_it_draws_what_the_shipped_graph_draws(tmp_path: Path) -> None:
    generator = load_generator(write_generator(tmp_path / "one", "lcm", 1, 384))
    condition = torch.randn(2, 1, 384, generator=torch.Generator().manual_seed(0))
    noise = torch.stack([torch.from_numpy(normal(5 + row, (4, *generator.latent_shape))) for row in range(2)])
    with torch.no_grad():
        expected = UnrolledGenerator(generator, 4)(condition, noise)
    assert torch.allclose(draw(generator, condition, condition, 4, 3, 2), expected, atol=1e-5)


def test_another_condition_is_told(tmp_path: Path) -> None:
    folder = write_generator(tmp_path / "one", "default", 1, 16)
    settings = json.loads((folder / "mobilemm_generator.json").read_text())
    (folder / "mobilemm_generator.json").write_text(json.dumps(settings | {"condition": "all-MiniLM-L6-v2"}))
    with pytest.raises(MobileMMError, match="its condition is"):
        evaluate_drawings(folder, [1], limit=5)
