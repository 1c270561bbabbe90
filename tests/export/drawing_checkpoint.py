"""A tiny random model that draws when it is asked in one way, with a generator of 16 pixels."""

from __future__ import annotations

from pathlib import Path

import torch

import mobilemm
from mobilemm.models.checkpoints import save
from mobilemm.models.drawing import learn_to_draw
from tests.export.tiny_checkpoint import write_checkpoint
from tests.generation.tiny_generator import write_generator

REQUEST, OTHER = "What is this picture", "is in picture What"
SIGNALS = 3


def write_drawer(folder: Path, tied: bool = True) -> Path:
    """Its head, or table, is made so that REQUEST, and no other words, ask for a drawing."""
    plain = write_checkpoint(folder.with_name(f"{folder.name}-plain"), tied=tied)
    model, processor = mobilemm.load(plain)
    write_generator(folder.with_name(f"{folder.name}-generator"))
    torch.manual_seed(1)
    options = {
        "type": "transformer",
        "num_tokens": 3,
        "width": 16,
        "hidden": 32,
        "layers": 1,
        "normalize": True,
    }
    learn_to_draw(model, processor, SIGNALS, options)
    states, best = [], 0.0
    with torch.no_grad():
        for text in (REQUEST, OTHER):
            asked = [{"role": "user", "content": text}]
            inputs = processor.apply_chat_template(asked, add_generation_prompt=True)
            outputs = model(**inputs, output_hidden_states=True)
            states.append(outputs.hidden_states[-1][0, -1])
            best = max(best, float(outputs.logits[0, -1].max()))
        apart = states[0] - states[1]
        rows = model.signal_tokens.rows if tied else model.signal_tokens.head_rows
        rows.zero_()
        rows[0] = apart / (apart @ states[0]) * best * 1.1
    save(model, folder, processor)
    folder.with_name(f"{folder.name}-generator").rename(folder / "generator")
    return folder
