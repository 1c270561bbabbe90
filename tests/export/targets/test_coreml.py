"""Decoders as Core ML packages on the reference interpreter, against transformers' own language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mobilemm.export.decoder import Decoder
from mobilemm.export.parts import CacheShape, Part
from mobilemm.export.targets.coreml import CoreMLOptions, CoreMLTarget
from mobilemm.export.targets.coreml_package import read_spec
from mobilemm.runtime.self_check import snr_db
from tests.export.language_models import (
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


def float32_operations(package: Path) -> list[str]:
    """Names of a program's operations that compute in float32, which the Neural Engine does not."""
    from coremltools.proto import MIL_pb2

    found = []
    for function in read_spec(package).mlProgram.functions.values():
        for block in function.block_specializations.values():
            for operation in (one for one in block.operations if one.type != "const"):
                found += [
                    output.name
                    for output in operation.outputs
                    if output.type.tensorType.dataType == MIL_pb2.FLOAT32
                ]
    return found


# Ropes are tables, which the parts have in common with other targets.
KINDS = ("llama_biases_tied", "qwen2_window", "qwen3", "smollm3", "gemma2", "gemma3_text")


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "layout"), [*((name, "gpu") for name in KINDS), ("qwen3", "ane"), ("gemma2", "ane")]
)
def test_logits_are_transformers_own(name: str, layout: Any, tmp_path: Path) -> None:
    """Both functions over one conversation, longer than a prefill."""
    model = random_language_model(config_of(name))
    spec, embeds, wanted = prompt_and_logits(model, 44)
    decoder = loaded(spec, model.state_dict())
    target = CoreMLTarget(CoreMLOptions(layout=layout, prefill=16))
    part = part_of(decoder, embeds)
    exported = target.write(part, decoder, tmp_path)
    assert float32_operations(tmp_path / exported.file) == []
    found = target.run(part, exported, tmp_path, {"inputs_embeds": embeds.numpy()})
    assert found.shape == tuple(wanted.shape)
    assert snr_db(found, wanted.numpy()) > 35
