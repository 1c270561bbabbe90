"""How inexact requests are: python scripts/write_condition_errors.py RECIPE OUT [KEY=VALUE …]

From the recipe of an output projector (recipes/default/drawing_projector.yaml), behind its run: what its
conditions will be off by for new words. A generator learns to bear that (its recipe's key
`condition_errors`). A third of the captions is left out at a time, and asked of a projector that learned the
others. OUT is safetensors, `errors` (n, tokens, width).
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mobilemm.data.mixture import Mixture
from mobilemm.data.processor import drawings_of
from mobilemm.models.drawing import renew_output_projector
from mobilemm.training.drawing import condition_distance, standardize
from mobilemm.training.recipe import Recipe, read_recipe
from mobilemm.training.stage import open_mixture, prepare

FOLDS, STEPS, BATCH = 3, 2500, 128


def main() -> None:
    """Reads the command line; writes the file."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    recipe = read_recipe(Path(sys.argv[1]), sys.argv[3:])
    if not isinstance(recipe, Recipe) or recipe.drawing is None or not recipe.drawing.cache_states:
        sys.exit(f"{sys.argv[1]}: must be a recipe with drawing.cache_states")
    stage = prepare(recipe)
    mixture = open_mixture(stage)
    rows = [row for number in range(len(mixture.sources)) for row in _rows_of(mixture, number)]
    captions = [caption for caption, _ in rows]
    states = torch.cat([mixture.states[name]["signal_states"] for _, name in rows])
    conditions = torch.stack([mixture.conditions[caption] for caption in captions])
    # Of the first source, the pictures' captions; the others' names are always learned from.
    asked = sorted({caption for caption, _ in _rows_of(mixture, 0)})
    random.Random(recipe.seed).shuffle(asked)
    fold_of = {caption: place % FOLDS for place, caption in enumerate(asked)}
    folds = torch.tensor([fold_of.get(caption, -1) for caption in captions])
    errors = []
    for fold in range(FOLDS):
        torch.manual_seed(recipe.seed + fold)
        renew_output_projector(stage.model, stage.model.config.output_projector)
        standardize(stage.model, mixture.states)
        projector = stage.model.output_projector
        assert projector is not None
        _learn(projector, states, conditions, (folds != fold).nonzero()[:, 0], recipe)
        left_out = (folds == fold).nonzero()[:, 0]
        projector.eval()
        with torch.no_grad():
            errors.append(projector(states[left_out]) - conditions[left_out])
        distance = float(errors[-1].square().sum(-1).mean())
        print(f"fold {fold}: {len(left_out):,} captions left out, squared distance {distance:.3f}")
    save_file({"errors": torch.cat(errors).contiguous()}, sys.argv[2])
    print(f"{sys.argv[2]}: of {len(asked):,} captions")


def _rows_of(mixture: Mixture, number: int) -> list[tuple[str, str]]:
    """Caption and name of each of a source's rows that is one drawing."""
    found = []
    source = mixture.sources[number]
    for row in source.rows:
        sample = source.source.sample(row, random.Random(0))
        drawings = drawings_of(sample.messages)
        if len(drawings) == 1:
            found.append((drawings[0], sample.name))
    return found


def _learn(projector: nn.Module, states: Tensor, conditions: Tensor, places: Tensor, recipe: Recipe) -> None:
    """By L_mse, at the recipe's learning rate, which falls to nothing."""
    rate = recipe.train.output_projector.learning_rate
    optimizer = torch.optim.AdamW(projector.parameters(), rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=STEPS, pct_start=0.05)
    projector.train()
    for _ in range(STEPS):
        chosen = places[torch.randint(0, len(places), (BATCH,))]
        condition_distance(projector(states[chosen]), conditions[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


if __name__ == "__main__":
    main()
