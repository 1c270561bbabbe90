"""The whole model saved and loaded: bit for bit, over devices and disk, in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    TimmWrapperConfig,
)

from mobilemm.models import MobileMMConfig, MobileMMForConditionalGeneration
from tests.models.conftest import PROMPTS, TEXT, VISION, make_model, pad_left, pixels, randomize


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModel, MobileMMForConditionalGeneration])
def test_saved_models_come_back_bit_for_bit(
    model: MobileMMForConditionalGeneration, tmp_path: Path, auto: Any
) -> None:
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MobileMMConfig)
    ignored = {"transformers_version", "_name_or_path", "architectures", "dtype"}
    assert {k: v for k, v in config.to_dict().items() if k not in ignored} == {
        k: v for k, v in model.config.to_dict().items() if k not in ignored
    }
    again = auto.from_pretrained(tmp_path)
    assert type(again) is MobileMMForConditionalGeneration
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    batch = pad_left(PROMPTS)
    with torch.no_grad():
        logits = model(**batch, pixel_values=pixels()).logits
        assert torch.equal(again.eval()(**batch, pixel_values=pixels()).logits, logits)


def test_a_model_with_unused_layers_and_a_timm_encoder_comes_back(tmp_path: Path) -> None:
    encoder = TimmWrapperConfig(architecture="test_vit", model_args={"depth": 2})
    for index, options in enumerate(
        [
            {"keep_unused_layers": True},
            {"vision_config": encoder, "image_size": 64, "vision_feature_layer": -1},
        ]
    ):
        config = MobileMMConfig(
            **{"vision_config": CLIPVisionConfig(**VISION), "text_config": LlamaConfig(**TEXT), **options}
        )
        model = MobileMMForConditionalGeneration(config).eval()
        randomize(model)
        model.save_pretrained(tmp_path / str(index))
        again = AutoModel.from_pretrained(tmp_path / str(index))
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        size = config.image_size
        image = torch.randn(1, 3, size, size)
        with torch.no_grad():
            assert torch.equal(again.get_image_features(image), model.get_image_features(image))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = make_model(LlamaConfig(**TEXT, tie_word_embeddings=True))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert not (again.get_input_embeddings().weight == 0).all()
    batch = pad_left(PROMPTS)
    with torch.no_grad():
        logits = model(**batch, pixel_values=pixels()).logits
        assert torch.equal(again(**batch, pixel_values=pixels()).logits, logits)
    untied = make_model()
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(model: MobileMMForConditionalGeneration, tmp_path: Path, device_map: str) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=device_map)
    batch = pad_left(PROMPTS)
    with torch.no_grad():
        logits = model(**batch, pixel_values=pixels()).logits
        torch.testing.assert_close(again(**batch, pixel_values=pixels()).logits, logits)


def test_layers_offloaded_to_disk_stay_whole(model: MobileMMForConditionalGeneration, tmp_path: Path) -> None:
    """Little memory makes accelerate split the model, which it may do between layers, never inside one."""
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": 60_000},
        offload_folder=tmp_path / "offload",
    )
    assert "disk" in again.hf_device_map.values()
    inside = [
        name for name in again.hf_device_map if ".layers." in name and not name.split(".layers.")[1].isdigit()
    ]
    assert inside == []
    batch = pad_left(PROMPTS)
    with torch.no_grad():
        logits = model(**batch, pixel_values=pixels()).logits
        torch.testing.assert_close(again(**batch, pixel_values=pixels()).logits, logits)


def test_attention_implementation_reaches_all_parts(
    model: MobileMMForConditionalGeneration, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    eager = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.language_model.config._attn_implementation == "eager"
    assert eager.vision_encoder.model.config._attn_implementation == "eager"
    batch = pad_left(PROMPTS)
    with torch.no_grad():
        output = eager(**batch, pixel_values=pixels(), output_attentions=True)
        expected = model(**batch, pixel_values=pixels()).logits
        # The last position is of the prompt in every row; what stands at padded ones is nobody's business.
        torch.testing.assert_close(output.logits[:, -1], expected[:, -1], rtol=1e-4, atol=1e-4)
    assert output.attentions[0].shape == (4, 4, output.logits.shape[1], output.logits.shape[1])


def test_half_precision_from_full_precision_pixels(
    model: MobileMMForConditionalGeneration, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    batch = pad_left(PROMPTS)
    with torch.no_grad():
        assert half(**batch, pixel_values=pixels()).logits.dtype == torch.bfloat16
    assert half.generate(**batch, pixel_values=pixels(), max_new_tokens=2).shape == (4, 9)
