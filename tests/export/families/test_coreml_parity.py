"""Vision, embedding and decoder as Core ML packages on the interpreter, against transformers' whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mobilemm.export.parts import parts_of
from mobilemm.export.targets.coreml import CoreMLOptions, CoreMLTarget
from mobilemm.export.verify import share_tensors, with_weights
from mobilemm.runtime.self_check import snr_db
from mobilemm.runtime.session import rope_positions
from tests.export.families.parity import EXPORTED, prompt_and_pictures, transformers_logits

pytest.importorskip("coremltools")


# LLaVA's parts as transformers has them are those of the original.
FAMILIES = tuple(name for name in EXPORTED if name not in ("llava_hf", "llava_transformers"))


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES, indirect=True)
def test_logits_are_transformers_own(case: Any, tmp_path: Path) -> None:
    check(case, CoreMLOptions(prefill=16), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mobilevlm_v2", "qwen2_5_vl_84"], indirect=True)
def test_logits_in_the_neural_engines_layout(case: Any, tmp_path: Path) -> None:
    check(case, CoreMLOptions(prefill=16, layout="ane"), tmp_path)


@torch.no_grad()
def check(case: Any, options: CoreMLOptions, folder: Path) -> None:
    """A prompt with two pictures."""
    split, target = case.split, CoreMLTarget(options)
    parts = parts_of(split, 128)
    exported = {}
    for name, part in parts.items():
        exported[name] = target.write(part, with_weights(share_tensors(part.module), part.weights), folder)

    def run(name: str, **inputs: np.ndarray) -> np.ndarray:
        return target.run(parts[name], exported[name], folder, inputs)

    inputs, pixels = prompt_and_pictures(case, 2)
    (wanted,) = transformers_logits(case.reference, inputs, [])
    ids = inputs["input_ids"].numpy()
    features = run("vision", pixels=pixels)
    embeds = run("embed", input_ids=ids, image_features=features)
    more = {}
    if split.image.position_grid is not None:
        positions = rope_positions(ids[0].tolist(), split.image_token_id, split.image.position_grid)
        more["position_ids"] = np.ascontiguousarray(positions).reshape(3, 1, -1)
    found = run("decoder", inputs_embeds=embeds, **more)
    reference = case.features(torch.from_numpy(normalized(split, pixels)))
    assert snr_db(features, reference.flatten(0, 1).numpy()) > 45
    assert snr_db(found, wanted.numpy()) > 35


def normalized(split: Any, pixels: np.ndarray) -> np.ndarray:
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (split.mean, split.std))
    return (pixels.astype(np.float32) / 255 - mean) / std
