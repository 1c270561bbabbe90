"""A long conversation with an exported decoder, against PyTorch with the same quantized weights.

    python -m benchmarks.conversation FOLDER [--target coreml] [--dtype int4] [--model CHECKPOINT]

Exports to FOLDER, since codes made elsewhere may differ in their last bits. A picture and words fill a first
prefill of 64; 200 words follow one at a time; then comes a second picture, with a question, and 40 more
words. Words are those of an English text, so that no loop of the model's own makes them easy. Of all
positions that a conversation would read: cosine of the logits, and the share of equal best tokens.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.answers import DRAWINGS, QUESTION, ROOT
from mobilemm.export.assemble import codes_of, export_bundles
from mobilemm.export.calibration import CalibrationSample, read_calibration
from mobilemm.export.decoder import EagerCache
from mobilemm.export.model import Model, open_model
from mobilemm.export.options import ExportOptions
from mobilemm.export.quantization import QuantizedLinear, make_plan
from mobilemm.export.quantized_parts import QuantizedParts
from mobilemm.export.targets import Target, find_target
from mobilemm.export.verify import cosine
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import Bundle

PREFILL, WORDS, MORE = 64, 200, 40


def conversation(model: Model) -> tuple[torch.Tensor, list[int]]:
    """Input embeddings (1, length, width), and the lengths of the pieces that they are fed in."""
    tokenizer = model.tokenizer
    text = (ROOT / "tests" / "assets" / "english.txt").read_text(encoding="utf-8")
    words = tokenizer.encode([{"role": "user", "content": [{"type": "text", "text": text}]}])
    pieces = []
    begin = 0
    for drawing, length, following in (("house.png", PREFILL, WORDS), ("fish.png", None, MORE)):
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        sample = CalibrationSample((DRAWINGS / drawing,), ({"role": "user", "content": content},))
        ids, pictures = model.encode(sample)
        if length is not None:
            filling = length - len(ids)
            ids, begin = [*ids, *words[begin : begin + filling]], begin + filling
        pieces.append(model.embed(ids, pictures))
        pieces += model.embed(words[begin : begin + following], []).split(1, 1)
        begin += following
    return torch.cat(pieces, 1), [piece.shape[1] for piece in pieces]


def main() -> None:
    """Reads the command line; prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the bundle goes, and stays")
    parser.add_argument("--model", help="left out, the default model")
    parser.add_argument("--target", default="coreml")
    parser.add_argument("--dtype", default="int4", help="of the language model")
    given = parser.parse_args()
    target = find_target(given.target)
    options = ExportOptions(plan=make_plan(given.dtype))
    # Codes are in the store as long as the export has not gone on behind its last bundle.
    for result in export_bundles(given.model, [(target, given.folder)], options):
        compare(given.model, target, options, result.bundle)


def compare(source: str | None, target: Target, options: ExportOptions, bundle: Bundle) -> None:
    """Prints the figures of one bundle."""
    context = bundle.manifest.model.context_length
    stored = replace(options, plan=target.stores(options.plan), context_length=context)
    model = open_model(source, stored)
    told: list[str] = []
    store = codes_of(bundle.folder)
    quantized, _ = QuantizedParts(model, stored, read_calibration(None), store, told.append).module("decoder")
    if any(isinstance(one, QuantizedLinear) for one in quantized.modules()):
        assert "decoder: quantized already" in told, "these are not the bundle's codes"
    embeds, lengths = conversation(model)
    read = np.cumsum(lengths) - 1
    with torch.no_grad():
        wanted = quantized(embeds, EagerCache())[0, torch.from_numpy(read)].numpy()
    decoder = open_backend(bundle).decoder()
    found = np.stack([decoder.decode(piece.numpy())[0, -1] for piece in embeds.split(lengths, 1)])
    least = min(cosine(one, other) for one, other in zip(found, wanted, strict=True))
    rows, chosen = np.arange(len(found)), found.argmax(-1)
    margins = wanted.max(-1) - wanted[rows, chosen]
    print(f"{len(found)} positions read of {embeds.shape[1]}")
    print(f"cosine {cosine(found, wanted):.6f}, of one position at least {least:.6f}")
    print(f"best token the same at {(margins == 0).mean():.1%}; margins elsewhere: {margins[margins > 0]}")


if __name__ == "__main__":
    main()
