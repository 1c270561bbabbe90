"""Language models, alone and inside multimodal ones: config, and weights under a causal LM's names."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from mobilemm.export.split import SplitModel


def split(model: Any, processor: Any) -> SplitModel:
    """Of a causal LM by itself; `processor` is a `TextProcessor`."""
    config, weights = language_model(model, model.config, {"": ""})
    return SplitModel(
        family=config.model_type,
        vision=None,
        image=None,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        num_image_tokens=0,
        image_token_id=config.vocab_size,  # no word's
        text_config=config,
        text_weights=weights,
        processor=processor,
    )


def language_model(model: Any, config: Any, prefixes: dict[str, str]) -> tuple[Any, dict[str, Tensor]]:
    """Config and weights of a language model, as transformers' causal LM class of that config names them.

    Args:
        model: the whole model; its tensors are referred to, not copied.
        config: its language model's config; a copy is returned whose `tie_word_embeddings` is what the model
            really does, whatever the checkpoint says on either level.
        prefixes: beginnings of the model's tensor names → what stands there instead; other tensors are left
            out, and of a tied head `lm_head.weight`.
    """
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    weights = {}
    for name, tensor in model.state_dict().items():
        for prefix, instead in prefixes.items():
            if name.startswith(prefix):
                weights[instead + name.removeprefix(prefix)] = tensor
                break
    if tied:
        weights.pop("lm_head.weight", None)
    config = copy.deepcopy(config)
    config.tie_word_embeddings = tied
    return config, weights
