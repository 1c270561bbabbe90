"""What a stage learns from, kept on disk in the form it learns in: pictures, latents, conditions.

A cache is named by what it was made of, so that another picture, autoencoder or encoder makes another one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mobilemm.data.pairs import Pair, read_pairs
from mobilemm.data.things import with_article
from mobilemm.errors import MobileMMError, one_line
from mobilemm.generation.conditions import open_condition_encoder
from mobilemm.generation.generator import Generator
from mobilemm.training.generator.recipe import Drawings, GeneratorRecipe

Report = Callable[[str], None]
ENCODED = 32


@dataclass
class DrawingSet:
    """Pictures (n, size, size, 3) uint8 with their pairs; `order` has each as often as an epoch."""

    pairs: list[Pair]
    pictures: NDArray[np.uint8]
    order: NDArray[np.int64]
    identity: str

    def pixels(self, rows: Sequence[int] | Tensor) -> Tensor:
        """(rows, 3, size, size) in [0, 1]."""
        chosen = torch.from_numpy(np.ascontiguousarray(self.pictures[np.asarray(rows)]))
        return chosen.permute(0, 3, 1, 2).float() / 255


@dataclass
class LatentSet:
    """Latents (n, c, h, w) and conditions (ways, n, tokens, width) of drawings; the empty condition."""

    drawings: DrawingSet
    latents: NDArray[np.float32]
    conditions: NDArray[np.float32]
    empty: Tensor


def open_drawings(recipe: GeneratorRecipe, report: Report) -> DrawingSet:
    """The pictures of a recipe at its size. Raises MobileMMError for none, or one unreadable."""
    chosen: list[tuple[Path, Pair]] = []
    order: list[NDArray[np.int64]] = []
    for number, source in enumerate(recipe.data):
        pairs = [pair for pair in read_pairs(source.path) if _wanted(pair, source)]
        if not pairs:
            raise MobileMMError(f"key 'data.{number}': {source.path} has no such pictures")
        places = np.arange(len(chosen), len(chosen) + len(pairs))
        whole, part = divmod(source.weight, 1)
        order += [places] * int(whole)
        if part:
            order.append(
                places[np.linspace(0, len(places), round(part * len(places)), endpoint=False).astype(int)]
            )
        chosen += [(source.path / pair.image, pair) for pair in pairs]
    stamps = [(str(path), path.stat().st_size) if path.is_file() else (str(path), 0) for path, _ in chosen]
    identity = _digest([recipe.image_size, stamps])

    def make() -> NDArray[np.uint8]:
        pictures = np.empty((len(chosen), recipe.image_size, recipe.image_size, 3), np.uint8)
        for index, (path, _) in enumerate(chosen):
            pictures[index] = _square(path, recipe.image_size)
            if (index + 1) % 1024 == 0 or index + 1 == len(chosen):
                report(f"pictures: {index + 1:,} of {len(chosen):,}")
        return pictures

    pictures = _kept(_cache(recipe) / f"pictures-{identity}.npy", make)
    return DrawingSet([pair for _, pair in chosen], pictures, np.concatenate(order), identity)


def open_latents(recipe: Any, drawings: DrawingSet, generator: Generator, report: Report) -> LatentSet:
    """Latents and conditions of drawings, encoded once. `recipe`: of a stage that learns from them."""
    weights = hashlib.sha256()
    for tensor in generator.autoencoder.state_dict().values():
        weights.update(tensor.float().contiguous().numpy().tobytes())
    scale = generator.autoencoder.config.scaling_factor
    identity = _digest([drawings.identity, weights.hexdigest(), scale])

    @torch.no_grad()
    def encode() -> NDArray[np.float32]:
        found = []
        for start in range(0, len(drawings.pairs), ENCODED):
            rows = range(start, min(start + ENCODED, len(drawings.pairs)))
            found.append(generator.encode(drawings.pixels(list(rows))).float().numpy())
        report(f"latents: {len(drawings.pairs):,}")
        return np.concatenate(found)

    texts = [ways_to_say(pair)[: recipe.conditions] for pair in drawings.pairs]
    told = _digest([recipe.condition, texts])
    folder = Path(recipe.generator) if getattr(recipe, "generator", None) else Path(recipe.output)

    def conditions() -> NDArray[np.float32]:
        encoder = open_condition_encoder(folder, recipe.condition)
        report(f"conditions: {recipe.conditions} ways to say {len(texts):,} captions")
        ways = [encoder([said[way] for said in texts]).numpy() for way in range(recipe.conditions)]
        return np.stack([*ways, np.broadcast_to(encoder([""]).numpy(), ways[0].shape)])

    cache = _cache(recipe)
    encoded = _kept(cache / f"conditions-{told}.npy", conditions)
    latents = _kept(cache / f"latents-{identity}.npy", encode)
    return LatentSet(drawings, latents, encoded[:-1], torch.from_numpy(np.array(encoded[-1, :1])))


def ways_to_say(pair: Pair) -> list[str]:
    """A caption alone, as a phrase, and with two of its keywords."""
    further = [word for word in pair.keywords[2:] if word not in pair.caption][:2]
    return [pair.caption, f"a drawing of {with_article(pair.caption)}", ", ".join([pair.caption, *further])]


def rows_of_step(order: NDArray[np.int64], size: int, step: int, seed: int) -> NDArray[np.int64]:
    """The rows of a step, of `size` over all processes: each epoch is a permutation by seed and epoch."""
    places = np.arange(step * size, (step + 1) * size)
    found = np.empty(size, np.int64)
    for epoch in np.unique(places // len(order)):
        inside = places // len(order) == epoch
        shuffled = np.random.default_rng((seed, int(epoch))).permutation(len(order))
        found[inside] = order[shuffled[places[inside] % len(order)]]
    return found


def _wanted(pair: Pair, source: Drawings) -> bool:
    return (
        pair.split in source.splits
        and (source.sources is None or pair.source in source.sources)
        and (source.groups is None or any(word in source.groups for word in pair.keywords[:1]))
    )


def _square(path: Path, size: int) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise MobileMMError(f"{path}: cannot be read: {one_line(error)}") from error
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def _cache(recipe: GeneratorRecipe) -> Path:
    return recipe.cache or recipe.output / "cache"


def _kept(path: Path, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    """What lies at the path, made first where it is not there; the main process makes it for all."""
    from accelerate import PartialState

    with PartialState().main_process_first():
        if not path.is_file():
            values = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            with part.open("wb") as file:
                np.save(file, values)
            os.replace(part, path)
    return np.load(path, mmap_mode="r")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:12]
