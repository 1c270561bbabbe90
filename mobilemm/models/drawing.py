"""What a model needs to draw, signal tokens in its vocabulary and an output projector: given and taken."""

from __future__ import annotations

from typing import Any

import torch

from mobilemm.errors import MobileMMError
from mobilemm.models import signal_tokens
from mobilemm.models.modeling import MobileMMForConditionalGeneration, new_output_projector


def learn_to_draw(
    model: MobileMMForConditionalGeneration, processor: Any, count: int, output_projector: dict[str, Any]
) -> None:
    """Adds `count` signal tokens, which mean nothing yet, and a new output projector, to model and processor.

    The tokens' rows start near the mean of the vocabulary's, where no word is likely. An image placeholder
    that has their ids moves behind them.

    Raises MobileMMError when the model draws already, or its tokenizer knows such tokens.
    """
    config = model.config
    if config.signal_token_ids:
        raise MobileMMError("this model has signal tokens already")
    ids = signal_tokens.add_to_tokenizer(processor.tokenizer, count)
    config.signal_token_ids = ids
    if config.image_token_id in ids:
        config.image_token_id = processor.image_token_id = max(config.text_config.vocab_size, ids[-1] + 1)
    table: Any = model.get_input_embeddings().weight
    signals = signal_tokens.new_signal_tokens(config)
    assert signals is not None
    with torch.no_grad():
        for rows in signals.parameters():
            rows.add_(table.mean(0).cpu())
    model.signal_tokens = signals.to(table)
    renew_output_projector(model, output_projector)


def renew_output_projector(model: MobileMMForConditionalGeneration, options: dict[str, Any]) -> None:
    """A model that has signal tokens gets an output projector that has learned nothing yet."""
    model.config.output_projector = dict(options)
    projector = new_output_projector(model.config)
    assert projector is not None
    table: Any = model.get_input_embeddings().weight
    model.output_projector = projector.to(table)


def forget_drawing(model: MobileMMForConditionalGeneration) -> None:
    """Takes signal tokens and output projector away; the tokenizer keeps the words, without a meaning."""
    model.signal_tokens = model.output_projector = None
    model.config.signal_token_ids = model.config.output_projector = None
