"""A model's exportable parts: module, named example inputs, dynamic dimensions. Parts know no target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class Part:
    """One exportable part of a model.

    Attributes:
        name: "vision", "embed", "decoder", "output_projector" or "generator".
        module: PyTorch, eager. Its parameters may lie on the meta device while `weights` holds them.
        inputs: example inputs by name, in the order of `module.forward`'s arguments.
        outputs: names of what it returns.
        dynamic: input or output name → {dimension: name of the dynamic dimension}.
        weights: parameter name → tensor in the checkpoint's own dtype, mapped from disk where it can be.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
