"""The beginning that all prompts share (system words), run once through a frozen language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mobilemm.data.mixture import Mixture

PROBED = 64


class SharedPrefix:
    """Keys and values of the ids that stand in front of every sample, given to each batch instead of them.

    Only for a language model that does not learn: else they would be other ones after each step.
    """

    def __init__(self, language_model: nn.Module, ids: list[int]) -> None:
        self.ids = ids
        cache = DynamicCache()
        was_training = language_model.training
        language_model.eval()
        device = next(language_model.parameters()).device
        with torch.no_grad():
            language_model(torch.tensor([ids], device=device), past_key_values=cache, use_cache=True)
        language_model.train(was_training)
        self._layers: list[tuple[Tensor, Tensor]] = [
            (layer.keys, layer.values)  # type: ignore[union-attr, misc]
            for layer in cache.layers
        ]

    def take_off(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with a cache in place of these ids; as it is, where a row begins otherwise."""
        length = len(self.ids)
        ids = inputs["input_ids"]
        if not torch.equal(ids[:, :length], ids.new_tensor([self.ids]).expand(len(ids), -1)):
            return inputs
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._layers):
            shape = (len(ids), -1, -1, -1)
            cache.update(keys.to(ids.device).expand(shape), values.to(ids.device).expand(shape), layer)
        return inputs | {
            "input_ids": ids[:, length:],
            "labels": inputs["labels"][:, length:],
            "logits_to_keep": inputs["logits_to_keep"] - length,
            "past_key_values": cache,
            "use_cache": True,
        }


def common_prefix(mixture: Mixture, image_token_id: int) -> list[int]:
    """The ids with which the first samples of a run all begin, none of them supervised or a picture's."""
    shared: list[int] | None = None
    for place in range(min(PROBED, len(mixture))):
        item = mixture[place]
        end = next(
            index
            for index, (token, label) in enumerate(zip(item["input_ids"], item["labels"], strict=True))
            if label >= 0 or token == image_token_id
        )
        ids = item["input_ids"][:end]
        if shared is None:
            shared = ids
        same = 0
        while same < min(len(ids), len(shared)) and ids[same] == shared[same]:
            same += 1
        shared = shared[:same]
    # The token before the first supervised one predicts it, and must stay.
    return (shared or [])[:-1]
