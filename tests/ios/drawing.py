"""A tiny model that draws, as an ONNX bundle, and what Python's session draws with it.

    python -m tests.ios.drawing FOLDER

Weights are random, but for the first signal token's, which answers the question with a drawing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from typer.testing import CliRunner

import mobilemm
from mobilemm.cli import app
from mobilemm.models.checkpoints import save
from mobilemm.models.drawing import learn_to_draw
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import open_bundle
from mobilemm.runtime.drawing import Drawn
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.session import Session
from tests.export.tiny_checkpoint import write_checkpoint
from tests.generation.tiny_generator import write_generator

QUESTION, SEEDS = "What is this", (7, 2**40 + 1)
PROJECTOR = {"type": "mlp", "num_tokens": 3, "width": 16, "hidden": 8}


def write_model(folder: Path) -> Path:
    """Untied, so that the row that scores a signal can be chosen alone."""
    model, processor = mobilemm.load(write_checkpoint(folder / "plain"))
    torch.manual_seed(0)
    learn_to_draw(model, processor, 4, PROJECTOR)
    ids = processor.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    found = model(input_ids=torch.as_tensor(ids["input_ids"]), output_hidden_states=True)
    state = found.hidden_states[-1][0, -1].detach()
    with torch.no_grad():
        row = state / state.norm() ** 2 * found.logits[0, -1].max().abs() * 1.5
        model.signal_tokens.head_rows[0] = row
    save(model, folder / "drawer", processor)
    write_generator(folder / "drawer" / "generator")
    return folder / "drawer"


def write_drawings(bundle: Path, folder: Path) -> None:
    opened = open_bundle(bundle)
    backend = open_backend(opened, 1)
    cases = []
    for seed in SEEDS:
        session = Session(opened, backend, Sampling(max_new_tokens=12, seed=seed))
        pieces = list(session.stream(QUESTION))
        (drawn,) = [piece for piece in pieces if isinstance(piece, Drawn)]
        (folder / f"{seed}.rgb").write_bytes(drawn.picture.tobytes())
        height, width, _ = drawn.picture.shape
        cases.append(
            {
                "question": QUESTION,
                "seed": str(seed),
                "height": height,
                "width": width,
                "file": f"{seed}.rgb",
                "ids": session.answer_ids,
                "text": "".join(pieces),
                "memory": session.messages[-1]["content"][0]["text"],
            }
        )
    (folder / "drawings.json").write_text(json.dumps(cases, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = write_model(folder)
    bundle = folder / "drawer-onnx"
    done = CliRunner().invoke(app, ["export", str(model), "--target", "onnx", "--output", str(bundle)])
    if done.exit_code != 0:
        raise SystemExit(done.output)
    write_drawings(bundle, folder)
    print(f"drawings: {folder}")


if __name__ == "__main__":
    main()
