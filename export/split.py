"""A model of any supported family, taken apart into what the exportable parts are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mobilemm.runtime.manifest import Image


@dataclass(frozen=True)
class SplitModel:
    """What a family gives to the export: a vision module, and a language model's config and weights.

    Attributes:
        family: its name, as in `mobilemm.export.families`.
        vision: normalized pixels, float (images, 3, height, width) → (images, num_image_tokens, text width):
            the encoder without layers that nothing uses, and the projector. None of a language model alone.
        image: how a picture becomes pixels; likewise.
        mean, std: the normalization of pixels scaled to 0…1, one number a channel.
        num_image_tokens: positions that one picture takes.
        image_token_id: the placeholder of such a position in `input_ids`.
        text_config: transformers' config of the language model.
        text_weights: its tensors under the names of transformers' causal LM classes
            (`model.embed_tokens.weight`, `model.layers.0.…`, `model.norm.weight`, and `lm_head.weight` if
            untied), mapped from disk where the checkpoint allows it.
        processor: transformers' or our processor, for tokenizer and chat template.
        signal_token_ids: of a model that draws; their rows are in `text_weights`.
        output_projector: of a model that draws: last hidden states of the signal tokens (pictures, tokens,
            text width) → the generator's condition.
        generator: of a model that draws, its `mobilemm.generation.generator.Generator`.
        image_prefix, image_suffix: text around a picture's placeholders, beside what the template writes.
    """

    family: str
    vision: nn.Module | None
    image: Image | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    num_image_tokens: int
    image_token_id: int
    text_config: Any
    text_weights: Mapping[str, Tensor]
    processor: Any
    signal_token_ids: tuple[int, ...] = ()
    output_projector: nn.Module | None = None
    generator: Any = None
    image_prefix: str = ""
    image_suffix: str = ""


Splitter = Callable[[Any, Any], SplitModel]
