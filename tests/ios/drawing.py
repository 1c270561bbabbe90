"""A tiny model that draws, as an ONNX bundle, and what Python's session draws with it.

    python -m tests.ios.drawing FOLDER [--also coreml] [--also executorch]

Weights are random, but for the first signal token's, which answers the request with a drawing. In `stepwise`
lies the same with another sampler, exported with --stepwise. `--also` exports both for other targets as well,
in full precision.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from typer.testing import CliRunner

from mobilemm.cli import app
from mobilemm.generation.generator import SETTINGS_FILE
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import open_bundle
from mobilemm.runtime.drawing import Drawn, Sketch
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.session import Session
from tests.export.drawing_checkpoint import REQUEST, write_drawer

SEEDS = (7, 2**40 + 1)
FULL = [word for part in ("llm", "vision", "embed", "generator") for word in (f"--q-{part}", "fp32")]


def write_drawings(bundle: Path, folder: Path, question: str = REQUEST, max_new_tokens: int = 4) -> None:
    opened = open_bundle(bundle)
    backend = open_backend(opened, 1)
    cases = []
    for seed in SEEDS:
        session = Session(opened, backend, Sampling(max_new_tokens=max_new_tokens, seed=seed), sketches=True)
        pieces = list(session.stream(question))
        (drawn,) = [piece for piece in pieces if isinstance(piece, Drawn)]
        (folder / f"{seed}.rgb").write_bytes(drawn.picture.tobytes())
        sketches = {f"{seed}-{piece.step}.rgb": piece for piece in pieces if isinstance(piece, Sketch)}
        for file, sketch in sketches.items():
            (folder / file).write_bytes(sketch.picture.tobytes())
        height, width, _ = drawn.picture.shape
        cases.append(
            {
                "question": question,
                "max_new_tokens": max_new_tokens,
                "seed": str(seed),
                "height": height,
                "width": width,
                "file": f"{seed}.rgb",
                "sketches": list(sketches),
                "ids": session.answer_ids,
                "text": "".join(pieces),
                "memory": session.messages[-1]["content"][0]["text"],
            }
        )
    (folder / "drawings.json").write_text(json.dumps(cases, ensure_ascii=False), encoding="utf-8")


def renewing_noise(model: Path, folder: Path) -> Path:
    """The same model with LCM's sampler, which takes fresh noise at each step."""
    shutil.copytree(model, folder)
    file = folder / "generator" / SETTINGS_FILE
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**settings, "sampler": "lcm"}), encoding="utf-8")
    return folder


def export(model: Path, target: str, bundle: Path, *options: str) -> None:
    words = ["export", str(model), "--target", target, "--output", str(bundle), *options]
    done = CliRunner().invoke(app, words)
    if done.exit_code != 0:
        raise SystemExit(done.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--also", action="append", choices=("coreml", "executorch"), default=[])
    arguments = parser.parse_args()
    folder = arguments.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = write_drawer(folder / "drawer")
    stepwise = folder / "stepwise"
    renewing = renewing_noise(model, stepwise / "drawer")
    for target in ("onnx", *arguments.also):
        options = [] if target == "onnx" else FULL
        # Recordings are found by the bundle's name alone, which must be another then.
        whole, steps = folder / f"drawer-{target}", stepwise / f"stepwise-{target}"
        export(model, target, whole, *options)
        # What does not draw is the same, taken over where it is a file of its own, and was verified.
        shutil.copytree(whole, steps)
        export(renewing, target, steps, *options, "--stepwise", "--force", "--no-verify")
    (stepwise / "stepwise-onnx").rename(stepwise / "drawer-onnx")
    write_drawings(folder / "drawer-onnx", folder)
    write_drawings(stepwise / "drawer-onnx", stepwise)
    print(f"drawings: {folder}")


if __name__ == "__main__":
    main()
