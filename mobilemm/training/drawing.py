"""Learning to draw: when to say the signal tokens, and what their states tell the generator.

L_txt-gen is the likelihood of the answers, the signal tokens among them; L_mse the squared distance between the
output projector's condition and that of the generator's own text encoder, ‖H_X − τ_X(t)‖², learned from captions
alone. Source: Wu et al. 2023, NExT-GPT, arXiv 2309.05519, section 4.2.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mobilemm.data.mixture import ScannedSource
from mobilemm.data.processor import drawings_of
from mobilemm.errors import MobileMMError
from mobilemm.generation.conditions import open_condition_encoder
from mobilemm.generation.generator import read_condition
from mobilemm.models.drawing import learn_to_draw
from mobilemm.models.modeling import MobileMMForConditionalGeneration
from mobilemm.training.recipe import Drawing

CONDITIONS = "conditions.safetensors"


class DrawingObjective:
    """The likelihood of a batch's answers, and the distance of the conditions of the pictures in it."""

    def __init__(self, settings: Drawing) -> None:
        self.settings = settings
        self.metrics: dict[str, list[float]] = {"text_loss": [], "condition_loss": []}

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Mean loss of the pass; keeps its parts for the log."""
        inputs = dict(inputs)
        wanted: Tensor | None = inputs.pop("conditions", None)
        outputs = model(**inputs, output_hidden_states=True)
        loss: Tensor = outputs.loss
        self.metrics["text_loss"].append(loss.item())
        whole: Any = getattr(model, "module", model)
        if wanted is not None:
            states = whole.signal_states(inputs["input_ids"], outputs.hidden_states[-1])
            distance = condition_distance(whole.output_projector(states), wanted)
            self.metrics["condition_loss"].append(distance.item())
            loss = loss + self.settings.condition_weight * distance
        else:  # each process of several gives every parameter a gradient
            loss = loss + 0.0 * sum(parameter.sum() for parameter in whole.output_projector.parameters())
        return loss

    def pop_metrics(self) -> dict[str, float]:
        """Means since the last call."""
        found = {name: sum(values) / len(values) for name, values in self.metrics.items() if values}
        for values in self.metrics.values():
            values.clear()
        return found


def condition_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """The squared distance of a token's vector from its aim, mean over tokens and pictures.

    Shapes: (pictures, tokens, width) both.
    """
    return (found - wanted).square().sum(-1).mean()


def prepare_to_draw(model: MobileMMForConditionalGeneration, processor: Any, settings: Drawing) -> None:
    """Gives a model that does not draw yet what it needs, of the generator's shape.

    Raises MobileMMError when the generator is not there, or a model's own projector has another shape.
    """
    _, (tokens, width) = read_condition(settings.generator)
    if model.output_projector is None:
        options = {"num_tokens": tokens, "width": width, **settings.projector}
        learn_to_draw(model, processor, settings.signal_tokens, options)
    projector: Any = model.output_projector
    if (projector.num_tokens, projector.width) != (tokens, width):
        raise MobileMMError(
            f"{settings.generator}: this generator takes a condition of {tokens} × {width}; the model's output"
            f" projector gives {projector.num_tokens} × {projector.width}"
        )


def keep_conditions(
    settings: Drawing,
    sources: Sequence[ScannedSource],
    run: Path,
    report: Callable[[str], None] = print,
) -> Mapping[str, Tensor]:
    """Of each caption that is drawn in the data: the generator's text condition; kept in the run's folder."""
    captions = {
        caption
        for source in sources
        for row in source.rows
        for caption in drawings_of(source.source.sample(row, random.Random(0)).messages)
    }
    ordered = sorted(captions)
    name, _ = read_condition(settings.generator)
    digest = hashlib.sha256(json.dumps([name, ordered]).encode()).hexdigest()[:16]
    path = run / f"{digest}-{CONDITIONS}"
    if not path.is_file():
        report(f"encoding {len(ordered):,} captions by {name}")
        encode = open_condition_encoder(settings.generator, name)
        run.mkdir(parents=True, exist_ok=True)
        writing = path.with_suffix(f".{os.getpid()}")
        save_file({"conditions": encode(ordered).contiguous()}, writing)
        writing.replace(path)
    return dict(zip(ordered, load_file(path)["conditions"], strict=True))
