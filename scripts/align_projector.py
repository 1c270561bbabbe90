"""Trains the default model's projector.

python scripts/align_projector.py recipes/default/alignment.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints.default import build_default, default_model_folder, shipped_files
from mobilemm.models.checkpoints.reading import load
from mobilemm.models.modeling import new_projector
from mobilemm.training.alignment import align, read_recipe


def main(recipe_path: str) -> None:
    """Runs the recipe from a freshly initialized projector, or goes on from its checkpoint."""
    recipe = read_recipe(Path(recipe_path))
    if (shipped_files() / "projector.safetensors").is_file():
        model, processor = load(default_model_folder())
    else:
        model, processor = build_default(None)
    torch.manual_seed(recipe.seed)
    model.projector = new_projector(model.config, model.vision_encoder)
    result = align(recipe, model, processor, report=lambda line: print(line, flush=True))
    print(f"{result}: copy it to {shipped_files().name}/ in mobilemm/models to ship it")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2] or ["recipes/default/alignment.yaml"])
    except MobileMMError as error:
        sys.exit(f"error: {error}")
