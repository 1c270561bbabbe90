"""What a MobileMM is made of: vision encoder, projector, language model, and how they meet."""

from __future__ import annotations

from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from mobilemm.errors import MobileMMError

# The official code marks one image by one such id in `input_ids`; the model splices the features in.
IMAGE_TOKEN_INDEX = -200


class MobileMMConfig(PreTrainedConfig):
    """Configuration of `MobileMMForConditionalGeneration`.

    Args:
        vision_config: of any transformers vision model, or a `TimmWrapperConfig` that names a timm model.
        text_config: of any transformers causal LM.
        image_size: side of the square input in pixels; left out, the vision config's own.
        vision_feature_layer: which hidden state feeds the projector: -1 is the encoder's output, -2 the
            output of the last layer but one (LLaVA, MobileVLM), 3 the output of the third layer, without
            the final norm where it is not the last. Hierarchical encoders count stages, each before it is
            downsampled. Layers behind the selected one are not built.
        vision_feature_select_strategy: "default" keeps the patch tokens, "full" the class and register tokens
            as well, which projectors that fold the grid cannot take.
        keep_unused_layers: keep the parameters of layers that never run, so that an official checkpoint
            can be written back whole.
        projector: {"type": name, …options}; the names are in `mobilemm.models.projectors`.
        image_token_id: the placeholder that an image's tokens take in `input_ids`; it may lie outside the
            vocabulary (it is never embedded). Left out, the first id behind the vocabulary and the
            signal tokens.
        signal_token_ids: of a model that draws, the ids by which it asks for a picture, one after the other
            (`mobilemm.models.signal_tokens`).
        output_projector: of a model that draws, {"type": name, …options}; the names are in
            `mobilemm.models.output_projector`.
        template: name of the conversation template (`mobilemm.data.templates`).
        checkpoint_layout: the layout this model was read from and is written back to ("mobilevlm", "llava",
            "llava-hf"), with `checkpoint_config`, the foreign config.json as it was.
        vision_tower_stored: False for a checkpoint that only names its vision tower, as LLaVA-1.5 does.

    Raises MobileMMError for a vision_config or text_config that transformers does not know or accept.
    """

    model_type = "mobilemm"
    sub_configs_defaults = {  # noqa: RUF012 (transformers' own name and form)
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: Any = None
    text_config: Any = None
    image_size: int = None  # type: ignore[assignment]  # filled in below
    vision_feature_layer: int = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    keep_unused_layers: bool = False
    projector: dict[str, Any] = None  # type: ignore[assignment]  # filled in below
    image_token_id: int = None  # type: ignore[assignment]  # filled in below
    signal_token_ids: list[int] | None = None
    output_projector: dict[str, Any] | None = None
    template: str = "v1"
    tie_word_embeddings: bool = False
    checkpoint_layout: str | None = None
    checkpoint_config: dict[str, Any] | None = None
    vision_tower_stored: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        try:
            super().__post_init__(**kwargs)
        except (ValueError, StrictDataclassError) as error:
            reason = str(error).partition(" Should contain one of")[0]  # hundreds of names
            raise MobileMMError(f"vision_config or text_config: {reason}") from error
        if self.projector is None:
            self.projector = {"type": "ldpnetv2"}
        if self.image_size is None:
            self.image_size = getattr(self.vision_config, "image_size", None) or 224
        if isinstance(self.image_size, (list, tuple)):
            self.image_size = self.image_size[0]
        if self.image_token_id is None:
            signals = self.signal_token_ids or [-1]
            self.image_token_id = max(self.text_config.vocab_size, signals[-1] + 1)
        if bool(self.signal_token_ids) != bool(self.output_projector):
            raise MobileMMError("signal_token_ids and output_projector: a model has both, or draws nothing")
        # The language model ties its own head; at this level there is nothing to tie.
        self.tie_word_embeddings = False
