"""Prompts with pictures through a family's exported parts, and through the whole model in transformers."""

from __future__ import annotations

import itertools
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image as PIL

from tests.export.families.conftest import CASES

DECODED = [40, 50, 60, 70]  # said after the prompt, one at a time
TOLERANCE = 1e-3
# Without Idefics3 and the second size of Qwen2.5-VL, whose parts are the same modules.
EXPORTED = tuple(name for name in CASES if name not in ("idefics3", "qwen2_5_vl_112"))


class Exported(Protocol):
    """A family's parts on a runtime, fed as an app feeds them."""

    def logits(self, ids: np.ndarray, pictures: np.ndarray, more: list[int]) -> list[np.ndarray]:
        """Of the whole prompt (1, length), and of each further token."""


def check(case: Any, bundle: Exported) -> None:
    """Prompts with no, one and two pictures, each with an answer."""
    for count in (0, 1, 2):
        inputs, pixels = prompt_and_pictures(case, count)
        wanted = transformers_logits(case.reference, inputs, DECODED)
        found = bundle.logits(inputs["input_ids"].numpy(), pixels, DECODED)
        for one, other in zip(found, wanted, strict=True):
            assert one.shape == tuple(other.shape)
            assert float((torch.tensor(one) - other).abs().max()) <= TOLERANCE
        # The logits are no constants, and the last picture is seen.
        if count:
            changed = np.concatenate([pixels[:-1], 255 - pixels[-1:]])
            seen = bundle.logits(inputs["input_ids"].numpy(), changed, DECODED)
            assert float(np.abs(seen[-1] - found[-1]).max()) > 10 * TOLERANCE


def prompt_and_pictures(case: Any, count: int) -> tuple[dict[str, Any], np.ndarray]:
    """transformers' inputs for a prompt with up to two pictures, and their pixels."""
    image, processor = case.split.image, case.split.processor
    noise = np.random.default_rng(0).integers(0, 256, (2, image.height, image.width, 3), np.uint8)
    text = f"What{processor.image_token * (count > 0)} is{processor.image_token * (count > 1)} this?"
    # Of the tile's own size: how pictures come to it is tested elsewhere.
    pictures = {"images": [PIL.fromarray(one) for one in noise[:count]]} if count else {}
    inputs = dict(processor(text=[text], return_tensors="pt", **pictures))
    return inputs, noise[:count].transpose(0, 3, 1, 2)


@torch.no_grad()
def transformers_logits(model: Any, inputs: dict[str, Any], more: list[int]) -> list[torch.Tensor]:
    """Of the prompt, and of each further token with the cache."""
    if model.config.model_type == "qwen2_5_vl":
        model.model.rope_deltas = None  # what it keeps of the last prompt
    out = model(**inputs, use_cache=True)
    made = [out.logits]
    for token in more:
        out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values)
        made.append(out.logits)
    return made


def mrope_positions(split: Any, ids: list[int], more: int) -> np.ndarray:
    """M-RoPE's (3, 1, length): text counts on, a picture's tokens have its time, their row and column."""
    rows, columns = split.image.position_grid or (1, 1)
    found: list[tuple[int, int, int]] = []
    following = 0
    pictures = [token == split.image_token_id for token in ids] + [False] * more
    for is_image, run in itertools.groupby(pictures):
        count = len(list(run))
        if not is_image:
            found += [(following + index,) * 3 for index in range(count)]
            following += count
            continue
        for _ in range(count // (rows * columns)):
            found += [
                (following, following + row, following + column)
                for row in range(rows)
                for column in range(columns)
            ]
            following += max(rows, columns)
    return np.array(found).T[:, None]
