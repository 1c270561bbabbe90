"""Decoders as Core ML packages on the reference interpreter, against transformers' own causal language models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export import mil_interpreter
from mobilemm.export.decoder import Decoder, EagerCache
from mobilemm.export.layerwise import quantize_decoder
from mobilemm.export.parts import CacheShape, Part
from mobilemm.export.quantization import PartPlan, WeightScheme, make_plan
from mobilemm.export.targets import find_target
from mobilemm.export.targets.coreml import CoreMLOptions, CoreMLTarget
from mobilemm.export.verify import cosine
from mobilemm.runtime.self_check import snr_db
from tests.export.language_models import (
    LANGUAGE_MODELS,
    config_of,
    prompt_and_logits,
    random_language_model,
)
from tests.export.test_decoder import loaded

pytest.importorskip("coremltools")


def part_of(decoder: Decoder, embeds: Tensor) -> Part:
    spec = decoder.spec
    cache = CacheShape(spec.num_layers, spec.num_key_value_heads, spec.head_dim)
    return Part("decoder", decoder, {"inputs_embeds": embeds[:, :3]}, ("logits",), cache=cache)


# Of ropes one kind: tables are tables.
KINDS = ("llama_biases_tied", "rope_yarn", "qwen2_window", "qwen3", "smollm3", "gemma2", "gemma3_text")


@torch.no_grad()
@pytest.mark.parametrize("layout", ["gpu", "ane"])
@pytest.mark.parametrize("name", KINDS)
def test_logits_are_transformers_own(name: str, layout: Any, tmp_path: Path) -> None:
    """Both functions over one conversation, longer than a prefill."""
    model = random_language_model(config_of(name))
    spec, embeds, wanted = prompt_and_logits(model, 44)
    decoder = loaded(spec, model.state_dict())
    target = CoreMLTarget(CoreMLOptions(layout=layout, prefill=16))
    part = part_of(decoder, embeds)
    exported = target.write(part, decoder, tmp_path)
    found = target.run(part, exported, tmp_path, {"inputs_embeds": embeds.numpy()})
    print(name, layout, snr_db(found, wanted.numpy()))
    assert found.shape == tuple(wanted.shape)
    assert snr_db(found, wanted.numpy()) > 35
