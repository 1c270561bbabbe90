"""A bundle's run on the reference: what the Swift package's stand-ins for Core ML and ExecuTorch answer.

    python -m tests.ios.recording BUNDLE PICTURES FOLDER [--short]

The run is a conversation about two pictures, and a drawing where the bundle draws, by Python's session: Core
ML packages on the reference interpreter of MIL, ExecuTorch programs on ExecuTorch's own runtime. Of a bundle
that draws step by step it is a drawing in each of its numbers of steps, with sketches. Each call is written
down whole, into a folder of the bundle's name.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilemm.runtime.backends import Backend
from mobilemm.runtime.bundle import Bundle, open_bundle
from mobilemm.runtime.drawing import Drawn, Sketch
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.session import Session
from tests.export.drawing_checkpoint import REQUEST
from tests.ios import coreml_recording, executorch_recording
from tests.ios.calls import Calls

SEED = 7
TURNS: tuple[tuple[list[str], str], ...] = (
    (["0.png"], "What is in this picture?"),
    ([], "Why?"),
    (["1.png"], "And now?"),
)
SHORT: tuple[tuple[list[str], str], ...] = (
    (["0.png"], "What is in this picture?"),
    ([], "Write a long story about a dog."),
)


def record(bundle: Bundle, pictures: Path, folder: Path, short: bool) -> None:
    """One session's turns; `short` is one picture and few words."""
    calls = Calls(folder)
    backend: coreml_recording.RecordingCoreMLBackend | executorch_recording.RecordingExecutorchBackend
    if bundle.manifest.target == "coreml":
        found: Any = coreml_recording.interfaces(bundle)
        backend = coreml_recording.RecordingCoreMLBackend(bundle, calls)
    else:
        found = executorch_recording.interfaces(bundle)
        backend = executorch_recording.RecordingExecutorchBackend(bundle, calls)
    (folder / "interfaces.json").write_text(json.dumps(found))
    generation = bundle.manifest.generation
    if generation is not None and generation.schedules is not None:
        most = 8
        sessions = [
            draw(bundle, backend, len(rows), Sampling(max_new_tokens=most, seed=SEED), pictures, folder)
            for rows in generation.schedules
        ]
        sizes = [len(one["turns"][0]["drawings"][0]["sketches"]) for one in sessions]
        assert sizes == [len(rows) - 1 for rows in generation.schedules]
    else:
        most = 32 if short else 65
        session = Session(bundle, backend, Sampling(max_new_tokens=most, seed=SEED))
        turns = [converse(session, *turn, pictures, folder) for turn in (SHORT if short else TURNS)]
        assert max(len(turn["ids"]) for turn in turns) >= (8 if short else most)
        if generation is not None:
            session.reset()
            request = "Draw a red apple." if short else REQUEST
            turns.append({"reset": True, **converse(session, [], request, pictures, folder)})
            assert turns[-1]["drawings"]
        sessions = [{"steps": None, "turns": turns}]
    (folder / "calls.json").write_text(json.dumps(calls.made))
    run = {"max_new_tokens": most, "seed": SEED, "sessions": sessions}
    (folder / "run.json").write_text(json.dumps(run, ensure_ascii=False), encoding="utf-8")
    print(f"recording: {len(calls.made)} calls in {folder}")


def draw(
    bundle: Bundle, backend: Backend, steps: int, sampling: Sampling, pictures: Path, folder: Path
) -> dict[str, Any]:
    """A session of its own, which draws in so many steps."""
    session = Session(bundle, backend, sampling, steps=steps, sketches=True)
    return {"steps": steps, "turns": [converse(session, [], REQUEST, pictures, folder)]}


def converse(session: Session, images: list[str], text: str, pictures: Path, folder: Path) -> dict[str, Any]:
    for image in images:
        session.look_at(pictures / image)
    pieces = list(session.stream(text))
    drawings: list[dict[str, Any]] = []
    sketches: list[dict[str, Any]] = []
    for piece in pieces:
        if isinstance(piece, Sketch):
            sketches.append({**kept(piece.picture, folder), "step": piece.step, "steps": piece.steps})
        if isinstance(piece, Drawn):
            drawings.append({**kept(piece.picture, folder), "sketches": sketches})
            sketches = []
    assert not sketches
    ids = session.answer_ids
    return {"images": images, "text": text, "ids": ids, "answer": "".join(pieces), "drawings": drawings}


def kept(picture: NDArray[np.uint8], folder: Path) -> dict[str, Any]:
    height, width, _ = picture.shape
    file = f"drawing-{sum(1 for _ in folder.glob('drawing-*'))}.rgb"
    (folder / file).write_bytes(picture.tobytes())
    return {"file": file, "width": width, "height": height}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pictures", type=Path, help="a folder with 0.png and 1.png")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--short", action="store_true", help="one picture and few words, for large models")
    arguments = parser.parse_args()
    folder = arguments.folder / arguments.bundle.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    record(open_bundle(arguments.bundle), arguments.pictures, folder, arguments.short)


if __name__ == "__main__":
    main()
