"""FastVLM: timm's FastViTHD, two linear layers, Qwen2."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.families.mobilemm import IMAGE_PROCESSORS
from mobilemm.export.families.pictures import clip_tile, expansion, require_size, with_pillow
from mobilemm.export.families.text import language_model
from mobilemm.export.split import SplitModel


class Vision(nn.Module):
    """Normalized pixels (images, 3, size, size) → (images, tokens, text width), tokens in row-major order."""

    def __init__(self, encoder: Any, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector

    def forward(self, pixels: Tensor) -> Tensor:
        dtype = next(weight.dtype for weight in self.parameters() if weight.is_floating_point())
        features = self.encoder.forward_features(pixels.to(dtype))
        return self.projector(features.flatten(2).mT)


def split(model: Any, processor: Any, image_size: int | None = None) -> SplitModel:
    """Of a `FastVlmForConditionalGeneration`. Raises MobileMMError as `split_model` does."""
    tower = model.model.vision_tower
    encoder = getattr(tower, "timm_model", None)
    if not hasattr(encoder, "forward_features"):
        vision = model.config.vision_config
        name = getattr(vision, "architecture", None) or vision.model_type
        raise MobileMMError(f"fast_vlm: vision model {name!r} is unknown to export; known: timm's FastViT")
    processor = with_pillow(processor, "fast_vlm", IMAGE_PROCESSORS)
    image, mean, std = clip_tile(processor.image_processor, "fast_vlm")
    require_size(image_size, image, "fast_vlm")
    prefix, num_tokens, suffix = expansion(processor, model.config.image_token_id, "fast_vlm")
    config, weights = language_model(
        model,
        model.config.text_config,
        {"model.language_model.": "model.", "lm_head.": "lm_head."},
    )
    return SplitModel(
        family="fast_vlm",
        vision=Vision(encoder, model.model.multi_modal_projector).eval(),
        image=image,
        mean=mean,
        std=std,
        num_image_tokens=num_tokens,
        image_token_id=model.config.image_token_id,
        text_config=config,
        text_weights=weights,
        processor=processor,
        image_prefix=prefix,
        image_suffix=suffix,
    )
