"""Calibration: conversations, pictures included, that show the quantizers what a model's layers are fed.

A set is a JSON list of `{"files": [picture, …], "messages": [{"role": …, "content": …}, …]}`. Pictures are
paths relative to the JSON file. A message's content is text, or a list of `{"type": "text", "text": …}` and
`{"type": "image"}`, which takes the next file; without any such mark all files stand in front of the first
user's text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mobilemm.errors import MobileMMError, one_line

MAX_BYTES = 64 * 2**20
MAX_SAMPLES = 10_000
MAX_FILES = 64
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class CalibrationSample:
    """One conversation: its pictures, and messages in transformers' form that refer to them by path."""

    files: tuple[Path, ...]
    messages: tuple[dict[str, Any], ...]


def default_calibration() -> Path:
    """The set that ships: see the README beside it."""
    return Path(str(resources.files("mobilemm.export"))) / "calibration_data" / "calibration.json"


def read_calibration(path: str | Path | None = None) -> list[CalibrationSample]:
    """A calibration set; without a path, the one that ships.

    Raises MobileMMError naming the file and the sample for whatever is not as the format says: too large,
    no JSON, wrong types, unknown keys, a picture that is missing or lies outside the file's folder.
    """
    path = Path(path) if path is not None else default_calibration()
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise MobileMMError(f"{path}: a calibration set is a JSON file")
        if size > MAX_BYTES:
            raise MobileMMError(f"{path}: {size:,} bytes; a calibration set may have {MAX_BYTES:,}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MobileMMError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise MobileMMError(f"{path}: is not JSON ({one_line(error)})") from error
    if not isinstance(content, list) or not content:
        raise MobileMMError(f'{path}: must be a list of {{"files": […], "messages": […]}}, one or more')
    if len(content) > MAX_SAMPLES:
        raise MobileMMError(f"{path}: {len(content):,} samples; there may be {MAX_SAMPLES:,}")
    return [_sample(entry, f"{path}: sample {index}", path.parent) for index, entry in enumerate(content)]


def _sample(entry: Any, where: str, folder: Path) -> CalibrationSample:
    if not isinstance(entry, dict) or not set(entry) <= {"files", "messages"} or "messages" not in entry:
        raise MobileMMError(f'{where}: must have the key "messages", may have "files", and no other')
    files, messages = entry.get("files", []), entry["messages"]
    if not isinstance(files, list) or not all(isinstance(file, str) and file for file in files):
        raise MobileMMError(f'{where}: "files" must be a list of paths')
    if len(files) > MAX_FILES:
        raise MobileMMError(f"{where}: {len(files)} files; a sample may have {MAX_FILES}")
    if not isinstance(messages, list) or not messages:
        raise MobileMMError(f'{where}: "messages" must be a list, one or more')
    paths = [_picture(file, where, folder) for file in files]
    contents = [_parts(message, f"{where}, message {index}") for index, message in enumerate(messages)]
    marks = sum(part["type"] == "image" for _, parts in contents for part in parts)
    if not marks and paths:
        first = next((parts for role, parts in contents if role == "user"), None)
        if first is None:
            raise MobileMMError(f"{where}: has files, but no message of a user to stand in front of")
        first[:0] = [{"type": "image"} for _ in paths]
    elif marks != len(paths):
        raise MobileMMError(f'{where}: {len(paths)} files, but {marks} parts of type "image"')
    pictures = iter(paths)
    for _, parts in contents:
        for part in parts:
            if part["type"] == "image":
                part["image"] = str(next(pictures))
    return CalibrationSample(
        tuple(paths), tuple({"role": role, "content": parts} for role, parts in contents)
    )


def _picture(file: str, where: str, folder: Path) -> Path:
    """A file inside the folder; links that lead out of it are refused as paths that do."""
    try:
        path = (folder / file).resolve()
        inside = path.is_relative_to(folder.resolve())
        exists = path.is_file()
    except (OSError, ValueError) as error:
        raise MobileMMError(f"{where}: {one_line(file)}: {one_line(error)}") from error
    if not inside:
        raise MobileMMError(f"{where}: {one_line(file)}: lies outside the folder of the calibration set")
    if not exists:
        raise MobileMMError(f"{where}: {one_line(file)}: no such file")
    return path


def _parts(message: Any, where: str) -> tuple[str, list[dict[str, Any]]]:
    if not isinstance(message, dict) or set(message) != {"role", "content"} or message["role"] not in ROLES:
        raise MobileMMError(f'{where}: must have "role" ({", ".join(ROLES)}) and "content", and no other key')
    content = message["content"]
    if isinstance(content, str):
        return message["role"], [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise MobileMMError(f'{where}: "content" must be text, or a list of parts')
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, dict) and part == {"type": "image"}:
            parts.append({"type": "image"})
        elif (
            isinstance(part, dict)
            and set(part) == {"type", "text"}
            and part["type"] == "text"
            and isinstance(part["text"], str)
        ):
            parts.append(dict(part))
        else:
            raise MobileMMError(f'{where}: a part is {{"type": "text", "text": …}} or {{"type": "image"}}')
    return message["role"], parts
