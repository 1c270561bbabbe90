"""Vision towers that official checkpoints name by hub id, so that reading them needs no network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.constants import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints.weights import read_json


@dataclass(frozen=True)
class Tower:
    """A vision tower's configuration, and the mean and standard deviation its pixels are normalized with."""

    config: PreTrainedConfig
    image_mean: list[float]
    image_std: list[float]
    folder: Path | None = None


_CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
_CLIP_B = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_SIGLIP_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
# Hub id → model type and the keys of its published config.json that differ from the class's defaults.
KNOWN_TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "openai/clip-vit-large-patch14-336": ("clip_vision_model", {**_CLIP_L, "image_size": 336}),
    "openai/clip-vit-large-patch14": ("clip_vision_model", {**_CLIP_L, "image_size": 224}),
    "openai/clip-vit-base-patch16": ("clip_vision_model", {**_CLIP_B, "patch_size": 16, "image_size": 224}),
    "openai/clip-vit-base-patch32": ("clip_vision_model", {**_CLIP_B, "patch_size": 32, "image_size": 224}),
    "google/siglip-so400m-patch14-384": ("siglip_vision_model", {**_SIGLIP_SO400M, "image_size": 384}),
    "google/siglip-so400m-patch14-224": ("siglip_vision_model", {**_SIGLIP_SO400M, "image_size": 224}),
    "google/siglip-base-patch16-224": (
        "siglip_vision_model",
        {**_CLIP_B, "patch_size": 16, "image_size": 224},
    ),
}


def find_tower(name: str, checkpoint: Path) -> Tower:
    """The tower that a config's `mm_vision_tower` names: a folder (absolute or relative to the checkpoint),
    a known hub id, or any other hub id.

    Raises MobileMMError when it is none of them.
    """
    folder = checkpoint / name
    if (folder / "config.json").is_file():
        read_json(folder / "config.json")  # a damaged file gets its own clear error
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise MobileMMError(f"{folder / 'config.json'}: no vision tower: {reason}") from error
        return _from_config(config, folder)
    if name in KNOWN_TOWERS:
        model_type, options = KNOWN_TOWERS[name]
        return _from_config(CONFIG_MAPPING[model_type](**options), None)
    try:
        return _from_config(AutoConfig.from_pretrained(name, trust_remote_code=False), None)
    except Exception as error:  # the hub client raises a dozen types
        raise MobileMMError(
            f"{checkpoint / 'config.json'}: mm_vision_tower {name!r} is no folder with a config.json, no"
            f" known tower ({', '.join(KNOWN_TOWERS)}), and could not be had from the hub"
        ) from error


def _from_config(config: Any, folder: Path | None) -> Tower:
    config = getattr(config, "vision_config", config)
    if "siglip" in config.model_type:
        return Tower(config, IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, folder)
    return Tower(config, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, folder)
