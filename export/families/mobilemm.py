"""mobilemm's own model, as which MobileVLM, LLaVA and the default model are read."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.drawing import with_signal_rows
from mobilemm.export.families.pictures import clip_tile, expansion, require_size, with_pillow
from mobilemm.export.families.text import language_model
from mobilemm.export.split import SplitModel
from mobilemm.models.projectors import QFormerProjector
from mobilemm.models.vision_encoder import VisionEncoder

IMAGE_PROCESSORS = ("LlavaImageProcessor", "CLIPImageProcessor")


class EncoderAndProjector(nn.Module):
    """Normalized pixels (images, 3, height, width) → (images, tokens, text width).

    The encoder's layers behind the selected one, which an official checkpoint may carry, are left out.
    """

    def __init__(self, encoder: VisionEncoder, projector: nn.Module) -> None:
        super().__init__()
        self.encoder = copy.copy(encoder)
        self.encoder._modules = {"model": encoder.model, "unused": None}
        self.projector = projector

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projector(self.encoder(pixels.to(self.dtype)))

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return next(weight.dtype for weight in self.parameters() if weight.is_floating_point())


def split(model: Any, processor: Any, image_size: int | None = None) -> SplitModel:
    """Of a `MobileMMForConditionalGeneration`. Raises MobileMMError as `split_model` does."""
    projector = model.projector
    if isinstance(projector, QFormerProjector) and projector.instruction:
        raise MobileMMError(
            "projector 'qformer' with instruction=True reads the user's words beside the picture and cannot"
            " be exported; without instruction it can"
        )
    processor = with_pillow(processor, "mobilemm", IMAGE_PROCESSORS)
    image, mean, std = clip_tile(processor.image_processor, "mobilemm")
    require_size(image_size, image, "mobilemm")
    prefix, num_tokens, suffix = expansion(processor, model.config.image_token_id, "mobilemm")
    config, weights = language_model(model, model.config.text_config, {"language_model.": ""})
    if model.signal_tokens is not None:
        config, weights = with_signal_rows(config, weights, model.signal_tokens)
    return SplitModel(
        family="mobilemm",
        vision=EncoderAndProjector(model.vision_encoder, projector).eval(),
        image=image,
        mean=mean,
        std=std,
        num_image_tokens=num_tokens,
        image_token_id=model.config.image_token_id,
        text_config=config,
        text_weights=weights,
        processor=processor,
        signal_token_ids=tuple(model.config.signal_token_ids or ()),
        output_projector=model.output_projector,
        image_prefix=prefix,
        image_suffix=suffix,
    )
