"""Requests for drawings: each caption as it is, once changed, and four questions that are no requests."""

from __future__ import annotations

from typing import Any

from mobilemm.data.drawings import (
    HELD_OUT_QUESTIONS,
    HELD_OUT_REQUESTS,
    QUESTIONS,
    REQUESTS,
    drawing_rows,
    name_rows,
    seen_rows,
)
from mobilemm.data.pairs import Pair

CAPTIONS = ["red apple", "cat", "owl", "scissors"]
PAIRS = [
    Pair(f"{name}.png", name, ("food-fruit",), name.split()[-1], "test", "public domain", "train")
    for name in [*CAPTIONS, "cat"]
]


def test_captions_are_asked_for_and_talked_about() -> None:
    rows = list(drawing_rows(PAIRS))
    assert len(rows) == 6 * len(CAPTIONS)
    drawn = [row["messages"][1]["content"][0]["caption"] for row in rows if _draws(row)]
    assert drawn[::2] == CAPTIONS
    assert all(
        plain in other and plain != other for plain, other in zip(drawn[::2], drawn[1::2], strict=True)
    )
    for row in rows:
        asked, answer = (message["content"] for message in row["messages"])
        assert "{" not in asked
        if _draws(row):
            assert answer[0]["caption"] in asked
        else:
            assert answer
            assert "{" not in answer
    assert rows == list(drawing_rows(PAIRS))
    assert rows != list(drawing_rows(PAIRS, seed=1))


def test_names_are_asked_for_by_themselves_and_in_colours() -> None:
    names = [f"thing{number}" for number in range(200)]
    rows = list(name_rows(names, set()))
    captions = [row["messages"][1]["content"][0]["caption"] for row in rows]
    assert all(caption.endswith(name) for name, caption in zip(names, captions, strict=True))
    assert 20 < sum(" " in caption for caption in captions) < 80
    assert all(caption in row["messages"][0]["content"] for row, caption in zip(rows, captions, strict=True))
    assert rows == list(name_rows(names, set()))
    coloured = next(caption for caption in captions if " " in caption)
    again = list(name_rows(names, {"thing3", coloured}))
    assert len(again) == 199
    said = {row["messages"][1]["content"][0]["caption"] for row in again}
    assert said == {*captions, coloured.split()[1]} - {coloured, captions[3]}


def test_pictures_are_drawn_again() -> None:
    rows = list(seen_rows(PAIRS))
    assert [row["images"] for row in rows] == [[pair.image] for pair in PAIRS]
    assert [row["messages"][1]["content"][0]["caption"] for row in rows] == [pair.caption for pair in PAIRS]


def test_words_for_tests_are_not_those_for_training() -> None:
    assert not set(HELD_OUT_REQUESTS) & set(REQUESTS)
    assert not set(HELD_OUT_QUESTIONS) & {question for question, _ in QUESTIONS}


def _draws(row: dict[str, Any]) -> bool:
    return not isinstance(row["messages"][1]["content"], str)
