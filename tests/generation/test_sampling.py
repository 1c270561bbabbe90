"""Tables and shipped modules draw what diffusers' own schedulers draw, for the same noise."""

from __future__ import annotations

from itertools import product
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from mobilemm.errors import MobileMMError
from mobilemm.generation import sampling
from mobilemm.generation.generator import Generator, guidance_embedding, load_generator
from mobilemm.generation.sampling import GeneratorStep, LatentDecoder, UnrolledGenerator, sampling_table
from tests.generation.tiny_generator import FAMILIES, write_generator

SCHEDULERS: dict[str, Any] = {
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "lcm": diffusers.LCMScheduler,
    "tcd": diffusers.TCDScheduler,
}


@pytest.fixture(scope="module")
def generators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Generator]:
    folder = tmp_path_factory.mktemp("generators")
    return {family: load_generator(write_generator(folder / family, family)) for family in FAMILIES}


def inputs(generator: Generator, noises: int, pictures: int = 2) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    condition = torch.randn(pictures, *generator.condition_shape, generator=random)
    return condition, torch.randn(pictures, noises, *generator.latent_shape, generator=random)


def drawn_by_diffusers(
    generator: Generator, sampler: str, steps: int, condition: Tensor, noise: Tensor, monkeypatch: Any
) -> Tensor:
    """The loop of diffusers' pipelines over its scheduler, which takes its fresh noise from ours."""
    config = {key: value for key, value in generator.scheduler_config.items() if key != "clip_sample"}
    scheduler = SCHEDULERS[sampler].from_config(config | {"clip_sample": False, "thresholding": False})
    fresh = iter(noise.unbind(1))
    latents = next(fresh)
    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(fresh))
    if sampler == "lcm":
        scheduler.set_timesteps(steps, original_inference_steps=50)
    else:
        scheduler.set_timesteps(steps)
    latents = latents * scheduler.init_noise_sigma
    cond = None
    if generator.denoiser.config.time_cond_proj_dim:
        cond = guidance_embedding(torch.full((len(latents),), generator.settings.guidance_scale), 8)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            entering = scheduler.scale_model_input(latents, timestep)
            predicted = generator.denoiser(entering, timestep, condition, timestep_cond=cond).sample
            kwargs = {"eta": generator.settings.gamma} if sampler == "tcd" else {}
            latents = scheduler.step(predicted, timestep, latents, **kwargs).prev_sample
    return latents


PREDICTIONS, SPACINGS = ("epsilon", "v_prediction", "sample"), ("leading", "trailing", "linspace")


@pytest.mark.parametrize(
    ("sampler", "steps", "prediction", "spacing"),
    [
        # diffusers' Euler knows no prediction of the sample; consistency models have one spacing.
        *product(("ddim",), (1, 7), PREDICTIONS, SPACINGS),
        *product(("euler",), (1, 4), PREDICTIONS[:2], SPACINGS),
        *product(("lcm", "tcd"), (1, 4), PREDICTIONS, SPACINGS[:1]),
    ],
)
def test_a_table_draws_as_diffusers_scheduler(
    generators: dict[str, Generator],
    sampler: str,
    steps: int,
    prediction: str,
    spacing: str,
    monkeypatch: Any,
) -> None:
    base = generators["sd_turbo"]
    config = base.scheduler_config | {"prediction_type": prediction, "timestep_spacing": spacing}
    generator = Generator(base.denoiser, base.autoencoder, config, base.settings)
    condition, noise = inputs(generator, 4)
    table = sampling_table(generator, steps, sampler)
    assert table.noises == (steps if sampler in ("lcm", "tcd") else 1)
    drawn = sampling.sample_latents(generator, condition, noise, table, guidance_scale=1.0)
    expected = drawn_by_diffusers(generator, sampler, steps, condition, noise, monkeypatch)
    assert (drawn - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("steps", [1, 2, 4])
@torch.no_grad()
def test_one_graph_and_steps_apart_draw_as_diffusers(
    generators: dict[str, Generator], family: str, steps: int, monkeypatch: Any
) -> None:
    generator = generators[family]
    unrolled = UnrolledGenerator(generator, steps)
    condition, noise = inputs(generator, unrolled.table.noises)
    expected = drawn_by_diffusers(generator, generator.settings.sampler, steps, condition, noise, monkeypatch)
    pictures = unrolled(condition, noise)
    assert pictures.shape == (2, 3, *generator.image_size)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert torch.allclose(pictures, generator.decode(expected), atol=1e-6)

    step, decoder = GeneratorStep(generator), LatentDecoder(generator)
    latents = noise[:, 0]
    for index, row in enumerate(unrolled.table.rows):
        fresh = noise[:, index + 1] if index + 1 < noise.shape[1] else torch.zeros_like(latents)
        latents = step(latents, condition, fresh, torch.tensor(row))
    assert torch.allclose(decoder(latents), pictures, atol=1e-6)


@torch.no_grad()
def test_guidance_is_that_of_diffusers_pipeline(generators: dict[str, Generator]) -> None:
    generator = generators["sd15"]
    scheduler = diffusers.DDIMScheduler.from_config(generator.scheduler_config, clip_sample=False)
    pipeline = diffusers.StableDiffusionPipeline(
        generator.autoencoder, None, None, generator.denoiser, scheduler, None, None, None, False
    )
    pipeline.set_progress_bar_config(disable=True)
    condition, noise = inputs(generator, 1)
    empty = torch.zeros(1, *generator.condition_shape)
    expected = pipeline(
        prompt_embeds=condition,
        negative_prompt_embeds=empty.expand_as(condition),
        latents=noise[:, 0],
        num_inference_steps=5,
        guidance_scale=4.0,
        output_type="latent",
        height=16,
        width=16,
    ).images
    table = sampling_table(generator, 5)
    drawn = sampling.sample_latents(generator, condition, noise, table, 4.0, empty)
    assert (drawn - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_the_graph_has_no_branches(generators: dict[str, Generator]) -> None:
    generator = generators["default"]
    unrolled = UnrolledGenerator(generator, 2, "lcm").eval()
    condition, noise = inputs(generator, 2)
    program = torch.export.export(unrolled, (condition, noise))
    with torch.no_grad():
        assert torch.allclose(program.module()(condition, noise), unrolled(condition, noise), atol=1e-6)
    step = GeneratorStep(generator).eval()
    first, second = unrolled.rows
    program = torch.export.export(step, (noise[:, 0], condition, noise[:, 1], first))
    with torch.no_grad():
        last = (noise[:, 0], condition, noise[:, 1], second)
        assert torch.allclose(program.module()(*last), step(*last), atol=1e-6)


def test_steps_that_the_schedule_lacks_are_told(generators: dict[str, Generator]) -> None:
    with pytest.raises(MobileMMError, match="51 steps: lcm takes 1 to 50"):
        sampling_table(generators["lcm"], 51)
    with pytest.raises(MobileMMError, match="unknown sampler"):
        sampling_table(generators["lcm"], 4, "heun")
