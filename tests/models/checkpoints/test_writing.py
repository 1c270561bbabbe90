"""Round trips: what was read is written back tensor by tensor, under the same names, with every key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import mobilemm
from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints import save

Make = Callable[..., Any]
KINDS = ("ldpnet", "ldpnetv2", "llava", "llava-embedded", "llava-hf")
PROMPT = "USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: A dog? ASSISTANT:"


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_bytes(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(
    official_checkpoint: Make, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    official = official_checkpoint(kind, dtype=dtype)
    model, processor = mobilemm.load(official.folder)
    written = save(model, tmp_path / "written", processor)
    assert_same_bytes(read_all(written), official.tensors)
    config = json.loads((written / "config.json").read_text(encoding="utf-8"))
    expected = official.config
    if kind != "llava-hf":  # a tower named relative to the old folder is named absolutely
        expected = expected | {"mm_vision_tower": str(official.tower_folder)}
    assert config == expected


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_written_is_read_again(official_checkpoint: Make, tmp_path: Path, kind: str) -> None:
    official = official_checkpoint(kind)
    model, processor = mobilemm.load(official.folder)
    written = save(model, tmp_path / "written", processor)
    again, processor_again = mobilemm.load(written)
    image = torch.randn(1, 3, 24, 24)
    ids = torch.tensor([[1, 5, -200, 9]])
    assert torch.equal(
        model(input_ids=ids, pixel_values=image).logits, again(input_ids=ids, pixel_values=image).logits
    )
    inputs = {"text": PROMPT, "images": Image.new("RGB", (9, 5), "red")}
    first, second = processor(**inputs), processor_again(**inputs)
    assert first["input_ids"].tolist() == second["input_ids"].tolist()
    assert torch.equal(first["pixel_values"], second["pixel_values"])


@pytest.mark.parametrize("kind", ["ldpnetv2", "llava"])
def test_the_official_code_finds_its_slow_tokenizer(
    official_checkpoint: Make, tmp_path: Path, sentencepiece_model: bytes, kind: str
) -> None:
    """`LlamaTokenizer` of transformers 4 and llama.cpp read tokenizer.model and nothing else."""
    official = official_checkpoint(kind)
    model, processor = mobilemm.load(official.folder)
    written = save(model, tmp_path / "written", processor)
    assert (written / "tokenizer.model").read_bytes() == sentencepiece_model
    settings = json.loads((written / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "LlamaTokenizer"
    assert settings["legacy"] is True  # what transformers 4 took where the file was silent
    assert settings["pad_token"] == "<unk>"
    assert not (written / "tokenizer.json").exists()


@torch.no_grad()
def test_transformers_reads_llava_hf_as_written(official_checkpoint: Make, tmp_path: Path) -> None:
    official = official_checkpoint("llava-hf")
    model, processor = mobilemm.load(official.folder)
    written = save(model, tmp_path / "written", processor)
    theirs, info = LlavaForConditionalGeneration.from_pretrained(
        written, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    image = torch.randn(1, 3, 24, 24)
    slot = [official.config["image_token_index"]] * 36
    expected = theirs.eval()(input_ids=torch.tensor([[1, 5, *slot, 9]]), pixel_values=image).logits
    ours = model(input_ids=torch.tensor([[1, 5, -200, 9]]), pixel_values=image).logits
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    inputs = AutoProcessor.from_pretrained(written)(
        images=Image.new("RGB", (9, 5)), text="USER: <image>\nA cat?", return_tensors="pt"
    )
    assert inputs["input_ids"].eq(slot[0]).sum() == 36
    theirs(**inputs)


@pytest.mark.parametrize("kind", ["ldpnet", "llava"])
@torch.no_grad()
def test_our_own_layout_keeps_everything(
    official_checkpoint: Make, tmp_path: Path, sentencepiece_model: bytes, kind: str
) -> None:
    """Official → mobilemm → official again: nothing is lost on the way."""
    official = official_checkpoint(kind, dtype=torch.bfloat16)
    model, processor = mobilemm.load(official.folder)
    native = save(model, tmp_path / "native", processor, layout="mobilemm")
    theirs = AutoModelForImageTextToText.from_pretrained(native)
    assert type(theirs) is type(model)
    assert torch.equal(
        theirs.state_dict()["projector.mlp.0.weight" if kind == "ldpnet" else "projector.0.weight"],
        model.state_dict()["projector.mlp.0.weight" if kind == "ldpnet" else "projector.0.weight"],
    )
    text = processor.tokenizer(PROMPT)["input_ids"]
    assert AutoProcessor.from_pretrained(native).tokenizer(PROMPT)["input_ids"] == text
    again, processor_again = mobilemm.load(native)
    assert processor_again.tokenizer(PROMPT)["input_ids"] == text
    back = save(again, tmp_path / "back", processor_again)
    name = "mobilevlm" if kind == "ldpnet" else "llava"
    assert again.config.checkpoint_layout == name
    tower = {
        f"model.vision_tower.vision_tower.vision_model.{key}": value for key, value in official.tower.items()
    }
    assert_same_bytes(read_all(back), official.tensors | (tower if again.config.vision_tower_stored else {}))
    assert (back / "tokenizer.model").read_bytes() == sentencepiece_model


def test_shards_hold_the_same_tensors(official_checkpoint: Make, tmp_path: Path) -> None:
    official = official_checkpoint("ldpnetv2")
    model, processor = mobilemm.load(official.folder)
    written = save(model, tmp_path / "written", processor, max_shard_size="20KB")
    index = json.loads((written / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) > 2
    assert_same_bytes(read_all(written), official.tensors)
    mobilemm.load(written)


def test_nothing_half_written_stays(
    official_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = official_checkpoint("ldpnetv2")
    model, processor = mobilemm.load(official.folder)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(type(processor.tokenizer), "save_pretrained", full)
    with pytest.raises(OSError):
        save(model, tmp_path / "written", processor)
    assert sorted(tmp_path.iterdir()) == before


def test_refusals_name_the_reason(official_checkpoint: Make, tmp_path: Path) -> None:
    official = official_checkpoint("ldpnetv2")
    model, processor = mobilemm.load(official.folder)
    with pytest.raises(MobileMMError, match="there already"):
        save(model, official.folder, processor)
    with pytest.raises(MobileMMError, match=r"unknown layout 'gguf'.*mobilevlm"):
        save(model, tmp_path / "a", processor, layout="gguf")
    with pytest.raises(MobileMMError, match="llava-hf layout has no projector"):
        save(model, tmp_path / "b", processor, layout="llava-hf")
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


@torch.no_grad()
def test_llava_crosses_to_llava_hf(official_checkpoint: Make, tmp_path: Path) -> None:
    """The original layout, its tower elsewhere, written for transformers: one folder with everything."""
    official = official_checkpoint("llava")
    model, processor = mobilemm.load(official.folder)
    with pytest.raises(MobileMMError, match="image_token_id inside the vocabulary of 320"):
        save(model, tmp_path / "written", processor, layout="llava-hf")
    model.config.image_token_id = 319
    written = save(model, tmp_path / "written", processor, layout="llava-hf")
    theirs, info = LlavaForConditionalGeneration.from_pretrained(written, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    image = torch.randn(1, 3, 24, 24)
    expected = theirs.eval()(input_ids=torch.tensor([[1, 5, *[319] * 36, 9]]), pixel_values=image).logits
    ours = model(input_ids=torch.tensor([[1, 5, -200, 9]]), pixel_values=image).logits
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_the_reference_tokenizer_is_the_one_in_the_folder(
    official_checkpoint: Make, sentencepiece_model: bytes
) -> None:
    official = official_checkpoint("ldpnet")
    _, processor = mobilemm.load(official.folder)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    assert processor.tokenizer("A cat")["input_ids"] == [1, *pieces.encode("A cat")]
