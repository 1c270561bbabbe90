"""A causal LM alone, without eyes: a bundle of embedding and decoder, for every target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mobilemm.errors import MobileMMError
from mobilemm.export.assemble import Result, export_bundles
from mobilemm.export.model import open_model
from mobilemm.export.options import ExportOptions
from mobilemm.export.quantization import make_plan
from mobilemm.export.targets import find_target
from mobilemm.models.checkpoints.text_model import is_text_model, load_text_model
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import open_bundle
from mobilemm.runtime.self_check import self_check
from mobilemm.runtime.session import Session
from tests.runtime.conftest import llama_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_text_checkpoint(folder: Path, tied: bool = False) -> Path:
    """A LLaMA of two layers, whose context is 512 tokens."""
    tokenizer = llama_tokenizer("▁What", "▁is")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    if not tied:  # a random model's bytes are no UTF-8: it says letters and words
        with torch.no_grad():
            model.lm_head.weight[2:259] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_checkpoint(tmp_path_factory.mktemp("checkpoints") / "text")


@pytest.fixture(scope="module")
def exported(text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """For every target whose packages are here, in one command."""
    folder = tmp_path_factory.mktemp("bundles")
    places = []
    for name in ("onnx", "coreml", "executorch"):
        try:
            places.append((find_target(name), folder / name))
        except MobileMMError:
            continue
    options = ExportOptions(plan=make_plan("int4", method="rtn", block_size=32))
    results = export_bundles(str(text_checkpoint), places, options)
    return {result.bundle.manifest.target: result for result in results}


def result_of(exported: dict[str, Result], target: str) -> Result:
    if target not in exported:
        pytest.skip(f"the packages of {target} are not installed")
    return exported[target]


@pytest.mark.parametrize("target", ["onnx", "coreml", "executorch"])
def test_a_bundle_of_text_alone_is_whole(exported: dict[str, Result], target: str) -> None:
    result = result_of(exported, target)
    bundle = open_bundle(result.bundle.folder)
    manifest = bundle.manifest
    assert set(manifest.parts) == {"embed", "decoder"}
    assert manifest.image is None
    assert (manifest.model.family, manifest.model.num_image_tokens) == ("llama", 0)
    assert manifest.conversations[0].image is None
    assert "pipeline_tag: text-generation" in (bundle.folder / "README.md").read_text()
    for check in self_check(bundle, open_backend(bundle)):
        assert check.passed, check.text


def test_logits_are_transformers_own(text_checkpoint: Path, tmp_path: Path) -> None:
    """In float32, and so are its answers."""
    pytest.importorskip("onnxruntime")
    options = ExportOptions(plan=make_plan("fp32"))
    places = [(find_target("onnx"), tmp_path / "full")]
    (result,) = export_bundles(str(text_checkpoint), places, options)
    session = Session(result.bundle, open_backend(result.bundle))
    ids = session.tokenizer.encode([{"role": "user", "content": "What is it?"}])
    backend = open_backend(result.bundle)
    none = np.zeros((0, 64), np.float32)
    rows = backend.run("embed", {"input_ids": np.array([ids]), "image_features": none})["inputs_embeds"]
    found = backend.decoder().decode(rows)[0, -1]
    model: Any = LlamaForCausalLM.from_pretrained(text_checkpoint)
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0, -1].numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert result.pytorch_answer
    assert result.bundle.manifest.conversations[0].answer == result.pytorch_answer


def test_pictures_are_refused(exported: dict[str, Result], text_checkpoint: Path) -> None:
    session = Session(result_of(exported, "onnx").bundle, open_backend(exported["onnx"].bundle))
    with pytest.raises(MobileMMError, match="picture"):
        session.look_at("picture.png")
    with pytest.raises(MobileMMError, match="--image-size 64: this model takes no pictures"):
        open_model(str(text_checkpoint), ExportOptions(image_size=64))


def test_multimodal_checkpoints_are_no_text_models(
    checkpoint: Path, text_checkpoint: Path, tmp_path: Path
) -> None:
    assert is_text_model(text_checkpoint)
    assert not is_text_model(checkpoint)
    assert not is_text_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    assert not is_text_model(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    folder = write_text_checkpoint(tmp_path / "broken")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MobileMMError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.* missing"):
        load_text_model(folder)
