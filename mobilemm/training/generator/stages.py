"""The stages of a generator: what each of them reads, learns, shows and leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobilemm.errors import MobileMMError, one_line
from mobilemm.generation.generator import (
    Generator,
    GeneratorSettings,
    SamplerName,
    load_autoencoder,
    load_generator,
    new_scheduler,
    save_autoencoder,
    save_generator,
)
from mobilemm.generation.sampling import sample_latents, sampling_table
from mobilemm.runtime.noise import normal
from mobilemm.training.generator.data import DrawingSet, LatentSet, open_drawings, open_latents
from mobilemm.training.generator.objectives import (
    AutoencoderObjective,
    Objective,
    TeacherObjective,
    frozen_copy,
    latent_batch,
)
from mobilemm.training.generator.recipe import (
    AutoencoderRecipe,
    BlocksRecipe,
    ConsistencyRecipe,
    DistributionMatchingRecipe,
    GeneratorRecipe,
    TeacherRecipe,
)
from mobilemm.training.generator.stage import Stage
from mobilemm.training.progress import Report

# Steps of DDIM on a teacher's sheet.
SHEET_STEPS = 20
COLUMNS = 12


def prepare(recipe: GeneratorRecipe, report: Report) -> Stage:
    """Reads data and weights. Raises MobileMMError naming the key of what cannot be used."""
    drawings = open_drawings(recipe, report)
    if isinstance(recipe, AutoencoderRecipe):
        return _autoencoder(recipe, drawings)
    if isinstance(recipe, TeacherRecipe):
        return _teacher(recipe, drawings, report)
    if isinstance(recipe, ConsistencyRecipe):
        return _consistency(recipe, drawings, report)
    if isinstance(recipe, BlocksRecipe):
        return _blocks(recipe, drawings, report)
    assert isinstance(recipe, DistributionMatchingRecipe)
    return _distribution_matching(recipe, drawings, report)


def _autoencoder(recipe: AutoencoderRecipe, drawings: DrawingSet) -> Stage:
    if recipe.autoencoder is not None:
        autoencoder = load_autoencoder(recipe.autoencoder)
    else:
        assert recipe.new_autoencoder is not None
        autoencoder = new_module(
            recipe.new_autoencoder, ("AutoencoderTiny", "AutoencoderKL"), "new_autoencoder"
        )
    autoencoder.to(memory_format=torch.channels_last)
    with torch.no_grad():
        encoded = autoencoder.encode(drawings.pixels([0]) * 2 - 1)
    shape = (encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()).shape[1:]

    def batch(rows: Any, random: torch.Generator, step: int) -> tuple[Tensor, Tensor]:
        pictures = drawings.pixels(rows)
        mirrored = torch.rand(len(rows), generator=random) < 0.5
        pictures = torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures)
        return pictures, torch.randn(len(rows), *shape, generator=random)

    def decoded(pictures: Tensor) -> Tensor:
        signed = pictures * 2 - 1
        found = autoencoder.encode(signed)
        latents = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        return (autoencoder.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    def sheet(path: Path) -> None:
        pictures = drawings.pixels(_spread(len(drawings.pairs), recipe.show_samples))
        write_sheet([pictures, decoded(pictures)], path)

    @torch.no_grad()
    def result(run: Path) -> Path:
        rows = _spread(len(drawings.pairs), 512)
        found = [
            autoencoder.encode(drawings.pixels(rows[at : at + 32]) * 2 - 1) for at in range(0, len(rows), 32)
        ]
        latents = [each.latents if hasattr(each, "latents") else each.latent_dist.mode() for each in found]
        # Latents of deviation 1, which the noise schedule counts on.
        autoencoder.register_to_config(scaling_factor=float(1 / torch.cat(latents).std()))
        return save_autoencoder(autoencoder, run / "autoencoder")

    objective = AutoencoderObjective(autoencoder, recipe)
    return Stage(recipe, objective, drawings.order, drawings.identity, batch, sheet, result)


def _teacher(recipe: TeacherRecipe, drawings: DrawingSet, report: Report) -> Stage:
    if recipe.generator is not None:
        generator = load_generator(recipe.generator)
        generator.denoiser.train()
    else:
        assert recipe.new_denoiser is not None
        assert recipe.autoencoder is not None
        denoiser = new_module(
            {"_class_name": "UNet2DConditionModel"} | recipe.new_denoiser,
            ("UNet2DConditionModel",),
            "new_denoiser",
        )
        autoencoder = load_autoencoder(recipe.autoencoder)
        schedule = new_schedule(recipe.noise_schedule)
        generator = Generator(denoiser, autoencoder, schedule, GeneratorSettings(condition_tokens=1))
    generator.settings = replace(
        generator.settings,
        sampler="ddim",
        steps=50,
        guidance_scale=recipe.guidance_scale,
        condition=recipe.condition,
    )
    data = _latents(recipe, drawings, generator, report)
    generator.settings = replace(generator.settings, condition_tokens=data.conditions.shape[2])
    objective = TeacherObjective(generator)

    def sheet(path: Path) -> None:
        write_sheet([drawn(generator, data, recipe.show_samples, SHEET_STEPS)], path)

    return _latent_stage(recipe, data, objective, sheet, partial(_save, generator))


def _consistency(recipe: ConsistencyRecipe, drawings: DrawingSet, report: Report) -> Stage:
    from mobilemm.training.generator.consistency import ConsistencyObjective

    teacher = load_generator(recipe.generator)
    student = None if recipe.student is None else load_generator(recipe.student).denoiser.requires_grad_(True)
    data = _latents(recipe, drawings, teacher, report)
    objective = ConsistencyObjective(teacher, recipe, student)
    generator = few_steps(teacher, objective.learner, recipe)

    def sheet(path: Path) -> None:
        pages = [drawn(generator, data, recipe.show_samples, steps) for steps in sorted({1, recipe.steps})]
        write_sheet(pages, path)

    def result(run: Path) -> Path:
        if recipe.lora is None:
            return _save(generator, run)
        from diffusers import StableDiffusionPipeline
        from peft.utils import get_peft_model_state_dict

        updates = get_peft_model_state_dict(objective.learner)
        # With the scale, which readers take for 1 otherwise.
        StableDiffusionPipeline.save_lora_weights(
            run / "lora",
            unet_lora_layers=updates,
            unet_lora_adapter_metadata=objective.learner.peft_config["default"].to_dict(),
        )
        merged = frozen_copy(objective.learner)
        merged.fuse_lora()
        merged.unload_lora()
        return _save(few_steps(teacher, merged, recipe), run)

    return _latent_stage(recipe, data, objective, sheet, result)


def _blocks(recipe: BlocksRecipe, drawings: DrawingSet, report: Report) -> Stage:
    from mobilemm.training.generator.blocks import BlocksObjective

    teacher = load_generator(recipe.generator)
    data = _latents(recipe, drawings, teacher, report)
    objective = BlocksObjective(teacher, recipe)
    generator = Generator(objective.learner, teacher.autoencoder, teacher.scheduler_config, teacher.settings)

    def sheet(path: Path) -> None:
        write_sheet([drawn(generator, data, recipe.show_samples, SHEET_STEPS)], path)

    return _latent_stage(recipe, data, objective, sheet, partial(_save, generator))


def _distribution_matching(recipe: DistributionMatchingRecipe, drawings: DrawingSet, report: Report) -> Stage:
    from mobilemm.training.generator.distribution_matching import DistributionMatchingObjective

    teacher, student = load_generator(recipe.generator), load_generator(recipe.student)
    data = _latents(recipe, drawings, teacher, report)
    objective = DistributionMatchingObjective(teacher, student, recipe)
    student.settings = replace(student.settings, sampler="lcm", steps=recipe.steps)

    def sheet(path: Path) -> None:
        write_sheet([drawn(student, data, recipe.show_samples, recipe.steps)], path)

    stage = _latent_stage(recipe, data, objective, sheet, partial(_save, student))
    plain = stage.batch

    def batch(rows: Any, random: torch.Generator, step: int) -> tuple[Any, ...]:
        (latents,) = plain(rows, random, step)
        return latents, *objective.chance(latents, random, step)

    stage.batch = batch
    return stage


def few_steps(teacher: Generator, student: Any, recipe: ConsistencyRecipe) -> Generator:
    """The student with its sampler noted: LCM's, or with phases TCD's without renewed noise."""
    sampler: SamplerName = "lcm" if recipe.phases == 1 else "tcd"
    name = "LCMScheduler" if recipe.phases == 1 else "TCDScheduler"
    config = {
        key: value
        for key, value in teacher.scheduler_config.items()
        if key.startswith(("beta_", "num_train", "prediction", "trained", "rescale"))
    }
    # Both schedulers clip in the manner of pixels unless they are told not to.
    config |= {"_class_name": name, "clip_sample": False, "original_inference_steps": recipe.solver_steps}
    scale = 1.0 if recipe.embed_guidance is None else (recipe.guidance_min + recipe.guidance_max) / 2
    settings = replace(
        teacher.settings,
        sampler=sampler,
        steps=recipe.steps if recipe.phases == 1 else recipe.phases,
        guidance_scale=scale,
        gamma=0.0,
        condition=recipe.condition,
    )
    return Generator(student, teacher.autoencoder, config, settings)


def new_module(config: dict[str, Any], classes: Sequence[str], key: str) -> Any:
    """A diffusers model from a config, initialized anew. Raises MobileMMError naming the recipe's key."""
    import diffusers

    name = config.get("_class_name")
    if name not in classes:
        raise MobileMMError(f"key '{key}._class_name': {name!r}; there are: {', '.join(classes)}")
    kind: Any = getattr(diffusers, str(name))
    unknown = sorted(set(config) - {"_class_name"} - set(kind.__init__.__wrapped__.__code__.co_varnames))
    if unknown:
        raise MobileMMError(f"key '{key}.{unknown[0]}': {name} has no such setting")
    try:
        return kind(**{setting: value for setting, value in config.items() if setting != "_class_name"})
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise MobileMMError(f"key {key!r}: {name}: {one_line(error)}") from error


def new_schedule(config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's config: DDIM's, with what the recipe says, and without clipping."""
    values = {"clip_sample": False, "timestep_spacing": "trailing"} | config
    scheduler = new_scheduler(values, "key 'noise_schedule'")
    return {"_class_name": "DDIMScheduler"} | dict(scheduler.config)


@torch.no_grad()
def drawn(generator: Generator, data: LatentSet, count: int, steps: int) -> Tensor:
    """Pictures of names spread over the data, with the noise of seed 0, (count, 3, H, W)."""
    rows = _spread(len(data.drawings.pairs), count)
    condition = torch.from_numpy(np.array(data.conditions[0, rows]))
    table = sampling_table(generator, steps)
    noise = torch.from_numpy(normal(0, (len(rows), table.noises, *generator.latent_shape)))
    latents = sample_latents(generator, condition, noise, table, empty_condition=data.empty)
    return generator.decode(latents)


def write_sheet(pages: Sequence[Tensor], path: Path) -> None:
    """Rows of pictures (n, 3, H, W) in [0, 1] as a PNG; rows of the pages alternate."""
    from PIL import Image

    rows = []
    for start in range(0, len(pages[0]), COLUMNS):
        for page in pages:
            chosen = list(page[start : start + COLUMNS])
            blank = [torch.ones_like(page[0])] * (min(COLUMNS, len(page)) - len(chosen))
            rows.append(torch.cat([*chosen, *blank], 2))
    whole = (torch.cat(rows, 1).permute(1, 2, 0) * 255).round().byte().cpu().numpy()
    Image.fromarray(whole).save(path)


def _latents(recipe: Any, drawings: DrawingSet, generator: Generator, report: Report) -> LatentSet:
    generator.denoiser.to(memory_format=torch.channels_last)
    generator.autoencoder.to(memory_format=torch.channels_last)
    if generator.image_size != (recipe.image_size, recipe.image_size):
        raise MobileMMError(
            f"key 'image_size': {recipe.image_size}; the generator draws {generator.image_size[0]} pixels"
        )
    data = open_latents(recipe, drawings, generator.eval(), report)
    width = generator.condition_shape[1]
    if data.conditions.shape[-1] != width:
        raise MobileMMError(
            f"key 'condition': {recipe.condition} is {data.conditions.shape[-1]} wide, not {width}"
        )
    return data


def _latent_stage(recipe: Any, data: LatentSet, objective: Objective, sheet: Any, result: Any) -> Stage:
    def batch(rows: Any, random: torch.Generator, step: int) -> tuple[Any, ...]:
        return (latent_batch(data, rows, recipe, random),)

    digest = hashlib.sha256(data.drawings.identity.encode())
    for value in objective.learned().values():
        digest.update(value.detach().cpu().contiguous().view(-1)[:64].numpy().tobytes())
    return Stage(recipe, objective, data.drawings.order, digest.hexdigest()[:16], batch, sheet, result)


def _save(generator: Generator, run: Path) -> Path:
    return save_generator(generator, run / "generator")


def _spread(whole: int, count: int) -> list[int]:
    return [int(place) for place in np.linspace(0, whole - 1, min(count, whole)).round()]
