"""LLaVA-1.5 as transformers' own class, through mobilemm's encoder and projector."""

from __future__ import annotations

from typing import Any

from torch import nn

from mobilemm.errors import MobileMMError
from mobilemm.export.families.mobilemm import IMAGE_PROCESSORS, EncoderAndProjector
from mobilemm.export.families.pictures import clip_tile, expansion, require_size, with_pillow
from mobilemm.export.families.text import language_model
from mobilemm.export.split import SplitModel
from mobilemm.models.configuration import MobileMMConfig

# Towers whose hidden states are counted as mobilemm counts them.
VISION_MODELS = ("clip_vision_model", "siglip_vision_model")


def split(model: Any, processor: Any, image_size: int | None = None) -> SplitModel:
    """Of a `LlavaForConditionalGeneration`. Raises MobileMMError as `split_model` does."""
    processor = with_pillow(processor, "llava", IMAGE_PROCESSORS)
    image, mean, std = clip_tile(processor.image_processor, "llava")
    require_size(image_size, image, "llava")
    prefix, num_tokens, suffix = expansion(processor, model.config.image_token_id, "llava")
    config, weights = language_model(
        model,
        model.config.text_config,
        {"model.language_model.": "model.", "lm_head.": "lm_head."},
    )
    return SplitModel(
        family="llava",
        vision=_vision(model).eval(),
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


def _vision(model: Any) -> nn.Module:
    from mobilemm.models.checkpoints.reading import build_empty, encoder_state

    theirs = model.config
    if theirs.vision_config.model_type not in VISION_MODELS:
        raise MobileMMError(
            f"llava: vision model {theirs.vision_config.model_type!r} is unknown to export; known:"
            f" {', '.join(VISION_MODELS)}"
        )
    layer = theirs.vision_feature_layer
    if not isinstance(layer, int) or layer == 0 or layer == -1:
        raise MobileMMError(
            f"llava: vision_feature_layer {layer!r} is unknown to export; known: one layer before the last"
        )
    if theirs.projector_hidden_act != "gelu" or not theirs.multimodal_projector_bias:
        raise MobileMMError(
            f"llava: a projector with activation {theirs.projector_hidden_act!r} and bias"
            f" {theirs.multimodal_projector_bias} is unknown to export; known: 'gelu' with bias"
        )
    config = MobileMMConfig(  # from copies: a config takes its parts over and changes them
        vision_config=theirs.vision_config.to_dict(),
        text_config=theirs.text_config.to_dict(),
        image_size=theirs.vision_config.image_size,
        vision_feature_layer=layer,
        vision_feature_select_strategy=theirs.vision_feature_select_strategy,
        projector={"type": "mlp2x_gelu"},
    )
    ours = build_empty(config)
    state = encoder_state(model.model.vision_tower, config)
    ours.load_state_dict(state, strict=False, assign=True)
    given = model.model.multi_modal_projector
    ours.projector[0], ours.projector[2] = given.linear_1, given.linear_2
    return EncoderAndProjector(ours.vision_encoder, ours.projector)
