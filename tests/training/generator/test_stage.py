"""Stages run from their recipes, go on bit for bit after a break, and leave folders that diffusers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from mobilemm.errors import MobileMMError
from mobilemm.generation.generator import load_generator
from mobilemm.generation.sampling import UnrolledGenerator
from mobilemm.training.checkpoints import last_checkpoint
from mobilemm.training.generator import stage, stages
from mobilemm.training.recipe import read_recipe
from tests.training.generator.conftest import RecipeMaker

TINY = {
    "_class_name": "AutoencoderTiny",
    "encoder_block_out_channels": [8, 8],
    "decoder_block_out_channels": [8, 8],
    "num_encoder_blocks": [0, 1],
    "num_decoder_blocks": [1, 0],
}


def silent(line: str) -> None:
    pass


class Broken(Exception):
    pass


def settings_of(name: str, teacher_folder: Path) -> tuple[str, dict[str, Any]]:
    return {
        "autoencoder": ("autoencoder", {"new_autoencoder": TINY}),
        "teacher": ("teacher", {"ema_decay": 0.9, "accumulation": 2, "batch_size": 2}),
        "consistency": ("consistency", {"ema_decay": 0.9}),
        "lora": ("consistency", {"lora": {"rank": 2}, "schedule": "constant"}),
        "phased": ("consistency", {"phases": 4, "embed_guidance": 8}),
        "matching": ("distribution_matching", {"student": teacher_folder, "fake_steps": 2}),
    }[name]


@pytest.mark.parametrize("name", ["autoencoder", "teacher", "consistency", "lora", "phased", "matching"])
def test_a_run_broken_off_goes_on_bit_for_bit(
    name: str, make_recipe: RecipeMaker, teacher_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    kind, changes = settings_of(name, teacher_folder)
    whole = stage.train(make_recipe(kind, output=tmp_path / "whole", **changes), silent)
    prepare = stages.prepare

    def breaking(recipe: Any, report: Any) -> Any:
        prepared = prepare(recipe, report)
        plain = prepared.batch

        def batch(rows: Any, random: torch.Generator, step: int) -> Any:
            if step == 5:
                raise Broken
            return plain(rows, random, step)

        prepared.batch = batch
        return prepared

    monkeypatch.setattr(stages, "prepare", breaking)
    recipe = make_recipe(kind, output=tmp_path / "broken", **changes)
    with pytest.raises(Broken):
        stage.train(recipe, silent)
    assert last_checkpoint(tmp_path / "broken") == tmp_path / "broken" / "checkpoint-4"
    monkeypatch.setattr(stages, "prepare", prepare)
    again = stage.train(recipe, silent)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
    assert files
    for file in files:
        expected, found = load_file(whole / file), load_file(again / file)
        for key, tensor in expected.items():
            assert torch.equal(tensor, found[key]), (file, key)
    assert (tmp_path / "broken" / "checkpoint-6" / "samples.png").is_file()
    assert (tmp_path / "broken" / "result.json").is_file()


@torch.no_grad()
def test_a_distilled_toy_drawn_by_diffusers_own_sampler_is_our_graphs_picture(
    make_recipe: RecipeMaker, monkeypatch: Any
) -> None:
    with torch.enable_grad():
        folder = stage.train(make_recipe("consistency", learning_rate=1e-3), silent)
    generator = load_generator(folder)
    assert generator.settings.sampler == "lcm"
    assert generator.settings.steps == 4
    unrolled = UnrolledGenerator(generator)
    condition = torch.randn(1, 1, 384, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    pipeline = StableDiffusionPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None)
    assert isinstance(pipeline.scheduler, LCMScheduler)
    pipeline.set_progress_bar_config(disable=True)
    fresh = iter(noise[:, 1:].unbind(1))
    module = __import__(LCMScheduler.__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(fresh))
    drawn = pipeline(
        prompt_embeds=condition,
        latents=noise[:, 0],
        num_inference_steps=4,
        guidance_scale=1.0,
        output_type="pt",
        height=16,
        width=16,
    ).images
    assert torch.allclose(unrolled(condition, noise), drawn, atol=1e-5)


def test_low_rank_updates_merged_draw_as_diffusers_loads_them(
    make_recipe: RecipeMaker, teacher_folder: Path, tmp_path: Path
) -> None:
    recipe = make_recipe("consistency", lora={"rank": 2}, learning_rate=1e-2)
    merged = load_generator(stage.train(recipe, silent)).denoiser
    pipeline = StableDiffusionPipeline.from_pretrained(teacher_folder, text_encoder=None, tokenizer=None)
    pipeline.load_lora_weights(tmp_path / "run" / "lora")
    latents, condition = torch.randn(1, 4, 8, 8), torch.randn(1, 1, 384)
    with torch.no_grad():
        expected = pipeline.unet(latents, 300, condition).sample
        plain = load_generator(teacher_folder).denoiser(latents, 300, condition).sample
        found = merged(latents, 300, condition).sample
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-4)


def test_latents_and_conditions_are_encoded_once(make_recipe: RecipeMaker, monkeypatch: Any) -> None:
    recipe = make_recipe("teacher", max_steps=2)
    stage.train(recipe, silent)
    told: list[str] = []
    stage.train(recipe.model_copy(update={"max_steps": 2, "output": recipe.output / "again"}), told.append)
    assert not any(line.startswith(("latents", "conditions", "pictures:")) for line in told)


def test_another_teacher_or_rate_is_no_going_on(make_recipe: RecipeMaker) -> None:
    stage.train(make_recipe("teacher", max_steps=2), silent)
    with pytest.raises(MobileMMError, match="'learning_rate'"):
        stage.train(make_recipe("teacher", max_steps=2, learning_rate=1e-4), silent)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("stage: teachers", "key 'stage'"),
        ("stage: teacher\nmax_steps: 5\noutput: o\ndata: [{path: p}]", "generator"),
        ("stage: consistency\nmax_steps: 5\noutput: o\ndata: [{path: p}]\ngenerator: g\nphase: 2", "'phase'"),
        ("stage: teacher\nmax_steps: 0\noutput: o\ndata: [{path: p}]\ngenerator: g", "'max_steps'"),
        ("stage: teacher\nmax_steps: 5\noutput: o\ndata: [{}]\ngenerator: g", r"'data\.0\.path'"),
    ],
)
def test_a_recipes_error_names_its_key(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(MobileMMError, match=told):
        read_recipe(path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_size": 32}, "image_size"),
        ({"data": [{"path": "PAIRS", "sources": ["none"]}]}, r"data\.0"),
        ({"condition": "t5"}, "unknown source of the condition"),
        ({"generator": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_used_is_told_before_training(
    changes: dict[str, Any], told: str, make_recipe: RecipeMaker, pairs: Path
) -> None:
    for source in changes.get("data", []):
        source["path"] = pairs
    with pytest.raises(MobileMMError, match=told):
        stage.train(make_recipe("teacher", **changes), silent)


def test_the_shipped_recipes_are_whole() -> None:
    for path in sorted(Path("recipes/default").glob("generator_*.yaml")):
        assert read_recipe(path).output.parts[:2] == ("runs", "generator"), path
