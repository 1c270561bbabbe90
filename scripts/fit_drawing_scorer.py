"""Fits the scorer of `mobilemm eval --task drawing`: python scripts/fit_drawing_scorer.py data/pairs

Ridge regression from EfficientNet-Lite0's features to the sentence embeddings of names, on real drawings of
OpenMoji, each at the encoder's size and at 64 pixels. The names asked for in the evaluation are those of
OpenMoji's validation and test splits: none of them is fitted on. A few minutes of one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mobilemm.data.pairs import Pair, read_pairs
from mobilemm.evaluation.drawing import BATCH, SIDE, SMALL, features, ranked
from mobilemm.generation.conditions import SentenceEncoder
from mobilemm.models.checkpoints.default import pretrained_encoder

SOURCES = ("openmoji",)
RIDGES = (10.0, 100.0, 1000.0, 10000.0)
OUT = Path(__file__).parents[1] / "mobilemm" / "evaluation"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path)
    folder = parser.parse_args().pairs
    pairs = read_pairs(folder)
    asked = [pair for pair in pairs if pair.source == "openmoji" and pair.split != "train"]
    asked = list({pair.caption: pair for pair in asked}.values())
    fitted = [pair for pair in pairs if pair.split == "train" and pair.source in SOURCES]
    taken = {pair.caption for pair in asked}
    fitted = [pair for pair in fitted if pair.caption not in taken]
    encoder = pretrained_encoder()
    full, small = (_features(folder, fitted, encoder, size) for size in (SIDE, SMALL))
    texts = SentenceEncoder()([pair.caption for pair in fitted])[:, 0]

    # λ by names that the trial fit has not seen.
    names = sorted({pair.caption for pair in fitted})
    aside = set(np.random.default_rng(0).permutation(names)[: len(names) // 10].tolist())
    held = torch.tensor([pair.caption in aside for pair in fitted])
    best = max(RIDGES, key=lambda ridge: _trial(full, small, texts, held, ridge))
    weight, bias = _ridge(torch.cat([full, small]), torch.cat([texts, texts]), best)
    scorer = {"weight": weight.half().contiguous(), "bias": bias.half().contiguous()}
    save_file(scorer, OUT / "drawing_scorer.safetensors")

    told = SentenceEncoder()([pair.caption for pair in asked])[:, 0]
    real = {}
    for key, size in (("full", SIDE), (str(SMALL), SMALL)):
        embedded = _features(folder, asked, encoder, size) @ weight.half().float() + bias.half().float()
        cosines = torch.nn.functional.normalize(embedded, dim=-1) @ told.T
        real[key] = float(ranked(cosines, range(len(asked))).mean())
    table = {"real": real, "ridge": best, "fitted_on": len(fitted), "names": [pair.caption for pair in asked]}
    (OUT / "drawing_names.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"λ {best:g}; real pictures: {real}")


def _trial(full: Tensor, small: Tensor, texts: Tensor, held: Tensor, ridge: float) -> float:
    weight, bias = _ridge(
        torch.cat([full[~held], small[~held]]), torch.cat([texts[~held], texts[~held]]), ridge
    )
    found = torch.nn.functional.normalize(full[held] @ weight + bias, dim=-1)
    share = float((found * texts[held]).sum(-1).mean())
    print(f"λ {ridge:g}: cosine {share:.4f}")
    return share


def _ridge(inputs: Tensor, outputs: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """W, b that minimize ‖(x − x̄) W − (y − ȳ)‖² + λ ‖W‖², x W + b being the answer."""
    x, y = inputs.double(), outputs.double()
    mean, middle = x.mean(0), y.mean(0)
    x, y = x - mean, y - middle
    weight = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=torch.float64), x.T @ y)
    return weight.float(), (middle - mean @ weight).float()


def _features(folder: Path, pairs: list[Pair], encoder: object, size: int) -> Tensor:
    found = []
    for at in range(0, len(pairs), BATCH):
        pictures = torch.stack([_picture(folder / pair.image, size) for pair in pairs[at : at + BATCH]])
        found.append(features(encoder, pictures))
        if at % (BATCH * 32) == 0:
            print(f"{size} px: {at} of {len(pairs)}", flush=True)
    return torch.cat(found)


def _picture(path: Path, size: int) -> Tensor:
    """On a white square, at this size; `features` resizes to what the encoder takes."""
    image = Image.open(path).convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


if __name__ == "__main__":
    main()
