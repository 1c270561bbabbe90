"""How well drawings show what was asked for, by a frozen image–text scorer fitted on real pictures alone.

The scorer: EfficientNet-Lite0's pooled features of a picture, a ridge regression to the sentence embedding
(all-MiniLM-L6-v2) of its name, the cosine to the names in question. `scripts/fit_drawing_scorer.py` fits it
on pictures whose names are none of those asked for, and notes what it says of the real pictures of these
names.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mobilemm.doctor import installed
from mobilemm.errors import MobileMMError

if TYPE_CHECKING:
    from mobilemm.generation.generator import Generator

CANDIDATES, TOP = 50, 5
SIDE = 160
BATCH = 8
SHEET = 64
PACKAGES = ("mobilemm", "torch", "diffusers", "transformers", "timm")
_SCORER, _NAMES = "drawing_scorer.safetensors", "drawing_names.json"


@dataclass(frozen=True)
class DrawingScore:
    """Shares of pictures whose name is among the first five of fifty, and what they are compared with.

    `top5` is that of the generator at each number of steps; `real` that of the real pictures of the same
    names, `real_small` of these at the generator's size. `chance` is 0.1. `ratio` is the last step count's
    share of `real`.
    """

    task: str
    samples: int
    top5: dict[str, float]
    real: float
    real_small: float
    ratio: float
    chance: float
    model: str
    sampler: str
    guidance_scale: float
    seed: int
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a score file has it."""
        return asdict(self)


class DrawingScorer:
    """Pictures and names to a cosine; see the module's text. Names are embedded once."""

    def __init__(self) -> None:
        from safetensors.torch import load_file

        from mobilemm.generation.conditions import SentenceEncoder
        from mobilemm.models.checkpoints.default import pretrained_encoder

        folder = Path(str(resources.files("mobilemm.evaluation")))
        weights = {name: tensor.float() for name, tensor in load_file(folder / _SCORER).items()}
        self.weight, self.bias = weights["weight"], weights["bias"]
        self.table = json.loads((folder / _NAMES).read_text(encoding="utf-8"))
        self.names: list[str] = self.table["names"]
        self.encoder = pretrained_encoder()
        self.texts = SentenceEncoder()(self.names)[:, 0]

    def embed(self, pictures: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] → (n, 384) of length 1."""
        found = [features(self.encoder, pictures[at : at + BATCH]) for at in range(0, len(pictures), BATCH)]
        return torch.nn.functional.normalize(torch.cat(found) @ self.weight + self.bias, dim=-1)

    def top(self, pictures: Tensor, right: Sequence[int]) -> NDArray[np.bool_]:
        """Of each picture, whether the name of that index is among the first five of fifty."""
        return ranked(self.embed(pictures) @ self.texts.T, right)


def ranked(cosines: Tensor, right: Sequence[int], seed: int = 0) -> NDArray[np.bool_]:
    """(pictures, names) cosines → whether the right name is in the top 5 among 49 others, by the seed."""
    found = []
    for row, index in enumerate(right):
        others = [name for name in range(cosines.shape[1]) if name != index]
        drawn = random.Random(f"{seed} {row}").sample(others, min(CANDIDATES - 1, len(others)))
        found.append(bool((cosines[row, drawn] >= cosines[row, index]).sum() < TOP))
    return np.array(found)


@torch.inference_mode()
def features(encoder: Any, pictures: Tensor) -> Tensor:
    """EfficientNet-Lite0's pooled features (n, 1280) of pictures in [0, 1], resized to 160 pixels."""
    resized = torch.nn.functional.interpolate(
        pictures, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False
    )
    entering = (resized.clamp(0, 1) * 255 - 127) / 128
    pooled: Tensor = encoder(entering.contiguous(memory_format=torch.channels_last))
    return pooled.clone()


def evaluate_drawings(
    folder: Path,
    steps: Sequence[int] | None = None,
    limit: int | None = None,
    seed: int = 0,
    sheet: Path | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> DrawingScore:
    """Lets a generator draw the scorer's names, each at every number of steps, with noise by the seed.

    `sheet` gets the first 64 pictures at the last number of steps, in the order of the names, as a PNG.
    Raises MobileMMError for a folder that holds no generator, or one with another condition.
    """
    from mobilemm.generation.conditions import open_condition_encoder
    from mobilemm.generation.generator import load_generator

    generator = load_generator(folder)
    scorer = DrawingScorer()
    names = scorer.names[:limit]
    counts = list(steps or [generator.settings.steps])
    encode = open_condition_encoder(folder, generator.settings.condition)
    conditions, empty = encode(names), encode([""])
    if conditions.shape[1:] != generator.condition_shape:
        raise MobileMMError(
            f"{folder}: its condition is {generator.condition_shape}, {generator.settings.condition} gives"
            f" {tuple(conditions.shape[1:])}"
        )
    shares: dict[str, float] = {}
    done = 0
    for count in counts:
        pictures = []
        for at in range(0, len(names), BATCH):
            rows = slice(at, min(at + BATCH, len(names)))
            pictures.append(draw(generator, conditions[rows], empty, count, seed, at))
            done += len(pictures[-1])
            report(done, len(names) * len(counts))
        drawn = torch.cat(pictures)
        shares[str(count)] = float(scorer.top(drawn, range(len(names))).mean())
    if sheet is not None:
        write_sheet(drawn[:SHEET], sheet)
    real = scorer.table["real"]
    return DrawingScore(
        task="drawing",
        samples=len(names),
        top5=shares,
        real=real["full"],
        real_small=real[str(SMALL)],
        ratio=shares[str(counts[-1])] / real["full"],
        chance=TOP / CANDIDATES,
        model=str(folder),
        sampler=generator.settings.sampler,
        guidance_scale=generator.settings.guidance_scale,
        seed=seed,
        versions=installed(PACKAGES),
    )


# The size of the default generator's pictures, at which the real ones are scored too.
SMALL = 64


@torch.no_grad()
def draw(generator: Generator, condition: Tensor, empty: Tensor, steps: int, seed: int, first: int) -> Tensor:
    """Pictures of conditions (n, tokens, width), the i-th with the noise of seed + first + i."""
    from mobilemm.generation.sampling import sample_latents, sampling_table
    from mobilemm.runtime.noise import normal

    table = sampling_table(generator, steps)
    shape = (table.noises, *generator.latent_shape)
    noise = torch.stack(
        [torch.from_numpy(normal(seed + first + row, shape)) for row in range(len(condition))]
    )
    return generator.decode(sample_latents(generator, condition, noise, table, empty_condition=empty))


def write_sheet(pictures: Tensor, path: Path, columns: int = 8) -> None:
    """Pictures (n, 3, H, W) in [0, 1] as one PNG, row by row."""
    from PIL import Image

    blank = torch.ones_like(pictures[:1]).expand(-len(pictures) % columns, -1, -1, -1)
    grid = torch.cat([pictures, blank]).unflatten(0, (-1, columns))
    whole = grid.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray((whole * 255).round().byte().numpy()).save(path)
