"""A folder of eight coloured squares and discs with names, and tiny recipes over it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from mobilemm.training.generator.recipe import GENERATOR_RECIPES, GeneratorRecipe
from tests.generation.tiny_generator import write_generator

COLOURS = ("red", "green", "blue", "orange")
RecipeMaker = Callable[..., GeneratorRecipe]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for colour in COLOURS:
        for shape in ("square", "disc"):
            image = Image.new("RGB", (40, 30), "white")
            draw = ImageDraw.Draw(image)
            (draw.rectangle if shape == "square" else draw.ellipse)((8, 3, 32, 27), fill=colour)
            image.save(folder / f"{colour}-{shape}.png")
            row = {
                "image": f"{colour}-{shape}.png",
                "caption": f"{colour} {shape}",
                "keywords": ["shapes" if shape == "square" else "rounds", "plain", "flat"],
                "group": shape,
                "source": "painted",
                "license": "CC0",
                "split": "train",
            }
            rows.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_generator(tmp_path_factory.mktemp("teacher") / "generator", "default", 1, 384)


@pytest.fixture
def make_recipe(pairs: Path, tmp_path: Path, teacher_folder: Path) -> RecipeMaker:
    def make(stage: str, **changes: Any) -> GeneratorRecipe:
        values: dict[str, Any] = {
            "stage": stage,
            "output": tmp_path / "run",
            "cache": pairs.parent / "cache",
            "data": [{"path": pairs}],
            "image_size": 16,
            "max_steps": 6,
            "batch_size": 4,
            "save_every": 2,
            "log_every": 1,
            "warmup_steps": 2,
            "show_samples": 3,
        }
        if stage != "autoencoder":
            values["generator"] = teacher_folder
        recipe: GeneratorRecipe = GENERATOR_RECIPES.validate_python(values | changes)
        return recipe

    return make
