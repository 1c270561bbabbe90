"""Learning to draw: when to say the signal tokens, and what their states tell the generator.

L_txt-gen is the likelihood of the answers, the signal tokens among them; L_mse the squared distance between
the output projector's condition and that of the generator's own text encoder, ‖H_X − τ_X(t)‖², learned from
captions alone. Source: Wu et al. 2023, NExT-GPT, arXiv 2309.05519, section 4.2.
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
from mobilemm.data.sources import Sample
from mobilemm.errors import MobileMMError
from mobilemm.generation.conditions import open_condition_encoder
from mobilemm.generation.generator import read_condition
from mobilemm.models.drawing import learn_to_draw
from mobilemm.models.modeling import MobileMMForConditionalGeneration
from mobilemm.training.recipe import Drawing

CONDITIONS, STATES = "conditions.safetensors", "states.safetensors"
STATES_BATCH = 16


class DrawingObjective:
    """The likelihood of a batch's answers, and the distance of the conditions of the pictures in it."""

    def __init__(self, settings: Drawing) -> None:
        self.settings = settings
        self.metrics: dict[str, list[float]] = {"text_loss": [], "condition_loss": []}

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Mean loss of the pass; keeps its parts for the log."""
        inputs = dict(inputs)
        wanted: Tensor | None = inputs.pop("conditions", None)
        if "signal_states" in inputs:
            assert wanted is not None
            return self._distance(model, inputs["signal_states"], wanted)
        outputs = model(**inputs, output_hidden_states=True)
        loss: Tensor = outputs.loss
        self.metrics["text_loss"].append(loss.item())
        whole: Any = getattr(model, "module", model)
        if wanted is not None:
            states = whole.signal_states(inputs["input_ids"], outputs.hidden_states[-1])
            loss = loss + self.settings.condition_weight * self._distance(model, states, wanted)
        else:  # each process of several gives every parameter a gradient
            loss = loss + 0.0 * sum(parameter.sum() for parameter in whole.output_projector.parameters())
        return loss

    def _distance(self, model: Any, states: Tensor, wanted: Tensor) -> Tensor:
        found = getattr(model, "module", model).output_projector(states)
        distance = condition_distance(found, wanted)
        self.metrics["condition_loss"].append(distance.item())
        return distance

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
            f"{settings.generator}: this generator takes a condition of {tokens} × {width}; the model's"
            f" output projector gives {projector.num_tokens} × {projector.width}"
        )


@torch.no_grad()
def keep_states(
    model: MobileMMForConditionalGeneration,
    processor: Any,
    sources: Sequence[ScannedSource],
    run: Path,
    report: Callable[[str], None] = print,
) -> Mapping[str, Tensor]:
    """Of each row with drawings, by its name: their signal tokens' states (drawings, tokens, width), float16.

    Rows without drawings leave the sources: nothing is learned from them. Kept in the run's folder.
    """
    rows: dict[str, tuple[Sample, list[int]]] = {}
    for source in sources:
        places = []
        for place, row in enumerate(source.rows):
            sample = source.source.sample(row, random.Random(0))
            if drawings_of(sample.messages) and not sample.images:
                places.append(place)
                rows[sample.name] = (sample, processor.encode_for_training(sample.messages)[0])
        source.rows = [source.rows[place] for place in places]
        source.lengths = [source.lengths[place] for place in places]
    assert model.signal_tokens is not None
    digest = hashlib.sha256(json.dumps([[name, ids] for name, (_, ids) in rows.items()]).encode())
    digest.update(model.signal_tokens.rows.detach().float().numpy().tobytes())
    path = run / f"{digest.hexdigest()[:16]}-{STATES}"
    if not path.is_file():
        found: dict[str, Tensor] = {}
        by_length = sorted(rows, key=lambda name: len(rows[name][1]))
        for start in range(0, len(by_length), STATES_BATCH):
            names = by_length[start : start + STATES_BATCH]
            ids = [torch.tensor(rows[name][1]) for name in names]
            batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            lengths = torch.tensor([len(one) for one in ids])
            mask = (torch.arange(batch.shape[1]) < lengths[:, None]).long()
            hidden = model(
                input_ids=batch, attention_mask=mask, output_hidden_states=True, logits_to_keep=1
            ).hidden_states[-1]
            for name, row, states in zip(names, batch, hidden, strict=True):
                found[name] = model.signal_states(row[None], states[None]).half()
            if start // STATES_BATCH % 16 == 0:
                report(f"states of signal tokens: {start:,} of {len(by_length):,} rows")
        _write(found, path)
    return {name: tensor.float() for name, tensor in load_file(path).items()}


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_suffix(f".{os.getpid()}")
    save_file(tensors, writing)
    writing.replace(path)


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
        _write({"conditions": encode(ordered).contiguous()}, path)
    return dict(zip(ordered, load_file(path)["conditions"], strict=True))
