"""Sets of training samples, whatever their format: conversations of text and pictures, read row by row.

A row that cannot be used (a picture that is missing or leaves its folder, marks without pictures, an unknown
role, an empty answer) is told with its reason, so that it can be counted; only a file that is no such set at
all is an error.
"""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mobilemm.data.pairs import read_pairs
from mobilemm.data.templates import IMAGE_MARK, Message
from mobilemm.errors import MobileMMError

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class UnusableRowError(MobileMMError):
    """One row that is left out; the message is the reason, by which such rows are counted."""


@dataclass(frozen=True)
class Sample:
    """A conversation to learn from. A part {"type": "image", "image": …} holds a path or encoded bytes.

    A part {"type": "drawing", "caption": …} of an answer is a picture that the model draws.
    `rejected` is a worse answer than the last one, for preference tuning.
    """

    messages: tuple[Message, ...]
    name: str
    rejected: str | None = None

    @property
    def images(self) -> list[Path | bytes]:
        """Its pictures in reading order."""
        return [
            part["image"]
            for message in self.messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "image"
        ]

    @property
    def characters(self) -> int:
        """Of all its text: by it samples of like length are found without tokenizing them."""
        return sum(
            len(message["content"])
            if isinstance(message["content"], str)
            else sum(len(part.get("text", "")) for part in message["content"])
            for message in self.messages
        )


class SampleSource:
    """Rows of one file or folder, made into samples when they are asked for.

    Args:
        name: for people, as in reports.
        rows: one object a sample, in whatever form `convert` takes.
        convert: a row, its name and a random generator → sample; raises UnusableRowError for a useless row.
    """

    def __init__(
        self, name: str, rows: Sequence[Any], convert: Callable[[Any, str, random.Random], Sample]
    ) -> None:
        self.name, self.rows, self._convert = name, rows, convert

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int, draw: random.Random) -> Sample:
        """The sample of one row; where a row offers a choice (of questions), `draw` makes it.

        Raises UnusableRowError, whose message is the reason.
        """
        sample = self._convert(self.rows[index], f"{self.name}, row {index}", draw)
        _check(sample)
        return sample


def open_source(
    format: str,
    path: Path,
    images: Path | None = None,
    questions: Sequence[str] = ("Describe this picture.",),
    split: str = "train",
) -> SampleSource:
    """A source of one of the formats that recipes name.

    `llava`: a JSON list of {"conversations": [{"from", "value"}], "image"?: path or list of paths}.
    `messages`: a JSON list, or JSON lines, of {"messages": [{"role", "content"}], "images"?: [paths]}.
    `preferences`: such rows with "rejected", a text that is a worse answer than the last message.
    `hf`: the same as columns, a `datasets` folder (save_to_disk) or a Parquet file; images may be bytes.
    `folder`: pictures, each with its caption in NAME.txt, or in metadata.jsonl (`file_name`, `text`).
    `pairs`: a folder of scripts/fetch_pairs.py, of which `split` is taken.

    Raises MobileMMError when the file is missing, ends early or is of another format.
    """
    root = images or (path if path.is_dir() else path.parent)
    if format == "llava":
        return SampleSource(str(path), _json_rows(path), lambda row, name, _: _from_llava(row, name, root))
    if format == "messages":
        return SampleSource(str(path), _json_rows(path), lambda row, name, _: _from_messages(row, name, root))
    if format == "preferences":
        return SampleSource(
            str(path), _json_rows(path), lambda row, name, _: _from_preferences(row, name, root)
        )
    if format == "hf":
        return SampleSource(str(path), _columns(path), lambda row, name, _: _from_messages(row, name, root))
    if format == "pairs":
        rows = [(pair.image, pair.caption) for pair in read_pairs(path, split)]
    elif format == "folder":
        rows = _captioned_pictures(path)
    else:
        raise MobileMMError(
            f"unknown format of data {format!r}; known: llava, messages, preferences, hf, folder, pairs"
        )

    def caption(row: tuple[str, str], name: str, draw: random.Random) -> Sample:
        content = [
            {"type": "image", "image": _inside(root, row[0])},
            {"type": "text", "text": draw.choice(questions)},
        ]
        return Sample(({"role": "user", "content": content}, _answer(row[1])), f"{name} ({row[0]})")

    return SampleSource(str(path), rows, caption)


def _check(sample: Sample) -> None:
    answers = [message for message in sample.messages if message["role"] == "assistant"]
    if not answers:
        raise UnusableRowError("no answer to learn from")
    for message in answers:
        text = message["content"]
        if not isinstance(text, str):
            text = "".join(part.get("text") or part.get("caption") or "" for part in text)
        if not text.replace(IMAGE_MARK, "").strip():
            raise UnusableRowError("an empty answer")
    for image in sample.images:
        if isinstance(image, Path):
            try:
                size = image.stat().st_size
            except OSError:
                raise UnusableRowError("a picture is missing") from None
            if not size:
                raise UnusableRowError("a picture of 0 bytes")


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _inside(root: Path, name: Any) -> Path:
    """A picture's path, which must not leave its folder."""
    if not isinstance(name, str) or not name:
        raise UnusableRowError("an image that is no path")
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise UnusableRowError("an image path that leaves its folder")
    return root / name


def _json_rows(path: Path) -> list[Any]:
    """Rows of a JSON list, or of JSON lines."""
    if not path.is_file():
        raise MobileMMError(f"{path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MobileMMError(f"{path}: cannot be read: {error}") from error
    if text.lstrip()[:1] == "[":
        try:
            rows = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise MobileMMError(f"{path}: not valid JSON, or it ends early: {error}") from error
    else:
        rows = []
        for number, line in enumerate(io.StringIO(text), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except (json.JSONDecodeError, RecursionError) as error:
                    raise MobileMMError(
                        f"{path}, line {number}: not valid JSON, or it ends early: {error}"
                    ) from error
    if not rows:
        raise MobileMMError(f"{path}: it holds no rows")
    return rows


def _columns(path: Path) -> Any:
    """A Hugging Face dataset: indexed, its pictures left encoded."""
    try:
        import datasets
    except ImportError:
        raise MobileMMError("format hf needs the package datasets: pip install 'mobilemm[train]'") from None
    try:
        if path.is_dir():
            table = datasets.load_from_disk(str(path))
        else:
            table = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # datasets raises as many types as it has readers
        raise MobileMMError(f"{path}: no datasets folder and no Parquet file: {error}") from error
    if isinstance(table, datasets.DatasetDict):
        raise MobileMMError(f"{path}: it holds several splits ({', '.join(table)}); name one's folder")
    if "messages" not in table.column_names:
        raise MobileMMError(f"{path}: a column 'messages' is expected; it has {table.column_names}")
    if "images" in table.column_names and hasattr(table.features["images"], "feature"):
        table = table.cast_column("images", datasets.List(datasets.Image(decode=False)))
    return table


def _captioned_pictures(folder: Path) -> list[tuple[str, str]]:
    if not folder.is_dir():
        raise MobileMMError(f"{folder}: there is no such folder")
    table = folder / "metadata.jsonl"
    if table.is_file():
        rows = _json_rows(table)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or not all(
                isinstance(row.get(key), str) for key in ("file_name", "text")
            ):
                raise MobileMMError(f"{table}, row {number}: 'file_name' and 'text' are expected")
        return [(row["file_name"], row["text"]) for row in rows]
    found = []
    for picture in sorted(folder.rglob("*")):
        caption = picture.with_suffix(".txt")
        if picture.suffix.lower() in PICTURE_SUFFIXES and caption.is_file():
            text = caption.read_text(encoding="utf-8", errors="replace").strip()
            found.append((picture.relative_to(folder).as_posix(), text))
    if not found:
        raise MobileMMError(f"{folder}: no picture here has its caption beside it (NAME.txt, metadata.jsonl)")
    return found


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _from_llava(row: Any, name: str, root: Path) -> Sample:
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UnusableRowError("no list 'conversations'")
    messages = [{"role": turn.get("from"), "content": turn.get("value")} for turn in turns]
    images = row.get("image", row.get("images", []))
    return _from_messages(
        {"messages": messages, "images": images if isinstance(images, list) else [images]}, name, root
    )


def _from_messages(row: Any, name: str, root: Path) -> Sample:
    """Marks and image parts take the row's images in order; a part may bring its own."""
    turns = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        raise UnusableRowError("no list 'messages'")
    given = [_image(image, root) for image in row.get("images") or []]
    left = iter(given)
    marks = 0
    messages: list[Message] = []
    for turn in turns:
        role = _ROLES.get(str(turn.get("role"))) if isinstance(turn, dict) else None
        if role is None:
            raise UnusableRowError("an unknown role")
        parts = _parts(turn.get("content"))
        if role == "system" and messages:
            raise UnusableRowError("a system message that does not stand first")
        content: list[dict[str, Any]] = []
        for part in parts:
            if part.get("type") == "image":
                own = next((part[key] for key in ("image", "path") if part.get(key) is not None), None)
                image = _image(own, root) if own is not None else next(left, None)
                marks += own is None
                if image is None:
                    raise UnusableRowError(f"more {IMAGE_MARK} than images")
                if role != "user":
                    raise UnusableRowError("an image outside of the user's words")
                content.append({"type": "image", "image": image})
            elif part.get("type") == "text" and isinstance(part.get("text"), str):
                content.append({"type": "text", "text": part["text"]})
            elif part.get("type") == "drawing" and isinstance(part.get("caption"), str):
                if role != "assistant":
                    raise UnusableRowError("a drawing outside of the assistant's answers")
                content.append({"type": "drawing", "caption": part["caption"]})
            else:
                raise UnusableRowError("a part that is neither text nor image nor drawing")
        messages.append({"role": role, "content": content})
    if marks < len(given):
        raise UnusableRowError(f"more images than {IMAGE_MARK}")
    return Sample(tuple(messages), name)


def _from_preferences(row: Any, name: str, root: Path) -> Sample:
    sample = _from_messages(row, name, root)
    rejected = row.get("rejected")
    if not isinstance(rejected, str) or not rejected.strip():
        raise UnusableRowError("no text 'rejected'")
    if sample.messages[-1]["role"] != "assistant":
        raise UnusableRowError("a last message that is no answer")
    return replace(sample, rejected=rejected)


def _parts(content: Any) -> list[dict[str, Any]]:
    """Content as typed parts; a text's marks become image parts, the line breaks beside them go."""
    if isinstance(content, list):
        if not all(isinstance(part, dict) for part in content):
            raise UnusableRowError("a part that is neither text nor image nor drawing")
        # Columns of one type for all rows give each part all keys, most of them None.
        return content
    if not isinstance(content, str):
        raise UnusableRowError("a message without text")
    first, *rest = content.split(IMAGE_MARK)
    parts = [{"type": "text", "text": first.rstrip("\n") if rest else first}]
    for piece in rest:
        parts += [{"type": "image"}, {"type": "text", "text": piece.strip("\n")}]
    return [part for part in parts if part["type"] == "image" or part["text"]]


def _image(image: Any, root: Path) -> Path | bytes:
    if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
        return image["bytes"]
    if isinstance(image, dict):
        image = image.get("path")
    return _inside(root, image)
