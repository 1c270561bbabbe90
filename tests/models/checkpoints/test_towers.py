"""Vision towers: a folder relative to the checkpoint or absolute, whole CLIP models, known hub ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

import mobilemm
from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints.towers import KNOWN_TOWERS, find_tower

Make = Callable[..., Any]


def encoder_state(model: Any) -> dict[str, torch.Tensor]:
    return model.vision_encoder.state_dict()


def test_relative_and_absolute_folders_are_the_same(official_checkpoint: Make, tmp_path: Path) -> None:
    official = official_checkpoint("llava")
    relative = encoder_state(mobilemm.load(official.folder).model)
    moved = official.tower_folder.rename(tmp_path / "elsewhere")
    config = official.folder / "config.json"
    for name in (str(moved), "../elsewhere"):
        config.write_text(json.dumps(official.config | {"mm_vision_tower": name}), encoding="utf-8")
        absolute = encoder_state(mobilemm.load(official.folder).model)
        assert all(torch.equal(relative[key], absolute[key]) for key in relative)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_whole_clip_model_as_openai_published_it(official_checkpoint: Make, form: str) -> None:
    """config.json of both towers, weights of both under `vision_model.` and `text_model.`."""
    official = official_checkpoint("llava")
    expected = encoder_state(mobilemm.load(official.folder).model)
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 99,
    }
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=official.tower_config, projection_dim=8))
    state = {
        name: tensor for name, tensor in clip.state_dict().items() if not name.startswith("vision_model.")
    }
    state |= {f"vision_model.{name}": tensor for name, tensor in official.tower.items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(37)[None]
    folder = official.tower_folder
    config = clip.config.to_dict() | {"architectures": ["CLIPModel"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors").unlink()
    if form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    found = encoder_state(mobilemm.load(official.folder).model)
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_tower_takes_the_type_of_the_checkpoint(official_checkpoint: Make) -> None:
    official = official_checkpoint("llava", dtype=torch.bfloat16)
    save_file(
        {f"vision_model.{name}": tensor.float() for name, tensor in official.tower.items()},
        official.tower_folder / "model.safetensors",
    )
    model, _ = mobilemm.load(official.folder)
    model(input_ids=torch.tensor([[1, -200, 5]]), pixel_values=torch.randn(1, 3, 24, 24))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", sorted(KNOWN_TOWERS))
def test_known_towers_need_no_network(name: str, tmp_path: Path) -> None:
    tower = find_tower(name, tmp_path)
    assert tower.folder is None
    assert tower.config.image_size in (224, 336, 384)
    patch = int(name.partition("patch")[2][:2])
    assert tower.config.patch_size == patch
    assert tower.image_mean[0] == (0.5 if "siglip" in name else 0.48145466)


def test_an_unknown_tower_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(MobileMMError, match=r"'nobody/nothing'.*openai/clip-vit-large-patch14-336"):
        find_tower("nobody/nothing", tmp_path)


def test_a_known_tower_that_cannot_be_fetched(official_checkpoint: Make) -> None:
    """Its config is known, its weights are not here."""
    official = official_checkpoint("llava", config={"mm_vision_tower": "openai/clip-vit-base-patch32"})
    wide = {"model.mm_projector.0.weight": torch.ones(32, 768)}
    torch.save({**official.tensors, **wide}, official.folder / "pytorch_model.bin")
    with pytest.raises(MobileMMError, match=r"'openai/clip-vit-base-patch32' could not be had") as error:
        mobilemm.load(official.folder)
    assert "\n" not in str(error.value)
