"""Formats of training data: each is read as it is written, and a bad row is left out with its reason."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mobilemm.data.mixture import scan
from mobilemm.data.sources import Sample, UnusableRowError, open_source
from mobilemm.errors import MobileMMError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    (tmp_path / "empty.png").write_bytes(b"")
    return tmp_path


def _first(format: str, path: Path, **options: Any) -> Sample:
    return open_source(format, path, **options).sample(0, random.Random(0))


def _llava(folder: Path, row: dict[str, Any]) -> Sample:
    (folder / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
    return _first("llava", folder / "rows.json")


def _turns(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)]


def test_llava(folder: Path) -> None:
    sample = _llava(
        folder, {"image": "a.png", "conversations": _turns("<image>\nWhat?", "A cat.", "So?", "Yes.")}
    )
    image = {"type": "image", "image": folder / "a.png"}
    assert [message["role"] for message in sample.messages] == ["user", "assistant"] * 2
    assert sample.messages[0]["content"] == [image, {"type": "text", "text": "What?"}]
    assert sample.messages[3]["content"] == [{"type": "text", "text": "Yes."}]
    assert sample.images == [folder / "a.png"]
    assert sample.characters == len("What?A cat.So?Yes.")


def test_llava_with_several_images_and_with_none(folder: Path) -> None:
    turns = _turns("<image>\n<image>\nWhich?", "Both.")
    assert _llava(folder, {"image": ["a.png", "b.png"], "conversations": turns}).images == [
        folder / "a.png",
        folder / "b.png",
    ]
    assert _llava(folder, {"conversations": _turns("Hello", "Hi")}).images == []


def test_messages_as_lines_with_parts_and_marks(folder: Path) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    rows: list[Any] = [
        {
            "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}],
            "images": ["a.png"],
        },
        {
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": [{"type": "image", "image": "b.png"}]},
                {"role": "assistant", "content": "B"},
            ]
        },
    ]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    source = open_source("messages", path)
    assert len(source) == 2
    assert source.sample(0, random.Random(0)).images == [folder / "a.png"]
    assert source.sample(1, random.Random(0)).images == [folder / "b.png"]
    assert source.sample(1, random.Random(0)).messages[0]["role"] == "system"


def test_hugging_face_columns_with_encoded_pictures(folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = io.BytesIO()
    Image.new("RGB", (4, 4), "blue").save(data, "PNG")
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    rows = [
        {
            "images": [{"bytes": data.getvalue(), "path": None}],
            "messages": [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": [{"type": "text", "text": "Blue."}]},
            ],
        }
    ]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(str(folder / "rows.parquet"))
    table.save_to_disk(str(folder / "saved"))
    for path in (folder / "rows.parquet", folder / "saved"):
        sample = _first("hf", path)
        assert sample.images == [data.getvalue()]
        assert sample.messages[1]["content"] == [{"type": "text", "text": "Blue."}]
    with pytest.raises(MobileMMError, match="no datasets folder"):
        open_source("hf", folder / "gone")


def test_a_folder_of_captioned_pictures(folder: Path) -> None:
    (folder / "b.txt").write_text("a red square\n", encoding="utf-8")
    sample = _first("folder", folder, questions=["What?"])
    assert sample.images == [folder / "b.png"]
    assert sample.messages[1]["content"] == "a red square"
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "red"}\n', encoding="utf-8")
    assert _first("folder", folder).messages[1]["content"] == "red"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "leaves": ({"image": "../a.png", "conversations": _turns("<image>", "x")}, "leaves its folder"),
    "absolute": ({"image": "/a.png", "conversations": _turns("<image>", "x")}, "leaves its folder"),
    "marks": ({"image": "a.png", "conversations": _turns("<image><image>", "x")}, "more <image> than images"),
    "images": ({"image": "a.png", "conversations": _turns("What?", "x")}, "more images than <image>"),
    "role": ({"conversations": [{"from": "dog", "value": "wuff"}]}, "an unknown role"),
    "bytes": ({"image": "empty.png", "conversations": _turns("<image>", "x")}, "0 bytes"),
    "missing": ({"image": "gone.png", "conversations": _turns("<image>", "x")}, "is missing"),
    "mark alone": ({"conversations": _turns("What?", "<image>")}, "more <image> than images"),
    "caption": (
        {"image": "a.png", "conversations": _turns("What?", "<image>")},
        "outside of the user",
    ),
    "empty": ({"conversations": _turns("What?", "  ")}, "an empty answer"),
    "silent": ({"conversations": _turns("What?")}, "no answer to learn from"),
    "no list": ({"text": "x"}, "no list 'conversations'"),
    "no text": ({"conversations": [{"from": "human", "value": 3}]}, "without text"),
}


@pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD)
def test_a_bad_row_is_told(folder: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnusableRowError, match=reason):
        _llava(folder, row)


def test_bad_rows_are_counted(folder: Path) -> None:
    good = {"image": "a.png", "conversations": _turns("<image>\nWhat?", "A cat.")}
    rows = [row for row, _ in BAD.values()] + [good, good]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    scanned = scan(open_source("llava", folder / "rows.json"), 1.0, 16)
    assert scanned.rows == [len(BAD), len(BAD) + 1]
    assert scanned.reasons.total() == len(BAD)
    assert scanned.reasons["an image path that leaves its folder"] == 2
    assert scanned.lengths[0] == len("What?A cat.") // 4 + 16


def test_a_caption_that_is_an_image_mark(folder: Path) -> None:
    (folder / "a.txt").write_text("<image>", encoding="utf-8")
    with pytest.raises(MobileMMError, match="none of its 1 rows can be used; mostly: an empty answer"):
        scan(open_source("folder", folder), 1.0, 16)


@pytest.mark.parametrize(
    ("format", "text", "named"),
    [
        ("llava", '[{"conversations": [', "ends early"),
        ("messages", '{"messages": []}\n{"mess', "line 2: not valid JSON"),
        ("messages", "[]", "no rows"),
        ("coco", "[]", "unknown format"),
    ],
)
def test_a_file_that_is_no_set(tmp_path: Path, format: str, text: str, named: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MobileMMError, match=named):
        open_source(format, path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for format in ("llava", "messages", "folder", "pairs"):
        with pytest.raises(MobileMMError):
            open_source(format, tmp_path / "gone")
    with pytest.raises(MobileMMError, match="no picture here has its caption"):
        open_source("folder", tmp_path)
