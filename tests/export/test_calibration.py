"""Calibration sets: the one that ships, and everything that a stranger's file may hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mobilemm.errors import MobileMMError
from mobilemm.export import calibration
from mobilemm.export.calibration import default_calibration, read_calibration

USER = {"role": "user", "content": "What is this?"}
ANSWER = {"role": "assistant", "content": "A square."}
IMAGE = {"type": "image"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "pictures/b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def write(folder: Path, content: Any) -> Path:
    path = folder / "set.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_the_set_that_ships() -> None:
    samples = read_calibration()
    assert len(samples) == 67
    with_pictures = [sample for sample in samples if sample.files]
    assert len(with_pictures) == 11
    for sample in with_pictures:
        first = sample.messages[0]["content"]
        assert [part["type"] for part in first] == ["image", "text"]
        with Image.open(first[0]["image"]) as picture:
            assert picture.size > (100, 100)
    size = sum(file.stat().st_size for file in default_calibration().parent.rglob("*") if file.is_file())
    assert size < 200_000
    words = sum(
        len(part["text"].split())
        for s in samples
        for m in s.messages
        for part in m["content"]
        if "text" in part
    )
    assert words > 4000


def test_files_stand_in_front_of_the_first_user_s_text(folder: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    path = write(folder, [{"files": ["a.png", "pictures/b.png"], "messages": [system, USER, ANSWER]}])
    (sample,) = read_calibration(path)
    assert sample.files == (folder / "a.png", folder / "pictures" / "b.png")
    assert sample.messages == (
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": str(folder / "a.png")},
                {"type": "image", "image": str(folder / "pictures" / "b.png")},
                {"type": "text", "text": "What is this?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "A square."}]},
    )


def test_files_stand_where_their_marks_are(folder: Path) -> None:
    later = {"role": "user", "content": [{"type": "text", "text": "And this?"}, IMAGE]}
    first = {"role": "user", "content": [IMAGE, {"type": "text", "text": "This?"}]}
    path = write(folder, [{"files": ["a.png", "pictures/b.png"], "messages": [first, ANSWER, later]}])
    (sample,) = read_calibration(path)
    assert sample.messages[0]["content"][0]["image"] == str(folder / "a.png")
    assert sample.messages[2]["content"][1]["image"] == str(folder / "pictures" / "b.png")


def test_text_alone(tmp_path: Path) -> None:
    (sample,) = read_calibration(write(tmp_path, [{"messages": [USER, ANSWER]}]))
    assert sample.files == ()


def with_files(*files: Any) -> list[dict[str, Any]]:
    return [{"files": list(files), "messages": [USER]}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "must be a list"),
        ("[]", "must be a list"),
        ([1], "sample 0: must have the key"),
        ([{"files": []}], "sample 0: must have the key"),
        ([{"messages": [USER]}, {"messages": [USER], "text": "x"}], "sample 1: must have the key"),
        ([{"messages": []}], '"messages" must be a list'),
        ([{"messages": "hello"}], '"messages" must be a list'),
        ([{"messages": ["hello"]}], "message 0: must have"),
        ([{"messages": [USER, {"role": "robot", "content": "x"}]}], "message 1: must have"),
        ([{"messages": [{"role": [], "content": "x"}]}], "message 0: must have"),
        ([{"messages": [{"role": "user", "content": 5}]}], '"content" must be text'),
        ([{"messages": [{"role": "user", "content": []}]}], '"content" must be text'),
        ([{"messages": [{"role": "user", "content": [{"type": "text"}]}]}], "a part is"),
        ([{"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}], "a part is"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]}],
            "a part is",
        ),
        ([{"messages": [{"role": "user", "content": [IMAGE]}]}], '0 files, but 1 parts of type "image"'),
        ([{"files": ["a.png"], "messages": [ANSWER]}], "no message of a user"),
        ([{"files": "a.png", "messages": [USER]}], '"files" must be a list'),
        (with_files(3), '"files" must be a list'),
        (with_files(""), '"files" must be a list'),
        (with_files(*["a.png"] * 65), "65 files"),
        (with_files("missing.png"), "missing.png: no such file"),
        (with_files("pictures"), "pictures: no such file"),
        (with_files("../a.png"), "lies outside the folder"),
        (with_files("pictures/../../a.png"), "lies outside the folder"),
        (with_files("/etc/passwd"), "lies outside the folder"),
        (with_files("a\0.png"), "null"),
        (with_files("a" * 10_000), "aaaa"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(folder: Path, content: Any, message: str) -> None:
    path = write(folder, content)
    with pytest.raises(MobileMMError) as caught:
        read_calibration(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a_link_that_leads_outside_is_refused(folder: Path) -> None:
    inner = folder / "pictures"
    (inner / "link.png").symlink_to(folder / "a.png")
    (inner / "near.png").symlink_to(inner / "b.png")
    with pytest.raises(MobileMMError, match="lies outside the folder"):
        read_calibration(write(inner, with_files("link.png")))
    assert read_calibration(write(inner, with_files("near.png")))[0].files == (inner / "b.png",)


def test_sizes_are_limited(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder, [{"messages": [USER]}] * 3)
    monkeypatch.setattr(calibration, "MAX_SAMPLES", 2)
    with pytest.raises(MobileMMError, match="3 samples; there may be 2"):
        read_calibration(path)
    monkeypatch.setattr(calibration, "MAX_BYTES", 100)
    with pytest.raises(MobileMMError, match="a calibration set may have 100"):
        read_calibration(path)


@pytest.mark.parametrize("kind", ["missing", "folder", "not utf-8"])
def test_files_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "set.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "not utf-8":
        path.write_bytes(b'[{"messages": "\xff\xfe"}]')
    with pytest.raises(MobileMMError, match=r"set\.json"):
        read_calibration(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_no_set(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "set.json")
    with pytest.raises(MobileMMError, match="is a JSON file"):
        read_calibration(tmp_path / "set.json")
