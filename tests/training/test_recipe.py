"""Recipes: what is wrong is told with file and key before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from mobilemm.errors import MobileMMError
from mobilemm.training.recipe import read_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
COMPLETE = """
output: out
train: {projector: 1e-3}
data:
  - {format: folder, path: pictures}
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_number_is_a_learning_rate_and_1e_3_is_a_number(tmp_path: Path) -> None:
    recipe = read_recipe(_write(tmp_path, COMPLETE))
    assert recipe.train.projector.learning_rate == 1e-3
    assert recipe.train.language_model.learning_rate == 0


def test_overrides_reach_into_sections_and_lists(tmp_path: Path) -> None:
    recipe = read_recipe(
        _write(tmp_path, COMPLETE),
        [
            "train.language_model.method=lora",
            "train.language_model.learning_rate=2e-4",
            "data.0.weight=0.5",
            "epochs=3",
            "report_to=[]",
        ],
    )
    assert recipe.train.language_model.is_adapter
    assert recipe.train.language_model.learning_rate == 2e-4
    assert (recipe.data[0].weight, recipe.epochs, recipe.report_to) == (0.5, 3, [])


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("epochs=three", "key 'epochs'"),
        ("epoch=3", "key 'epoch'"),
        ("batch_size=0", "key 'batch_size'"),
        ("train.projector=-1", "key 'train.projector.learning_rate'"),
        ("train.projector=0", "nothing would be trained"),
        ("train.projector.method=lora", "'projector' is no section"),
        ("train.decoder=1e-3", "key 'train.decoder'"),
        ("data.0.format=coco", "key 'data.0.format'"),
        ("data.3.weight=1", "'3' is no place in a list of 1"),
        ("data=[]", "key 'data'"),
        ("precision=int8", "key 'precision'"),
        ("seed", "key=value"),
        ("seed=[", "not YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, override: str, named: str) -> None:
    with pytest.raises(MobileMMError) as error:
        read_recipe(_write(tmp_path, COMPLETE), [override])
    assert named in str(error.value)


def test_features_are_kept_only_of_a_frozen_encoder(tmp_path: Path) -> None:
    with pytest.raises(MobileMMError, match=r"recipe.yaml: .*train.vision_encoder"):
        read_recipe(_write(tmp_path, COMPLETE), ["cache_features=true", "train.vision_encoder=1e-5"])


@pytest.mark.parametrize("text", ["- a list", "a: [", ""])
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str) -> None:
    with pytest.raises(MobileMMError, match=r"recipe.yaml: .*YAML"):
        read_recipe(_write(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MobileMMError, match="cannot be read"):
        read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_shipped_recipes_are_valid(path: Path) -> None:
    assert read_recipe(path).data
