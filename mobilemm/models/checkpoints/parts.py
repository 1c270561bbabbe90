"""A new multimodal LLM from pretrained parts: any vision encoder, any causal LM, a fresh projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, TimmWrapperConfig

from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints.processors import make_processor, read_tokenizer
from mobilemm.models.checkpoints.reading import Loaded, build_empty, encoder_state, set_generation_config
from mobilemm.models.checkpoints.towers import find_tower
from mobilemm.models.configuration import MobileMMConfig
from mobilemm.models.modeling import MobileMMForConditionalGeneration, new_projector


def compose(
    vision: str | Path,
    language_model: str | Path,
    projector: str | dict[str, Any] = "ldpnetv2",
    *,
    vision_feature_layer: int = -2,
    image_size: int | None = None,
    template: str = "tokenizer",
    dtype: torch.dtype = torch.float32,
) -> Loaded:
    """Encoder and language model with their pretrained weights, joined by an untrained projector.

    Args:
        vision: folder or hub id of a transformers vision model, or `timm/NAME` for a timm model.
        language_model: folder or hub id of a transformers causal LM, with its tokenizer.
        projector: a projector's name, or {"type": name, …options}.
        vision_feature_layer: as in `MobileMMConfig`; -1 is the encoder's output.
        image_size: side of the input in pixels, where the encoder can take another than its own.

    Raises MobileMMError when a part is not to be had or the parts do not fit.
    """
    text = _pretrained(AutoModelForCausalLM, language_model, dtype)
    tokenizer = read_tokenizer(language_model)
    name = str(vision)
    vision_config: PreTrainedConfig
    if name.startswith("timm/"):
        encoder, vision_config, mean, std = _timm(name.removeprefix("timm/"), image_size)
    else:
        tower = find_tower(name, Path())
        encoder = _pretrained(AutoModel, vision, dtype, tower.config)
        vision_config, mean, std = tower.config, tower.image_mean, tower.image_std
    config = MobileMMConfig(
        vision_config=vision_config,
        text_config=text.config,
        image_size=image_size,  # type: ignore[arg-type]  # None is the encoder's own
        vision_feature_layer=vision_feature_layer,
        projector={"type": projector} if isinstance(projector, str) else projector,
        template=template,
    )
    if name.startswith("timm/"):
        given = encoder.state_dict()
        wanted = build_empty(config).vision_encoder.model.state_dict()
        absent = [key for key in wanted if key not in given]
        if absent:
            raise MobileMMError(f"{name}: no pretrained tensor {absent[0]!r}")
        vision_state = {f"vision_encoder.model.{key}": given[key] for key in wanted}
    else:
        vision_state = encoder_state(encoder, config)
    model = assemble(config, vision_state, text.state_dict(), dtype=dtype)
    return Loaded(model, make_processor(model, tokenizer, mean, std))


def assemble(
    config: MobileMMConfig,
    vision_state: dict[str, Tensor],
    text_state: dict[str, Tensor],
    projector_state: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> MobileMMForConditionalGeneration:
    """The model of `config` with the given weights; a projector without weights is initialized anew."""
    model = build_empty(config)
    if projector_state is None:
        projector_state = new_projector(config, model.vision_encoder).state_dict()
    state = {
        **vision_state,
        **{f"language_model.{name}": tensor for name, tensor in text_state.items()},
        **{f"projector.{name}": tensor for name, tensor in projector_state.items()},
    }
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()
    }
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    lacking = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if lacking:
        raise MobileMMError(f"no weights for {lacking[0]!r}")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    config.dtype = dtype
    set_generation_config(model)
    return model


def _pretrained(
    auto: Any, name: str | Path, dtype: torch.dtype, config: PreTrainedConfig | None = None
) -> Any:
    try:
        return auto.from_pretrained(name, dtype=dtype, **({"config": config} if config is not None else {}))
    except (OSError, ValueError) as error:
        raise MobileMMError(f"{name}: no model here: {str(error).splitlines()[0]}") from error


def _timm(name: str, image_size: int | None) -> tuple[Any, TimmWrapperConfig, list[float], list[float]]:
    import timm

    architecture = name.split(".")[0]
    try:
        encoder = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, OSError) as error:
        raise MobileMMError(f"timm/{name}: {str(error).splitlines()[0]}") from error
    cfg: Any = encoder.pretrained_cfg
    return encoder, TimmWrapperConfig(architecture=architecture), list(cfg["mean"]), list(cfg["std"])
