"""SmolVLM, and Idefics3 from which it comes: SigLIP, pixel shuffle, one linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mobilemm.export.families.pictures import expansion, require_size, tile, with_pillow
from mobilemm.export.families.text import language_model
from mobilemm.export.split import SplitModel

IMAGE_PROCESSORS = ("SmolVLMImageProcessor", "Idefics3ImageProcessor")


class Vision(nn.Module):
    """Normalized pixels (images, 3, size, size) → (images, tokens, text width).

    A tile without padding: no masks, and the place of each patch is a constant.
    """

    position_ids: Tensor

    def __init__(self, vision_model: Any, connector: nn.Module, image_size: int) -> None:
        super().__init__()
        self.patch_embedding = vision_model.embeddings.patch_embedding
        self.position_embedding = vision_model.embeddings.position_embedding
        self.encoder = vision_model.encoder
        self.post_layernorm = vision_model.post_layernorm
        self.connector = connector
        positions = _position_ids(vision_model.embeddings, image_size)
        self.register_buffer("position_ids", positions, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).mT
        states = patches + self.position_embedding(self.position_ids)
        states = self.encoder(inputs_embeds=states, attention_mask=None).last_hidden_state
        return self.connector(self.post_layernorm(states))


def _position_ids(embeddings: Any, image_size: int) -> Tensor:
    """(patches,): each patch's row of the position table, as the model itself finds it for a full tile.

    It rounds fractional coordinates to buckets; to be the same to the last bit, it is asked.
    """
    side = image_size // embeddings.patch_size
    asked: list[Tensor] = []
    handle = embeddings.position_embedding.register_forward_pre_hook(
        lambda module, args: asked.append(args[0].flatten())
    )
    weight = embeddings.patch_embedding.weight
    pixels = torch.zeros(1, 3, image_size, image_size, dtype=weight.dtype, device=weight.device)
    try:
        with torch.no_grad():
            embeddings(pixels, torch.ones(1, side, side, dtype=torch.bool, device=weight.device))
    finally:
        handle.remove()
    return asked[0]


def split(model: Any, processor: Any, image_size: int | None = None) -> SplitModel:
    """Of a SmolVLM or Idefics3 model, for pictures that are not split.

    A picture is stretched to the tile in one step. transformers, with splitting off, resizes twice: to
    `size.longest_edge`, then to the tile; that differs by rounding and by the first step's blur.

    Raises MobileMMError as `split_model` does.
    """
    family = model.config.model_type
    processor = with_pillow(processor, family, IMAGE_PROCESSORS, do_image_splitting=False, do_resize=False)
    side = int(dict(processor.image_processor.max_image_size)["longest_edge"])
    image, mean, std = tile(processor.image_processor, family, height=side, width=side, strategy="stretch")
    require_size(image_size, image, family)
    prefix, num_tokens, suffix = expansion(processor, model.config.image_token_id, family)
    config, weights = language_model(
        model,
        model.config.text_config,
        {"model.text_model.": "model.", "lm_head.": "lm_head."},
    )
    return SplitModel(
        family=family,
        vision=Vision(model.model.vision_model, model.model.connector, side).eval(),
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
