"""The default model as GGUF files: llama.cpp's tokens and logits are ours, and quantized it stays close."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
import torch
from torch import Tensor

import mobilemm
from mobilemm.errors import MobileMMError
from mobilemm.export.targets.gguf import export_gguf, write_gguf
from mobilemm.models.checkpoints import Loaded
from tests.export.targets.llama_cpp_judge import ENGLISH, TEXTS, llama_cpp_logits, opened

pytestmark = pytest.mark.slow

SOME = 128  # positions, where fewer will do


@pytest.fixture(scope="module")
def default() -> Loaded:
    return mobilemm.load(dtype="float32")


@pytest.fixture(scope="module")
def default_ids(default: Loaded) -> list[int]:
    return default.processor.tokenizer(ENGLISH)["input_ids"]


@pytest.fixture(scope="module")
def default_logits(default: Loaded, default_ids: list[int]) -> Tensor:
    with torch.no_grad():
        return default.model.language_model(torch.tensor([default_ids])).logits[0]


@pytest.fixture(scope="module")
def default_f16(default: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_gguf(default, tmp_path_factory.mktemp("gguf"), "f16", mmproj=False).llm


def kl(reference: Tensor, logits: Tensor) -> float:
    """Mean KL divergence per position, in nats."""
    wanted, given = reference.log_softmax(-1), logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - given)).sum(-1).mean())


def test_default_model_in_f16_says_what_pytorch_says(
    default_f16: Path, default_ids: list[int], default_logits: Tensor
) -> None:
    assert len(default_ids) > 500
    logits = llama_cpp_logits(default_f16, default_ids)
    top1 = (logits.argmax(-1) == default_logits.argmax(-1)).float().mean()
    assert top1 >= 0.99
    assert kl(default_logits, logits) < 1e-4


def test_default_model_is_tokenized_alike(default: Loaded, default_f16: Path) -> None:
    tokenizer = default.processor.tokenizer
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    with opened(default_f16, vocab_only=True) as model:
        for text in [*TEXTS, prompt]:
            assert model.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"]
        assert model.token_eos() == tokenizer.eos_token_id
        assert model.metadata["tokenizer.chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize(("dtype", "megabytes", "most"), [("q8_0", 145, 0.01), ("q4_0", 92, 0.5)])
def test_default_model_quantized(
    default: Loaded,
    default_ids: list[int],
    default_logits: Tensor,
    tmp_path: Path,
    dtype: Any,
    megabytes: int,
    most: float,
) -> None:
    path = write_gguf(default.model, default.processor, tmp_path, dtype, mmproj=False).llm
    assert path.stat().st_size / 1e6 == pytest.approx(megabytes, abs=1)
    # Its weights have been through four bits once before they came into our package, so q4_0 hurts twice.
    assert kl(default_logits[:SOME], llama_cpp_logits(path, default_ids[:SOME])) < most


def test_llama_quantize_takes_the_f16_file(
    default_f16: Path, default_ids: list[int], default_logits: Tensor, tmp_path: Path
) -> None:
    """As `llama-quantize FILE q4_0` does it: embeddings in Q6_K, or Q8_0 where their width forbids that."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, 1
    path = tmp_path / "quantized.gguf"
    assert (
        llama_cpp.llama_model_quantize(
            str(default_f16).encode(), str(path).encode(), ctypes.byref(parameters)
        )
        == 0
    )
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.0.ffn_up.weight"] == "Q4_0"
    assert types["token_embd.weight"] in ("Q6_K", "Q8_0")
    assert kl(default_logits[:SOME], llama_cpp_logits(path, default_ids[:SOME])) < 0.5


def test_a_vision_encoder_that_llama_cpp_lacks(
    default: Loaded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(MobileMMError, match="no vision encoder 'tf_efficientnet_lite0'"):
        write_gguf(default.model, default.processor, tmp_path / "asked", mmproj=True)
    assert not (tmp_path / "asked").exists()
    with caplog.at_level(logging.WARNING):
        files = write_gguf(default.model, default.processor, tmp_path / "left", "q8_0")
    assert files.mmproj is None
    assert [file.name for file in (tmp_path / "left").iterdir()] == ["llm-q8_0.gguf"]
    assert "tf_efficientnet_lite0" in caplog.text
