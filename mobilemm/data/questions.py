"""Questions with short answers about captioned drawings: is this a …, what colour, what kind, how many.

They follow from captions, keywords and groups by templates alone, in the words in which `mobilemm eval` asks.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilemm.data.drawings import drawing_rows, name_rows, seen_rows
from mobilemm.data.images import open_image
from mobilemm.data.pairs import Pair, read_pairs
from mobilemm.data.things import COLOURS, kind_of, with_article
from mobilemm.data.wordnet import read_names
from mobilemm.errors import MobileMMError

if TYPE_CHECKING:
    from PIL import Image

NUMBERS = ("one", "two", "three", "four", "five")
MOST_WORDS = 3
_PLACES = ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2))


def write_questions(
    pairs: Path, folder: Path, counts: int = 600, seed: int = 0, nouns: Path | None = None
) -> dict[str, int]:
    """Rows of questions about the training split of a folder of pairs, in the format `messages`.

    `about.jsonl`: two or three questions about each picture of `pairs`, among them one whose answer is yes
    and one whose answer is no; its image paths start in `pairs`. `count.jsonl`: how many things there are, on
    pictures made here of one to five copies. `draw.jsonl`: requests for pictures, and questions about the
    same things that are none; `redraw.jsonl`: requests to draw a picture again; `names.jsonl`, with `nouns`,
    WordNet's data.noun: requests for pictures of more things, none of them a caption of the other splits. The
    same pairs and seed give the same rows; the folder appears when it is whole. Returns the number of rows of
    each.

    Raises MobileMMError when the folder exists, or `nouns` is another file.
    """
    if folder.exists():
        raise MobileMMError(f"{folder}: it is there already; remove it, or give a new folder")
    known = read_pairs(pairs, "train")
    folder.parent.mkdir(parents=True, exist_ok=True)
    writing = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        found = {
            "about": list(about_pictures(known, seed)),
            "count": list(_count_rows(known, pairs, writing, counts, seed)),
            "draw": list(drawing_rows(known, seed)),
            "redraw": list(seen_rows(known, seed)),
        }
        if nouns is not None:
            others = (*read_pairs(pairs, "validation"), *read_pairs(pairs, "test"))
            held_out = {pair.caption.lower() for pair in others}
            found["names"] = list(name_rows(read_names(nouns), held_out, seed))
        for name, rows in found.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (writing / f"{name}.jsonl").write_text(text, encoding="utf-8")
        writing.chmod(0o755)
        os.rename(writing, folder)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    return {name: len(rows) for name, rows in found.items()}


def about_pictures(pairs: Sequence[Pair], seed: int = 0) -> Iterator[dict[str, Any]]:
    """A conversation of short questions about each picture whose caption is short enough to ask for."""
    named = [pair for pair in pairs if len(pair.caption.split()) <= MOST_WORDS]
    for pair in named:
        draw = random.Random(f"{seed}-{pair.image}")
        other = pair
        while other.group == pair.group:
            other = draw.choice(named)
        turns = [
            (f"Is this {with_article(pair.caption)}?", "Yes"),
            (f"Is this {with_article(other.caption)}?", "No"),
        ]
        if further := [turn for turn in (_colour(pair.caption), _kind(pair)) if turn]:
            turns.append(draw.choice(further))
        draw.shuffle(turns)
        yield _row([pair.image], turns)


def _colour(caption: str) -> tuple[str, str] | None:
    first, _, rest = caption.partition(" ")
    if first in COLOURS and rest and not set(rest.split()) & set(COLOURS):
        return f"What color is the {rest}?", first.capitalize()
    return None


def _kind(pair: Pair) -> tuple[str, str] | None:
    kind = kind_of(pair)
    return ("What kind of thing is this?", kind.capitalize()) if kind else None


def _row(images: list[str], turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    messages = []
    for index, (question, answer) in enumerate(turns):
        mark = "<image>\n" * len(images) if index == 0 else ""
        messages += [{"role": "user", "content": mark + question}, {"role": "assistant", "content": answer}]
    return {"images": images, "messages": messages}


def _count_rows(
    pairs: Sequence[Pair], root: Path, folder: Path, count: int, seed: int
) -> Iterator[dict[str, Any]]:
    (folder / "count").mkdir()
    named = [pair for pair in pairs if len(pair.caption.split()) == 1 and not pair.caption.endswith("s")]
    draw = random.Random(f"{seed}-count")
    for number, pair in enumerate(draw.sample(named, min(count, len(named)))):
        copies = 1 + number % len(NUMBERS)
        name = f"count/{number}.png"
        several(open_image(root / pair.image), copies, draw).save(folder / name)
        yield _row([name], [("How many are there in this picture?", NUMBERS[copies - 1].capitalize())])


def several(picture: Image.Image, copies: int, draw: random.Random, side: int = 96) -> Image.Image:
    """So many copies of a picture on white, three by three places of `side` pixels."""
    from PIL import Image

    canvas = Image.new("RGB", (3 * side, 3 * side), "white")
    small = picture.copy()
    small.thumbnail((side, side))
    for column, row in draw.sample(_PLACES, copies):
        canvas.paste(small, (column * side, row * side))
    return canvas
