"""Generators are read as published, and what is written diffusers reads and draws alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from mobilemm.errors import MobileMMError
from mobilemm.generation.generator import guidance_embedding, load_generator, save_generator
from tests.generation.tiny_generator import FAMILIES, write_generator


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_family_is_read_and_written_as_it_was(family: str, tmp_path: Path) -> None:
    generator = load_generator(write_generator(tmp_path / "one", family))
    assert generator.latent_shape == (4, 8, 8)
    assert generator.condition_shape == (3, 16)
    assert generator.image_size == (16, 16)
    again = load_generator(save_generator(generator, tmp_path / "two", torch.float16))
    assert again.settings == generator.settings
    for name, tensor in generator.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.half().float()), name
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "two" / "unet", torch_dtype=torch.float16)
    assert unet.config.cross_attention_dim == 16


def test_the_folder_is_one_of_diffusers_own_pipelines(tmp_path: Path) -> None:
    folder = write_generator(tmp_path / "one", "sd15")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    generator = load_generator(folder)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pipeline.vae.decode(latents / 0.18215).sample
        drawn = generator.decode(latents)
    assert torch.allclose(drawn, (expected / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_published_folders_have_pickles_and_half_precision(tmp_path: Path) -> None:
    folder = write_generator(tmp_path / "one", "sd15")
    before = load_generator(folder).state_dict()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae").half()
    for name in ("unet", "vae"):
        (folder / name / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(folder / "unet", safe_serialization=False)
    vae.save_pretrained(folder / "vae", variant="fp16")
    after = load_generator(folder).state_dict()
    for name, tensor in before.items():
        expected = tensor.half().float() if name.startswith("autoencoder") else tensor
        assert torch.equal(after[name], expected), name


def test_latents_of_a_published_autoencoder_are_its_mode_scaled(tmp_path: Path) -> None:
    generator = load_generator(write_generator(tmp_path / "one", "sd15"))
    pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = generator.autoencoder.encode(pictures * 2 - 1).latent_dist.mean * 0.18215
        assert torch.allclose(generator.encode(pictures), expected)


def test_the_guidance_scale_enters_as_in_diffusers_pipeline() -> None:
    from diffusers import LatentConsistencyModelPipeline

    scale = torch.tensor([8.5, 1.0, 3.25])
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scale - 1, embedding_dim=64)
    # The sine of thousands, in float32.
    assert torch.allclose(guidance_embedding(scale, 64), expected, atol=2e-3)


@pytest.mark.parametrize(
    ("part", "key", "value", "told"),
    [
        ("unet/config.json", "in_channels", 9, "in_channels"),
        ("unet/config.json", "_class_name", "SD3Transformer2DModel", "_class_name"),
        ("unet/config.json", "addition_embed_type", "text_time", "addition_embed_type|cannot be read"),
        ("scheduler/scheduler_config.json", "prediction_type", "flow", "prediction_type"),
        ("scheduler/scheduler_config.json", "clip_sample", True, "clip_sample"),
        ("scheduler/scheduler_config.json", "beta_schedule", "steep", "beta_"),
        ("mobilemm_generator.json", "sampler", "heun", "sampler"),
        ("mobilemm_generator.json", "steps", "four", "steps"),
        ("mobilemm_generator.json", "step", 4, "unknown key 'step'"),
    ],
)
def test_what_cannot_be_drawn_with_is_told_by_file_and_key(
    part: str, key: str, value: object, told: str, tmp_path: Path
) -> None:
    folder = write_generator(tmp_path / "one", "default")
    config = json.loads((folder / part).read_text())
    (folder / part).write_text(json.dumps(config | {key: value}))
    with pytest.raises(MobileMMError, match=told):
        load_generator(folder)


def test_missing_parts_and_tensors_are_told(tmp_path: Path) -> None:
    folder = write_generator(tmp_path / "one", "default")
    from safetensors.torch import load_file, save_file

    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["conv_in.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(MobileMMError, match=r"conv_in\.weight"):
        load_generator(folder)
    weights.unlink()
    with pytest.raises(MobileMMError, match="no weights"):
        load_generator(folder)
    with pytest.raises(MobileMMError, match=r"model_index|unet"):
        load_generator(tmp_path)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    generator = load_generator(write_generator(tmp_path / "one", "default"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(MobileMMError, match="holds no generator"):
        save_generator(generator, tmp_path / "other")
    assert (tmp_path / "other" / "letter.txt").read_text() == "dear"
