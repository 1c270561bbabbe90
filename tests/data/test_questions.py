"""Questions follow from captions and keywords, and their answers are right."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from mobilemm.data.pairs import Pair
from mobilemm.data.questions import NUMBERS, about_pictures, several, write_questions
from mobilemm.data.sources import open_source
from mobilemm.data.things import with_article
from mobilemm.data.wordnet import read_names
from mobilemm.errors import MobileMMError

THINGS = ["red apple", "cat", "owl", "scissors", "boat", "glass", "blue book with a pen on it", "green leaf"]

WORDNET = """  1 This software and database is being provided to you
01885845 05 n 03 wing_case 0 elytron 0 Felis_catus 1 001 @ 02159955 n 0000 | either of the horny front wings
02124272 05 n 01 cat 0 001 @ 02123649 n 0000 | feline mammal
01624249 05 n 01 owl 0 001 @ 01604330 n 0000 | nocturnal bird of prey
00002137 03 n 01 abstraction 0 001 @ 00001740 n 0000 | a general concept
02834778 06 n 02 bicycle_built_for_two 0 4x4 0 001 @ 02837983 n 0000 | more words than are asked for; digits
"""


def _pair(caption: str, split: str = "train") -> Pair:
    keywords = ("food-drink", "food-fruit") if "apple" in caption else ("animals-nature", "animal-mammal")
    group = caption.split()[-1]
    return Pair(f"{caption}.png", caption, keywords, group, "test", "public domain", split)


def test_each_picture_has_a_yes_and_a_no() -> None:
    rows = list(about_pictures([_pair(thing) for thing in THINGS]))
    assert len(rows) == 7  # a long caption is not asked for
    for row in rows:
        caption = row["images"][0].removesuffix(".png")
        turns = row["messages"]
        assert turns[0]["content"].startswith("<image>\n")
        asked = {}
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            assert (question["role"], answer["role"]) == ("user", "assistant")
            asked[question["content"].removeprefix("<image>\n")] = answer["content"]
        for question, answer in asked.items():
            if question.startswith("Is this"):
                assert (question == f"Is this {with_article(caption)}?") == (answer == "Yes")
        assert sorted(asked.values())[:1] != ["Yes"]
        assert list(asked.values()).count("Yes") == list(asked.values()).count("No") == 1
    assert rows == list(about_pictures([_pair(thing) for thing in THINGS]))


def test_colours_and_kinds() -> None:
    asked = {
        (question["content"].removeprefix("<image>\n"), answer["content"])
        for seed in range(30)
        for row in about_pictures([_pair(thing) for thing in THINGS], seed)
        for question, answer in zip(row["messages"][::2], row["messages"][1::2], strict=True)
    }
    assert ("What color is the apple?", "Red") in asked
    assert ("What color is the leaf?", "Green") in asked
    assert ("What kind of thing is this?", "Fruit") in asked
    assert ("What kind of thing is this?", "Animal") in asked


@pytest.mark.parametrize(
    ("name", "called"),
    [("cat", "a cat"), ("owl", "an owl"), ("scissors", "scissors"), ("glass", "a glass")],
)
def test_articles(name: str, called: str) -> None:
    assert with_article(name) == called


@pytest.mark.parametrize("copies", [1, 2, 3, 4, 5])
def test_as_many_copies_as_asked_for(copies: int) -> None:
    picture = several(Image.new("RGB", (50, 40), "red"), copies, random.Random(copies), side=96)
    red = sum(colour == (255, 0, 0) for colour in picture.get_flattened_data())
    assert red == copies * 50 * 40


@pytest.mark.parametrize("text", ["no table", "00001740 03 n zz entity 0 000 | what is\n"])
def test_another_file_than_wordnets(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.noun").write_text(text, encoding="ascii")
    with pytest.raises(MobileMMError, match=r"data\.noun: not WordNet's"):
        read_names(tmp_path / "data.noun")
    with pytest.raises(MobileMMError, match=r"absent: WordNet's nouns cannot be read.*fetch_pairs"):
        read_names(tmp_path / "absent")


def test_a_folder_of_questions(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    rows = []
    for index, thing in enumerate(THINGS):
        Image.new("RGB", (30, 30), (index * 20, 90, 90)).save(pairs / f"{thing}.png")
        pair = _pair(thing, "test" if thing == "owl" else "train")
        rows.append(json.dumps(vars(pair) | {"keywords": list(pair.keywords)}))
    (pairs / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    nouns = tmp_path / "data.noun"
    nouns.write_text(WORDNET, encoding="ascii")
    counts = write_questions(pairs, tmp_path / "questions", counts=3, nouns=nouns)
    # Nothing of the test split; counts of cat and boat; two requests, four other questions for each of 7.
    assert counts == {"about": 6, "count": 2, "draw": 7 * (2 + 4), "redraw": 7, "names": 3}
    names = (tmp_path / "questions" / "names.jsonl").read_text(encoding="utf-8")
    assert all(name in names for name in ("wing case", "elytron", "cat"))
    assert "owl" not in names  # of the test split
    about = open_source("messages", tmp_path / "questions" / "about.jsonl", images=pairs)
    counted = open_source("messages", tmp_path / "questions" / "count.jsonl")
    draw = random.Random(0)
    assert all(about.sample(index, draw).images[0].is_file() for index in range(6))  # type: ignore[union-attr]
    said = [counted.sample(index, draw).messages[1]["content"][0]["text"] for index in range(2)]
    assert said == [number.capitalize() for number in NUMBERS[:2]]
    with pytest.raises(MobileMMError, match="it is there already"):
        write_questions(pairs, tmp_path / "questions")
