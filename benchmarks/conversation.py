"""A long conversation with a bundle's decoder, against PyTorch with the same quantized weights.

    python -m benchmarks.conversation BUNDLE [--model CHECKPOINT]

A picture and words fill a first prefill of 64; 200 words follow one at a time; then comes a second picture,
with a question, and 40 more words. Words are those of an English text, so that no loop of the model's own
makes them easy. Of all positions that a conversation would read: cosine of the logits, and the share of equal
best tokens. PyTorch's weights are quantized here once more, by the plan that the bundle's manifest tells.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks.answers import DRAWINGS, QUESTION, ROOT
from mobilemm.export.calibration import CalibrationSample, read_calibration
from mobilemm.export.decoder import EagerCache
from mobilemm.export.model import Model, open_model
from mobilemm.export.options import ExportOptions
from mobilemm.export.quantization import QuantizationPlan, make_plan
from mobilemm.export.quantized_parts import QuantizedParts
from mobilemm.export.targets import find_target
from mobilemm.export.verify import cosine
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import open_bundle
from mobilemm.runtime.manifest import Manifest

PREFILL, WORDS, MORE = 64, 200, 40
WORD = {32: "fp32", 16: "fp16", 8: "int8", 6: "int6", 4: "int4"}


def plan_of(manifest: Manifest) -> QuantizationPlan:
    """The plan that a bundle was made by."""
    llm, embed = (manifest.parts[name].quantization for name in ("decoder", "embed"))
    keep = [f"{pattern}={bits}" for pattern, bits in llm.exceptions.items() if pattern != "lm_head"]
    return make_plan(
        WORD[llm.bits],
        embed=WORD[embed.bits],
        method=None if llm.method == "none" else llm.method,
        block_size=llm.block_size,
        symmetric=llm.symmetric,
        keep=keep,
    )


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
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", help="checkpoint that it was made from; left out, the default model")
    given = parser.parse_args()
    bundle = open_bundle(given.bundle)
    target = find_target(bundle.manifest.target)
    options = ExportOptions(
        plan=target.stores(plan_of(bundle.manifest)), context_length=bundle.manifest.model.context_length
    )
    model = open_model(given.model, options)
    quantized, _ = QuantizedParts(model, options, read_calibration(None)).module("decoder")
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
