"""The likelihood of captions, with the prompt's beginning computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mobilemm.models.modeling import IGNORE_INDEX, MobileMMForConditionalGeneration


class CaptionLoss:
    """Cross-entropy of answers under the frozen language model, with the prompt's beginning computed once."""

    def __init__(self, model: MobileMMForConditionalGeneration, processor: Any) -> None:
        self.model, self.processor = model, processor
        ids, _ = self._encode("?", None)
        prefix = ids[: ids.index(model.config.image_token_id)]
        self.prefix_length = len(prefix)
        self._prefix: list[tuple[Tensor, Tensor]] = []
        if prefix:
            cache = DynamicCache()
            with torch.no_grad():
                model.language_model.base_model(
                    torch.tensor([prefix], device=model.device), past_key_values=cache, use_cache=True
                )
            self._prefix = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr, misc]

    def __call__(self, image_embeds: Tensor, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Sum over each answer's tokens of their negative log-likelihood, and their number: (batch, 2).

        `image_embeds` are (batch, num_image_tokens, text width), with or without a gradient.
        """
        model = self.model
        encoded = [self._encode(*pair) for pair in zip(questions, answers, strict=True)]
        rows = [torch.tensor(ids[self.prefix_length :]) for ids, _ in encoded]
        targets = [torch.tensor(labels[self.prefix_length :]) for _, labels in encoded]
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad(rows, batch_first=True).to(model.device)
        labels = pad(targets, batch_first=True, padding_value=IGNORE_INDEX).to(model.device)
        mask = pad([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
        batch = len(rows)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._prefix):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), layer)
        hidden = model.language_model.base_model(
            inputs_embeds=model.embed(input_ids, image_features=image_embeds),
            attention_mask=torch.cat([mask.new_ones(batch, self.prefix_length), mask], 1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        # Only the supervised positions go through the head, a fifth of the model.
        predicted, wanted = hidden[:, :-1], labels[:, 1:]
        supervised = wanted != IGNORE_INDEX
        logits = model.get_output_embeddings()(predicted[supervised])
        losses = torch.nn.functional.cross_entropy(logits.float(), wanted[supervised], reduction="none")
        total = torch.zeros(batch, device=losses.device).index_add(0, supervised.nonzero()[:, 0], losses)
        return torch.stack([total, supervised.sum(1).to(total)], 1)

    def _encode(self, question: str, answer: str | None) -> tuple[list[int], list[int]]:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        template = self.processor.conversation_template
        return self.processor.encode(template.render(messages), template.add_special_tokens)
