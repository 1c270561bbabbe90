"""Preference tuning: of two answers to a question about the same pictures, the chosen one gains.

DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7), IPO (Azar et al. 2023, arXiv 2310.12036)
and, with `sft_weight`, the sum of preference and generation losses that MPO has (Wang et al. 2024, arXiv
2411.10442, equation 2, without its quality term).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mobilemm.models.modeling import IGNORE_INDEX, MobileMMForConditionalGeneration
from mobilemm.training.recipe import Preferences


class PreferenceObjective:
    """The loss of a batch whose first half are chosen answers, whose second half the rejected ones.

    Args:
        model: as it is before anything learns; a frozen copy of it is the reference.
        settings: the recipe's.
    """

    def __init__(self, model: MobileMMForConditionalGeneration, settings: Preferences) -> None:
        self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        self.settings = settings
        self.metrics: dict[str, list[float]] = {"margin": [], "chosen_preferred": []}

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Mean loss over the pairs; keeps the margins for the log."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        policy, counts = log_likelihoods(model, inputs, labels)
        self.reference.to(labels.device)
        with torch.no_grad():
            reference, _ = log_likelihoods(self.reference, inputs, labels)
        pairs = len(labels) // 2
        gains = policy - reference
        margin = gains[:pairs] - gains[pairs:]
        self.metrics["margin"].append(self.settings.beta * margin.detach().mean().item())
        self.metrics["chosen_preferred"].append((margin.detach() > 0).float().mean().item())
        if self.settings.loss == "ipo":
            per_token = gains / counts
            loss = (per_token[:pairs] - per_token[pairs:] - 1 / (2 * self.settings.beta)).square()
        else:
            loss = -nn.functional.logsigmoid(self.settings.beta * margin)
        if self.settings.sft_weight:
            loss = loss - self.settings.sft_weight * policy[:pairs] / counts[:pairs]
        return loss.mean()

    def pop_metrics(self) -> dict[str, float]:
        """Means since the last call."""
        found = {name: sum(values) / len(values) for name, values in self.metrics.items() if values}
        for values in self.metrics.values():
            values.clear()
        return found


def log_likelihoods(model: Any, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row's supervised tokens the summed log-likelihood, and their number; both (batch,)."""
    kept = inputs["logits_to_keep"]
    wanted = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:][:, kept]
    logits = model(**inputs).logits.float()
    losses = nn.functional.cross_entropy(logits.mT, wanted, reduction="none", ignore_index=IGNORE_INDEX)
    return -losses.sum(1), (wanted != IGNORE_INDEX).sum(1)
