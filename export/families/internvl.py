"""InternVL: InternViT, pixel shuffle, two linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.families.pictures import expansion, require_size, tile, with_pillow
from mobilemm.export.families.text import language_model
from mobilemm.export.split import SplitModel

IMAGE_PROCESSORS = ("GotOcr2ImageProcessor",)


class Vision(nn.Module):
    """Normalized pixels (images, 3, height, width) of the encoder's size → (images, tokens, text width)."""

    def __init__(self, tower: Any, projector: nn.Module, config: Any) -> None:
        super().__init__()
        embeddings, layers = tower.embeddings, tower.encoder.layer
        self.patch_embedding = embeddings.patch_embeddings.projection
        self.cls_token = embeddings.cls_token
        self.position_embeddings = embeddings.position_embeddings
        last = config.vision_feature_layer
        # Hidden state 0 is the embeddings', -1 the last layer's behind the final norm.
        kept = last if last >= 0 else len(layers) + 1 + last
        self.layers = layers[:kept]
        self.layernorm = tower.layernorm if last == -1 else nn.Identity()
        self.first = 1 if config.vision_feature_select_strategy == "default" else 0
        self.grid: tuple[int, int] = embeddings.patch_embeddings.patch_shape
        self.fold = round(1 / config.downsample_ratio)
        self.projector = projector

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).mT
        states = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], 1)
        if self.position_embeddings is not None:
            states = states + self.position_embeddings
        for layer in self.layers:
            states = layer(states)
        states = self.layernorm(states)[:, self.first :]
        rows, columns, width = self.grid[0] // self.fold, self.grid[1] // self.fold, states.shape[-1]
        squares = states.unflatten(1, (rows, self.fold, columns, self.fold)).transpose(2, 3)
        return self.projector(squares.reshape(-1, rows * columns, self.fold**2 * width))


def split(model: Any, processor: Any, image_size: int | None = None) -> SplitModel:
    """Of an `InternVLForConditionalGeneration`, for pictures that are not split.

    Raises MobileMMError as `split_model` does.
    """
    vision = model.config.vision_config
    if vision.model_type != "internvl_vision":
        raise MobileMMError(
            f"internvl: vision model {vision.model_type!r} is unknown to export; known: internvl_vision"
        )
    if not isinstance(model.config.vision_feature_layer, int):
        raise MobileMMError(
            f"internvl: vision_feature_layer {model.config.vision_feature_layer!r} is unknown to export;"
            " known: one layer"
        )
    processor = with_pillow(processor, "internvl", IMAGE_PROCESSORS, crop_to_patches=False)
    processor.images_kwargs = {**processor.images_kwargs, "crop_to_patches": False}
    size = dict(processor.image_processor.size)
    settings = {"height": int(size["height"]), "width": int(size["width"]), "strategy": "stretch"}
    image, mean, std = tile(processor.image_processor, "internvl", **settings)
    require_size(image_size, image, "internvl")
    if (image.height, image.width) != tuple(vision.image_size):
        raise MobileMMError(
            f"internvl: the image processor makes pictures of {image.height}×{image.width}, the vision model"
            f" takes {vision.image_size[0]}×{vision.image_size[1]}; export knows no other size"
        )
    prefix, num_tokens, suffix = expansion(processor, model.config.image_token_id, "internvl")
    config, weights = language_model(
        model,
        model.config.text_config,
        {"model.language_model.": "model.", "lm_head.": "lm_head."},
    )
    return SplitModel(
        family="internvl",
        vision=Vision(model.model.vision_tower, model.model.multi_modal_projector, model.config).eval(),
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
