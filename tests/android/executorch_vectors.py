"""What Python's session says and draws with bundles for ExecuTorch, for the Android library's tests.

python -m tests.android.executorch_vectors FOLDER BUNDLE... [--pictures 10] [--request "Draw an apple."]
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.answers import pictures
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import open_bundle
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.session import Session
from tests.export.drawing_checkpoint import REQUEST
from tests.ios.drawing import write_drawings

QUESTIONS = ("What is in this picture?", "Describe the picture in one sentence.", "Which colours do you see?")
TURNS: tuple[tuple[list[int], str], ...] = (
    ([0], "What is this?"),
    ([], "Why? Ünsinn…"),
    ([1, 2], "Compare these."),
    ([], "日本語?"),
)


def answers(bundle: Path, files: list[Path]) -> dict[str, Any]:
    """Greedy ones about each picture, and of conversations of several turns, one of them sampled."""
    opened = open_bundle(bundle)
    backend = open_backend(opened, 1)
    asked = []
    for index, file in enumerate(files):
        session = Session(opened, backend, Sampling(max_new_tokens=24))
        session.look_at(file)
        question = QUESTIONS[index % len(QUESTIONS)]
        text = session.reply(question)
        asked.append({"image": file.name, "question": question, "ids": session.answer_ids, "text": text})
    conversations = []
    for sampling in (Sampling(12), Sampling(12, temperature=0.8, top_p=0.95, seed=7)):
        session = Session(opened, backend, sampling)
        turns = []
        for images, question in TURNS:
            for image in images:
                session.look_at(files[image])
            text = session.reply(question)
            assert session.stats is not None
            turns.append(
                {"images": [files[image].name for image in images], "question": question, "text": text}
                | {"ids": session.answer_ids, "cached_tokens": session.stats.cached_tokens}
            )
        conversations.append({"temperature": sampling.temperature, "turns": turns})
    return {"bundle": str(bundle.resolve()), "pictures": asked, "conversations": conversations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--request", default=REQUEST, help="what asks for a drawing")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = []
    for index, picture in enumerate(pictures(arguments.pictures).values()):
        image = picture if isinstance(picture, Image.Image) else Image.open(picture)
        files.append(folder / f"{index}.png")
        image.save(files[-1])
    cases = []
    for bundle in arguments.bundles:
        case = answers(bundle, files)
        drawings = folder / f"drawings-{len(cases)}"
        if open_bundle(bundle).manifest.generation is not None:
            drawings.mkdir()
            write_drawings(bundle, drawings, arguments.request)
            case["drawings"] = drawings.name
        cases.append(case)
    (folder / "answers.json").write_text(json.dumps(cases, ensure_ascii=False), encoding="utf-8")
    print(f"answers: {folder}")


if __name__ == "__main__":
    main()
