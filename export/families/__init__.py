"""Model families: each takes a loaded model apart into what the exportable parts are made of.

A new family is one file with a `split` and one line in `FAMILIES`.
"""

from __future__ import annotations

import importlib
from typing import Any

from mobilemm.errors import MobileMMError
from mobilemm.export.families import text
from mobilemm.export.split import SplitModel
from mobilemm.models.checkpoints.text_model import TextProcessor

# transformers' model_type → the module here whose `split` takes it.
FAMILIES = {
    "mobilemm": "mobilemm",
    "llava": "llava",
    "smolvlm": "smolvlm",
    "idefics3": "smolvlm",
    "fast_vlm": "fast_vlm",
    "internvl": "internvl",
    "qwen2_5_vl": "qwen2_5_vl",
}


def split_model(model: Any, processor: Any, image_size: int | None = None) -> SplitModel:
    """Takes a model of any supported family apart, for pictures of one tile each.

    Args:
        model, processor: as `mobilemm.load` gives them, or `load_text_model`. Neither is changed; modules and
            weights are shared.
        image_size: side of the square that pictures are made, in pixels, for families that leave it open
            (Qwen2.5-VL); of the others, None or their own.

    Raises MobileMMError naming the piece that export does not know (model_type, vision model, projector,
    image processor), or when model and processor do not agree on the number of tokens of a picture.
    """
    if isinstance(processor, TextProcessor):
        if image_size is not None:
            raise MobileMMError(f"--image-size {image_size}: this model takes no pictures; leave it out")
        return text.split(model, processor)
    config = model.config
    module = FAMILIES.get(config.model_type)
    if module is None:
        vision = getattr(getattr(config, "vision_config", None), "model_type", None)
        inside = f" (its vision model is {vision!r})" if vision else ""
        raise MobileMMError(
            f"model_type {config.model_type!r}{inside} cannot be exported: no family here takes it apart;"
            f" supported: {', '.join(FAMILIES)}"
        )
    if model.get_output_embeddings() is None:
        raise MobileMMError(
            f"{type(model).__name__} has no language model head and cannot be exported; load the checkpoint"
            " with mobilemm.load"
        )
    split: SplitModel = importlib.import_module(f"{__name__}.{module}").split(model, processor, image_size)
    made = _num_tokens(split)
    if made != split.num_image_tokens:
        raise MobileMMError(
            f"{split.family}: the vision model makes {made} tokens of a picture, the processor writes"
            f" {split.num_image_tokens} placeholders; the image sizes of config.json and of the processor's"
            " settings do not belong together"
        )
    return split


def _num_tokens(split: SplitModel) -> int:
    """How many tokens the vision module makes of a picture, by shapes alone."""
    import torch
    from torch._subclasses import FakeTensorMode

    assert split.vision is not None
    assert split.image is not None
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        features = split.vision(torch.zeros(1, 3, split.image.height, split.image.width))
    return int(features.shape[1])
