"""Tasks are read as they are written, and what is wrong in them is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mobilemm.errors import MobileMMError
from mobilemm.evaluation.score import evaluate, vqa_accuracy
from mobilemm.evaluation.tasks import TASKS, held_out, read_task


class Fixed:
    """Likes the longest choice best, says "a bee." and reads every token with probability 1/4."""

    def losses(self, picture: Any, question: str, choices: Any) -> list[float]:
        return [-float(len(choice)) for choice in choices]

    def answer(self, picture: Any, question: str, max_new_tokens: int) -> str:
        return "A bee."

    def text(self, text: str) -> tuple[float, int, int]:
        words = len(text.split())
        return words * 1.3862943611198906, words, words // 4


def _write(folder: Path, name: str, rows: Any) -> None:
    (folder / name).write_text(json.dumps(rows), encoding="utf-8")


def test_the_shipped_set_has_every_task() -> None:
    for task in TASKS:
        items = read_task(task)
        assert items
        assert all(item.picture is None or item.picture.is_file() for item in items)
    answers = [item.answer for item in read_task("yes-no")]
    assert answers.count(0) == answers.count(1) == 48
    assert all(len(item.choices) == 4 for item in read_task("multiple-choice"))
    right = {item.picture.name: item.choices[0] for item in read_task("vqa") if item.picture}
    assert right["bee.png"] == "bee"
    assert held_out().is_dir()


def test_accuracy_by_hand(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "choices": ["bee", "crab", "drum", "violin"], "answer": 3},
        {"image": "b.png", "choices": ["bee", "crab", "drum", "violin"], "answer": 0},
        {"image": "c.png", "question": "Which?", "choices": ["one", "eleven"], "answer": 1},
    ]
    _write(tmp_path, "index.json", rows)
    score = evaluate(Fixed(), "multiple-choice", tmp_path)
    assert (score.samples, score.accuracy, score.chance) == (3, 2 / 3, (1 / 4 + 1 / 4 + 1 / 2) / 3)
    record = score.to_json()
    assert {"task", "samples", "accuracy", "prompt", "method", "seed", "versions"} <= record.keys()
    assert record["versions"]["torch"]
    vqa = evaluate(Fixed(), "vqa", tmp_path)
    assert vqa.accuracy == 1 / 3


def test_yes_no_as_pope_counts(tmp_path: Path) -> None:
    answers = ("yes", "no", "no", "yes", "no")
    rows = [{"image": "a.png", "question": "?", "answer": answer} for answer in answers]
    _write(tmp_path, "yes-no.json", rows)
    score = evaluate(Fixed(), "yes-no", tmp_path)  # says yes to all
    assert score.accuracy == 2 / 5
    assert score.figures == pytest.approx({"precision": 2 / 5, "recall": 1, "f1": 4 / 7, "yes_ratio": 1})


def test_perplexity_of_a_quarter_is_four(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three four five six seven eight", encoding="utf-8")
    (tmp_path / "b.txt").write_text("one two three four", encoding="utf-8")
    score = evaluate(Fixed(), "perplexity", tmp_path)
    assert (score.samples, score.accuracy) == (12, 0.25)
    assert score.figures["perplexity"] == pytest.approx(4)


def test_a_limit_is_drawn_by_the_seed(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "choices": ["x", "y" * (1 + number % 2)], "answer": 0} for number in range(20)]
    _write(tmp_path, "index.json", rows)
    first = evaluate(Fixed(), "multiple-choice", tmp_path, limit=7, seed=1)
    assert first == evaluate(Fixed(), "multiple-choice", tmp_path, limit=7, seed=1)
    assert (first.samples, first.limit, first.seed) == (7, 7, 1)


def test_vqa_accuracy_with_ten_answers() -> None:
    people = ["cat"] * 2 + ["dog"] * 8
    assert vqa_accuracy("The cat!", people) == pytest.approx(2 / 3)
    assert vqa_accuracy("dog", people) == 1
    assert vqa_accuracy("cow", people) == 0


@pytest.mark.parametrize(
    ("task", "rows", "named"),
    [
        ("multiple-choice", {}, "a list of items"),
        ("multiple-choice", [], "a list of items"),
        ("multiple-choice", ["x"], "item 0"),
        ("multiple-choice", [{"image": "../a.png", "choices": ["a", "b"], "answer": 0}], "leaves the folder"),
        ("multiple-choice", [{"image": "/a.png", "choices": ["a", "b"], "answer": 0}], "leaves the folder"),
        ("multiple-choice", [{"image": "a.png", "choices": ["a"], "answer": 0}], "'choices'"),
        ("multiple-choice", [{"image": "a.png", "choices": ["a", "b"], "answer": 2}], "'answer'"),
        ("multiple-choice", [{"image": "a.png", "choices": ["a", "b"], "answer": True}], "'answer'"),
        ("yes-no", [{"image": "a.png", "question": "?", "answer": "maybe"}], "yes or no"),
        ("vqa", [{"image": "a.png", "question": "?", "answers": []}], "'answers'"),
        ("vqa", [{"image": "a.png", "question": 3, "answer": "x"}], "'question'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, task: str, rows: Any, named: str) -> None:
    _write(tmp_path, "index.json", rows)
    with pytest.raises(MobileMMError, match=r"index\.json") as error:
        read_task(task, tmp_path)
    assert named in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(MobileMMError, match="known: multiple-choice"):
        read_task("caption", tmp_path)
    with pytest.raises(MobileMMError, match="no such folder"):
        read_task("vqa", tmp_path / "gone")
    with pytest.raises(MobileMMError, match="cannot be read"):
        read_task("vqa", tmp_path)
    with pytest.raises(MobileMMError, match="no text here"):
        read_task("perplexity", tmp_path)
    (tmp_path / "index.json").write_text('[{"image": "a', encoding="utf-8")
    with pytest.raises(MobileMMError, match="ends early"):
        read_task("vqa", tmp_path)
