"""Tasks of an evaluation, read from a folder: questions about pictures, and text."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mobilemm.errors import MobileMMError

TASKS = ("multiple-choice", "vqa", "yes-no", "perplexity")
# Asked where an item has no question of its own.
QUESTION = "What is in this picture?"


@dataclass(frozen=True)
class Item:
    """One question about a picture, or with `text` a text to predict.

    `choices` are what is compared, `answer` the index of the right one; in "vqa" all `choices` are right.
    """

    picture: Path | None = None
    question: str = ""
    choices: tuple[str, ...] = ()
    answer: int = 0
    text: str = ""


def held_out() -> Path:
    """The folder that ships: 48 drawings of things that the default model was never trained on."""
    return Path(str(resources.files("mobilemm.evaluation"))) / "held_out"


def read_task(task: str, folder: Path | None = None) -> list[Item]:
    """The items of a task: `TASK.json` in the folder, or `index.json`; of perplexity its `*.txt` files.

    multiple-choice: [{"image", "question"?, "choices": […], "answer": index}]
    yes-no: [{"image", "question", "answer": "yes" or "no"}]
    vqa: [{"image", "question"?, "answers": […] or "answer": text}]; rows of multiple-choice do as well

    Raises MobileMMError naming file and row when something is missing or an image leaves the folder.
    """
    if task not in TASKS:
        raise MobileMMError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    folder = held_out() if folder is None else folder
    if not folder.is_dir():
        raise MobileMMError(f"{folder}: there is no such folder")
    if task == "perplexity":
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.txt"))]
        if not any(text.strip() for text in texts):
            raise MobileMMError(f"{folder}: no text here (*.txt)")
        return [Item(text=text) for text in texts if text.strip()]
    path = folder / f"{task}.json"
    if not path.is_file():
        path = folder / "index.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MobileMMError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise MobileMMError(f"{path}: not valid JSON, or it ends early: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise MobileMMError(f"{path}: a list of items is expected")
    return [_item(task, row, folder, f"{path}, item {number}") for number, row in enumerate(rows)]


def _item(task: str, row: Any, folder: Path, where: str) -> Item:
    if not isinstance(row, dict):
        raise MobileMMError(f"{where}: an object is expected")
    image, question = row.get("image"), row.get("question", QUESTION)
    if not isinstance(image, str) or not image or not isinstance(question, str) or not question:
        raise MobileMMError(f"{where}: 'image' and 'question' must be texts")
    if os.path.isabs(image) or ".." in Path(image).parts:
        raise MobileMMError(f"{where}: {image!r} leaves the folder")
    choices, answer = row.get("choices"), row.get("answer")
    if task == "yes-no":
        if answer not in ("yes", "no"):
            raise MobileMMError(f"{where}: 'answer' must be yes or no")
        return Item(folder / image, question, ("Yes", "No"), int(answer == "no"))
    if choices is not None or task == "multiple-choice":
        if (
            not isinstance(choices, list)
            or len(choices) < 2
            or not all(isinstance(choice, str) and choice for choice in choices)
            or not isinstance(answer, int)
            or isinstance(answer, bool)
            or not 0 <= answer < len(choices)
        ):
            raise MobileMMError(f"{where}: two or more texts 'choices' and an index 'answer' are expected")
        if task == "multiple-choice":
            return Item(folder / image, question, tuple(choices), answer)
        return Item(folder / image, question, (choices[answer],))
    right = row.get("answers", [answer])
    if not isinstance(right, list) or not right or not all(isinstance(text, str) and text for text in right):
        raise MobileMMError(f"{where}: 'answers', a list of texts, or a text 'answer' is expected")
    return Item(folder / image, question, tuple(right))
