"""Training data in the order in which it is learned: sources mixed, planned ahead, encoded when needed.

The whole run's order follows from the seed alone, sample by sample, so that a run can go on anywhere without
having read what lies before, and several processes see together what one would.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mobilemm.data.images import open_image
from mobilemm.data.processor import drawings_of
from mobilemm.data.sources import Sample, SampleSource, UnusableRowError
from mobilemm.errors import MobileMMError
from mobilemm.models.modeling import IGNORE_INDEX

# Batches are made of neighbours in length among so many steps' samples.
STEPS_SORTED_TOGETHER = 32
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Encoded:
    """A sample as the model takes it: ids, labels (-100 where nothing is learned), pictures in order.

    `drawings` are the captions of the pictures that its signal tokens stand for.
    """

    input_ids: list[int]
    labels: list[int]
    images: list[Path | bytes]
    drawings: list[str] = field(default_factory=list)


@dataclass
class ScannedSource:
    """A source with the rows of use in it; `reasons` counts the others."""

    source: SampleSource
    weight: float = 1.0
    rows: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def take(self, places: Sequence[int]) -> None:
        """Keeps these of its rows alone."""
        self.rows = [self.rows[place] for place in places]
        self.lengths = [self.lengths[place] for place in places]

    def leave_out(self, unreadable: Mapping[Path | bytes, str]) -> None:
        """Takes out the rows whose pictures cannot be read, and counts them."""
        for place in reversed(range(len(self.rows))):
            images = self.source.sample(self.rows[place], random.Random(0)).images
            if any(image in unreadable for image in images):
                del self.rows[place], self.lengths[place]
                self.reasons["a picture that cannot be read"] += 1


def scan(source: SampleSource, weight: float, num_image_tokens: int) -> ScannedSource:
    """Looks at each row once, without decoding pictures or tokenizing.

    Raises MobileMMError when no row is of use, with the commonest reason.
    """
    found = ScannedSource(source, weight)
    for row in range(len(source)):
        try:
            sample = source.sample(row, random.Random(0))
        except UnusableRowError as error:
            found.reasons[str(error)] += 1
            continue
        found.rows.append(row)
        images = len(sample.images)
        found.lengths.append(sample.characters // CHARACTERS_PER_TOKEN + images * num_image_tokens)
    if not found.rows:
        reason = found.reasons.most_common(1)[0][0]
        raise MobileMMError(f"{source.name}: none of its {len(source)} rows can be used; mostly: {reason}")
    return found


def plan(
    sources: Sequence[ScannedSource],
    epochs: float,
    step_size: int,
    seed: int,
    max_steps: int | None = None,
    group_by_length: bool = True,
) -> np.ndarray:
    """The order of a whole run: (steps × step_size, 2) of source and place among its rows.

    As many steps as `epochs` take, or `max_steps` where given. In an epoch each source gives `weight` times
    its rows, in an order that only seed and epoch decide. Epochs follow each other without a gap; the last
    step is whole.
    """
    per_epoch = sum(max(1, round(source.weight * len(source.rows))) for source in sources)
    steps = max_steps or max(1, round(epochs * per_epoch / step_size))
    wanted = steps * step_size
    order: list[tuple[int, int]] = []
    epoch = 0
    while len(order) < wanted:
        drawn = []
        for index, source in enumerate(sources):
            draw = random.Random(f"{seed}-{epoch}-{index}")
            left = max(1, round(source.weight * len(source.rows)))
            while left > 0:
                places = draw.sample(range(len(source.rows)), len(source.rows))[:left]
                drawn += [(index, place) for place in places]
                left -= len(places)
        random.Random(f"{seed}-{epoch}").shuffle(drawn)
        order += drawn
        epoch += 1
    order = order[:wanted]
    if group_by_length:
        order = _grouped(order, sources, step_size, seed)
    return np.array(order, np.int32)


def _grouped(
    order: list[tuple[int, int]], sources: Sequence[ScannedSource], step_size: int, seed: int
) -> list[tuple[int, int]]:
    chunk = STEPS_SORTED_TOGETHER * step_size
    grouped = []
    for start in range(0, len(order), chunk):
        near = sorted(order[start : start + chunk], key=lambda item: sources[item[0]].lengths[item[1]])
        steps = [near[first : first + step_size] for first in range(0, len(near), step_size)]
        random.Random(f"{seed}-{start}").shuffle(steps)
        grouped += [item for step in steps for item in step]
    return grouped


class Mixture(Dataset):  # type: ignore[type-arg]
    """The samples of a run by their position in it, encoded.

    A picture that turns out damaged, or a sample that does not fit into `max_length`, gives its place to the
    next of its source; `skipped` counts them by reason (in worker processes, each its own).
    """

    def __init__(
        self, sources: Sequence[ScannedSource], order: np.ndarray, processor: Any, max_length: int, seed: int
    ) -> None:
        self.sources, self.order, self.processor = sources, order, processor
        self.max_length, self.seed = max_length, seed
        self.skipped: Counter[str] = Counter()
        self.features: Any = None  # a FeatureCache, where there is one
        self.conditions: Mapping[str, Tensor] = {}  # of drawings, by their captions
        # In the language model's place, by their samples' names, where that was run beforehand.
        self.states: Mapping[str, Mapping[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index, place = self.order[position].tolist()
        scanned = self.sources[index]
        reason = ""
        for further in range(len(scanned.rows)):
            row = scanned.rows[(place + further) % len(scanned.rows)]
            try:
                sample = scanned.source.sample(row, random.Random(f"{self.seed}-{position}"))
                return self._encoded(sample)
            except MobileMMError as error:
                reason = str(error)
                self.skipped[reason] += 1
        raise MobileMMError(f"{scanned.source.name}: no sample can be used: {reason}")

    def sample(self, position: int) -> Sample:
        """The sample at a position as it is, not encoded."""
        index, place = self.order[position].tolist()
        scanned = self.sources[index]
        return scanned.source.sample(scanned.rows[place], random.Random(f"{self.seed}-{position}"))

    def _encoded(self, sample: Sample) -> dict[str, Any]:
        if sample.name in self.states:
            states = self.states[sample.name]
            words = Encoded([], [], [], drawings_of(sample.messages))  # the model does not read them again
            return self.item(words, "signal_states" in states) | dict(states)
        encoded = encode(self.processor, sample, self.max_length)
        if sample.rejected is None:
            return self.item(encoded)
        messages = (*sample.messages[:-1], {"role": "assistant", "content": sample.rejected})
        rejected = encode(self.processor, replace(sample, messages=messages), self.max_length)
        return self.item(last_answer(encoded)) | {"rejected": self.item(last_answer(rejected))}

    def item(self, encoded: Encoded, learns_conditions: bool = True) -> dict[str, Any]:
        """Ids and labels with pictures, or their features, and the conditions of drawings."""
        item: dict[str, Any] = {"input_ids": encoded.input_ids, "labels": encoded.labels}
        if encoded.images and self.features is not None:
            item["vision_features"] = self.features[encoded.images]
        elif encoded.images:
            pictures = [open_image(image) for image in encoded.images]
            item["pixel_values"] = self.processor.image_processor(pictures, return_tensors="pt")[
                "pixel_values"
            ]
        if encoded.drawings and learns_conditions:
            item["conditions"] = torch.stack([self.conditions[caption] for caption in encoded.drawings])
        return item


def last_answer(encoded: Encoded) -> Encoded:
    """With nothing supervised but the last answer."""
    labels = encoded.labels
    end = max(place for place, label in enumerate(labels) if label != IGNORE_INDEX) + 1
    start = end
    while start and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    kept = [label if start <= place < end else IGNORE_INDEX for place, label in enumerate(labels)]
    return replace(encoded, labels=kept)


def encode(processor: Any, sample: Sample, max_length: int) -> Encoded:
    """Ids and labels, cut at `max_length`.

    Raises UnusableRowError when a picture or all that is supervised would be cut away.
    """
    ids, labels = processor.encode_for_training(sample.messages, sample.name)
    drawings = drawings_of(sample.messages)
    image_token = processor.image_token_id
    if len(ids) > max_length:
        if image_token in ids[max_length:]:
            raise UnusableRowError("longer than max_length, which would cut a picture")
        if drawings:
            raise UnusableRowError("longer than max_length, which would cut a drawing")
        ids, labels = ids[:max_length], labels[:max_length]
        if all(label == IGNORE_INDEX for label in labels):
            raise UnusableRowError("longer than max_length, which would cut the answer")
    if ids.count(image_token) != len(sample.images) * processor.num_image_tokens:
        raise UnusableRowError("more or fewer pictures than the template has room for")
    return Encoded(ids, labels, sample.images, drawings)


def collate(items: Sequence[Mapping[str, Any]], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Items of a Mixture → a batch, padded on the right; pictures of all samples one after the other.

    `logits_to_keep` are the positions behind which something is supervised in any sample: the head, a large
    part of a small model, runs on these alone. Pairs of answers become a batch of all that were chosen and
    then all that were rejected.
    """

    if "rejected" in items[0]:
        items = [*items, *(item["rejected"] for item in items)]

    def padded(name: str, filler: int) -> Tensor:
        rows = [torch.tensor(item[name], dtype=torch.long) for item in items]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)

    batch = {"input_ids": padded("input_ids", pad_token_id), "labels": padded("labels", IGNORE_INDEX)}
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    batch["logits_to_keep"] = (batch["labels"][:, 1:] != IGNORE_INDEX).any(0).nonzero()[:, 0]
    states = ("signal_states", "answer_states", "other_logits", "asks")
    for name in ("pixel_values", "vision_features", "conditions", *states):
        rows = [torch.as_tensor(item[name]) for item in items if name in item]
        if rows:
            batch[name] = torch.cat(rows)
    return batch
