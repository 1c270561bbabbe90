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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mobilemm.data.images import open_image
from mobilemm.data.mixture import Encoded, Mixture, ScannedSource, collate, encode
from mobilemm.data.processor import drawings_of
from mobilemm.errors import MobileMMError
from mobilemm.generation.conditions import open_condition_encoder
from mobilemm.generation.generator import read_condition
from mobilemm.models.drawing import forget_drawing, learn_to_draw, renew_output_projector
from mobilemm.models.modeling import IGNORE_INDEX, MobileMMForConditionalGeneration
from mobilemm.models.output_projector import MLPOutputProjector
from mobilemm.training.recipe import Drawing

CONDITIONS, STATES = "conditions.safetensors", "states.safetensors"
STATES_BATCH = 32
Kept = Mapping[str, Mapping[str, Tensor]]
"""By a row's name: what takes the language model's place in its item."""


class DrawingObjective:
    """The likelihood of a batch's answers, and the distance of the conditions of the pictures in it."""

    def __init__(self, settings: Drawing) -> None:
        self.settings = settings
        self.metrics: dict[str, list[float]] = {"text_loss": [], "condition_loss": [], "signal_loss": []}

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Mean loss of the pass; keeps its parts for the log."""
        inputs = dict(inputs)
        wanted: Tensor | None = inputs.pop("conditions", None)
        if "signal_states" in inputs:
            assert wanted is not None
            return self._distance(model, inputs["signal_states"], wanted)
        if "answer_states" in inputs:
            return self._asking(model, inputs)
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

    def _asking(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        signals = getattr(model, "module", model).signal_tokens
        own = signals.logits(inputs["answer_states"])[:, 0]
        loss = asking_loss(own, inputs["other_logits"], inputs["asks"])
        self.metrics["signal_loss"].append(loss.item())
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


def asking_loss(own: Tensor, others: Tensor, asks: Tensor) -> Tensor:
    """L_txt-gen's share that the first signal token's row decides, mean over places.

    Shapes, all (places,): its logit, the logarithm of the sum of all other words' exponentials, and whether
    it is what comes there. With all else frozen, L_txt-gen differs by a constant.
    """
    return nn.functional.softplus(torch.where(asks > 0, others - own, own - others)).mean()


def prepare_to_draw(model: MobileMMForConditionalGeneration, processor: Any, settings: Drawing) -> None:
    """Gives a model that does not draw yet what it needs, of the generator's shape.

    Raises MobileMMError when the generator is not there, or a model's own projector has another shape.
    """
    _, (tokens, width) = read_condition(settings.generator)
    if settings.anew:
        forget_drawing(model)
    options = {"num_tokens": tokens, "width": width, **settings.projector}
    if model.output_projector is None:
        learn_to_draw(model, processor, settings.signal_tokens, options)
    elif settings.new_projector:
        renew_output_projector(model, options)
    projector: Any = model.output_projector
    if (projector.num_tokens, projector.width) != (tokens, width):
        raise MobileMMError(
            f"{settings.generator}: this generator takes a condition of {tokens} × {width}; the model's"
            f" output projector gives {projector.num_tokens} × {projector.width}"
        )


def keep_shares(sources: Sequence[ScannedSource], seed: int) -> None:
    """Of sources with a weight below 1 the same rows in each epoch, since no others' states will be kept."""
    for number, source in enumerate(sources):
        if source.weight < 1:
            share = max(1, round(source.weight * len(source.rows)))
            places = sorted(random.Random(f"{seed}-{number}").sample(range(len(source.rows)), share))
            source.take(places)
            source.weight = 1.0


@torch.no_grad()
def keep_states(
    model: MobileMMForConditionalGeneration,
    mixture: Mixture,
    pad_token_id: int,
    run: Path,
    report: Callable[[str], None] = print,
    asking: bool = False,
) -> Kept:
    """What an output projector learns from, or with `asking` the first signal token, by the rows' names.

    Of each row with drawings `signal_states`, (drawings, tokens, width) in float16; rows without drawings or
    with pictures leave the sources, since nothing is learned from them. With `asking`: of each row
    `answer_states` (places, width), `other_logits` and `asks` (places,), where a place is what an answer's
    token is said behind, up to the first signal token: what comes later depends on what will be learned, and
    is not learned, since all signal tokens are fed when the first is said. Kept in the run's folder.
    """
    rows: dict[str, Encoded] = {}
    for source in mixture.sources:
        places = []
        for place, row in enumerate(source.rows):
            sample = source.source.sample(row, random.Random(0))
            if asking or (drawings_of(sample.messages) and not sample.images):
                try:
                    encoded = encode(mixture.processor, sample, mixture.max_length)
                    for picture in encoded.images if mixture.features is None else ():
                        open_image(picture)
                    rows[sample.name] = encoded
                    places.append(place)
                except MobileMMError as error:
                    source.reasons[str(error)] += 1
        source.take(places)
    assert model.signal_tokens is not None
    ids = {name: row.input_ids for name, row in rows.items()}
    digest = hashlib.sha256(json.dumps([asking, ids]).encode())
    for parameter in model.signal_tokens.parameters():
        digest.update(parameter.detach().float().numpy().tobytes())
    path = run / f"{digest.hexdigest()[:16]}-{STATES}"
    if not path.is_file():
        found: dict[str, Tensor] = {}
        by_length = sorted(rows, key=lambda name: len(rows[name].input_ids))
        for start in range(0, len(by_length), STATES_BATCH):
            names = by_length[start : start + STATES_BATCH]
            batch = collate(
                [mixture.item(rows[name], learns_conditions=False) for name in names], pad_token_id
            )
            look = _answer_states if asking else _signal_states
            for name, kept in zip(names, look(model, batch), strict=True):
                found |= {f"{name}:{kind}": tensor for kind, tensor in kept.items()}
            if start // STATES_BATCH % 16 == 0:
                report(f"the language model's states: {start:,} of {len(by_length):,} rows")
        write_tensors(found, path)
    states: dict[str, dict[str, Tensor]] = {name: {} for name in rows}
    for key, tensor in load_file(path).items():
        name, _, kind = key.rpartition(":")
        states[name][kind] = tensor.float()
    return states


def _signal_states(
    model: MobileMMForConditionalGeneration, batch: dict[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """The rows' common beginning, all of a template's system prompt, goes through the model once."""
    ids, signals = batch["input_ids"], model.signal_tokens
    assert signals is not None
    alike = (ids == ids[:1]).all(0) & ~signals.among(ids).any(0)
    shared = int(alike.int().cumprod(0).sum())
    options: dict[str, Any] = {"output_hidden_states": True, "logits_to_keep": 1}
    if shared:
        cache = model(input_ids=ids[:1, :shared], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(ids))
        options["past_key_values"] = cache
    own = ids[:, shared:]
    outputs = model(input_ids=own, attention_mask=batch["attention_mask"], **options)
    for row, states in zip(own, outputs.hidden_states[-1], strict=True):
        yield {"signal_states": model.signal_states(row[None], states[None]).half()}


def _answer_states(
    model: MobileMMForConditionalGeneration, batch: dict[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    signals = model.signal_tokens
    assert signals is not None
    labels, places = batch.pop("labels"), batch["logits_to_keep"]
    outputs = model(**batch, output_hidden_states=True)
    for row, wanted, logits, hidden in zip(
        batch["input_ids"], labels, outputs.logits, outputs.hidden_states[-1], strict=True
    ):
        before_signals = signals.among(row).cumsum(0)[places] == 0
        learned = before_signals & (wanted[places + 1] != IGNORE_INDEX)
        others = logits[learned].float()
        others[:, signals.first] = -torch.inf
        yield {
            "answer_states": hidden[places[learned]].half(),
            "other_logits": others.logsumexp(-1),
            "asks": (row[places[learned] + 1] == signals.first).float(),
        }


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file that is there when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_suffix(f".{os.getpid()}")
    save_file(tensors, writing)
    writing.replace(path)


def standardize(model: MobileMMForConditionalGeneration, states: Kept) -> None:
    """A new output projector that measures what it reads does so by the states that it will learn from."""
    if isinstance(model.output_projector, MLPOutputProjector):
        model.output_projector.standardize(torch.cat([kept["signal_states"] for kept in states.values()]))


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
        write_tensors({"conditions": encode(ordered).contiguous()}, path)
    return dict(zip(ordered, load_file(path)["conditions"], strict=True))
