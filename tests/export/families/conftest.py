"""Every family that export takes apart, as a tiny random model, beside its own image features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaProcessor

import mobilemm
from mobilemm.export.families import split_model
from mobilemm.export.split import SplitModel
from tests.families import conftest as tiny
from tests.models.checkpoints.conftest import (  # noqa: F401
    official_checkpoint,
    official_config,
    offline,
    sentencepiece_model,
)


@dataclass(frozen=True)
class Case:
    """A family's model, taken apart; `reference` is the model that says what is right."""

    name: str
    model: Any
    processor: Any
    reference: Any
    split: SplitModel

    def pixels(self, images: int, seed: int = 0) -> Tensor:
        """Random normalized pixels (images, 3, height, width)."""
        shape = (images, 3, self.split.image.height, self.split.image.width)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """What the reference makes of them: (images, tokens, text width)."""
        kind = self.reference.config.model_type
        if kind == "mobilemm":
            return self.reference.get_image_features(pixels)
        if kind in ("smolvlm", "idefics3"):
            made = self.reference.model.get_image_features(pixels[None]).pooler_output
        elif kind == "qwen2_5_vl":
            patches, rows, columns = tiny.transformers.Qwen2VLImageProcessor().patchify(pixels, 14, 2, 2)
            grid = torch.tensor([[1, rows, columns]] * len(pixels))
            made = self.reference.model.get_image_features(patches.flatten(0, 1), grid).pooler_output
        else:
            made = self.reference.model.get_image_features(pixels).pooler_output
        made = torch.cat(list(made)) if isinstance(made, (list, tuple)) else made
        return made.reshape(len(pixels), -1, made.shape[-1])


# Named, with the kind of official checkpoint each is.
OFFICIAL = {
    "mobilevlm_v1": "ldpnet",
    "mobilevlm_v2": "ldpnetv2",
    "llava_original": "llava-embedded",
    "llava_hf": "llava-hf",
    "llava_transformers": "llava-hf",
}
# Of Qwen2.5-VL a size of whole windows, and one whose last windows are smaller.
THROUGH_TRANSFORMERS = {
    "smolvlm": None,
    "idefics3": None,
    "fast_vlm": None,
    "internvl": None,
    "qwen2_5_vl_112": 112,
    "qwen2_5_vl_84": 84,
}
CASES = (*OFFICIAL, *THROUGH_TRANSFORMERS)


@pytest.fixture(scope="session")
def made() -> dict[str, Case]:
    """Cases once made."""
    return {}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, made: dict[str, Case], tmp_path: Path) -> Case:
    name = request.param
    if name not in made:
        if name in OFFICIAL:
            made[name] = _official(name, request.getfixturevalue("official_checkpoint"))
        else:
            made[name] = _through_transformers(name, tmp_path)
    return made[name]


def _official(name: str, make: Callable[..., Any]) -> Case:
    # onnxruntime's GroupQueryAttention turns heads of a multiple of 16 only.
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    if OFFICIAL[name] == "llava-hf":
        heads = {"text_config": {**official_config("llava-hf")["text_config"], **heads}}
    folder = make(OFFICIAL[name], config=heads).folder
    model, processor = mobilemm.load(folder)
    reference = model
    if OFFICIAL[name] == "llava-hf":
        reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    if name == "llava_transformers":
        model = reference
        processor = LlavaProcessor(
            tiny.transformers.CLIPImageProcessor(
                size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}
            ),
            processor.tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    return Case(name, model, processor, reference, split_model(model, processor))


def _through_transformers(name: str, folder: Path) -> Case:
    size = THROUGH_TRANSFORMERS[name]
    getattr(tiny, name.removesuffix(f"_{size}"))(folder)
    model, processor = mobilemm.load(folder)
    return Case(name, model, processor, model, split_model(model, processor, size))
