"""Bundles, one of them with a decoder of some milliseconds a token: a loop's own cost is small beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from mobilemm.export.assemble import export_bundle
from mobilemm.export.options import ExportOptions
from mobilemm.export.quantization import make_plan
from mobilemm.export.targets import find_target
from mobilemm.models import MobileMMConfig, MobileMMForConditionalGeneration
from mobilemm.models.checkpoints import save
from mobilemm.models.checkpoints.parts import make_processor
from tests.runtime.bundles import write_bundle
from tests.runtime.conftest import llama_tokenizer


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP → LDPv2 (4 image tokens) → LLaMA of 25 M parameters, random, as ONNX in float32."""
    pytest.importorskip("onnxruntime")
    return write_bundle(*random_model(512, 8), tmp_path_factory.mktemp("bench") / "a bundle")


@pytest.fixture(scope="session")
def executorch_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for ExecuTorch."""
    pytest.importorskip("executorch")
    folder = tmp_path_factory.mktemp("bench")
    model, processor = random_model(512, 8)
    save(model, folder / "checkpoint", processor)
    options = ExportOptions(plan=make_plan("fp32", vision="fp32"))
    export_bundle(str(folder / "checkpoint"), find_target("executorch"), folder / "bundle", options)
    return folder / "bundle"


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of 0.4 M parameters, in a folder that shells stumble over."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("bench") / 'it\'s a "small" $bundle'
    return write_bundle(*random_model(128, 2), folder)


def random_model(hidden_size: int, layers: int) -> tuple[MobileMMForConditionalGeneration, Any]:
    """With a language model of that size; and its processor."""
    torch.manual_seed(0)
    tokenizer = llama_tokenizer("▁What", "▁is", "▁this", "▁a", "▁line")
    config = MobileMMConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        template="v1",
    )
    model = MobileMMForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = 2
    return model, make_processor(model, tokenizer, [0.5] * 3, [0.5] * 3)
