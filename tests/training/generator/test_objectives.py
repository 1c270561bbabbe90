"""Each loss against a computation of its own, on diffusers' schedulers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler
from torch import Tensor

from mobilemm.errors import MobileMMError
from mobilemm.generation import diffusion
from mobilemm.generation.generator import Generator, load_generator
from mobilemm.generation.sampling import boundary_scalings
from mobilemm.training.generator.blocks import BlocksObjective, drop_blocks
from mobilemm.training.generator.consistency import ConsistencyObjective, SolverTable
from mobilemm.training.generator.data import rows_of_step
from mobilemm.training.generator.distribution_matching import DistributionMatchingObjective
from mobilemm.training.generator.objectives import (
    AutoencoderObjective,
    LatentBatch,
    TeacherObjective,
)
from tests.generation.tiny_generator import tiny_autoencoder, tiny_unet, write_generator
from tests.training.generator.conftest import RecipeMaker

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def randomly(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Generator:
    return load_generator(teacher_folder)


@pytest.fixture
def batch() -> LatentBatch:
    times = torch.tensor([0.13, 0.4, 0.61, 0.999])
    shapes = (4, 4, 8, 8)
    return LatentBatch(
        randomly(*shapes),
        randomly(4, 1, 384, seed=1),
        randomly(1, 1, 384, seed=2),
        randomly(*shapes, seed=3),
        times,
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_targets_and_jumps_are_those_of_diffusers(prediction: str) -> None:
    config: dict[str, Any] = {"beta_schedule": "scaled_linear", "prediction_type": prediction}
    scheduler = DDIMScheduler(**config, clip_sample=False)
    latents, noise, predicted = (randomly(3, 4, 8, 8, seed=seed) for seed in range(3))
    timesteps = torch.tensor([980, 500, 20])
    alphas = scheduler.alphas_cumprod
    noisy = diffusion.add_noise(latents, noise, alphas[timesteps])
    assert torch.allclose(noisy, scheduler.add_noise(latents, noise, timesteps), atol=1e-6)

    velocity = DDPMScheduler(**config).get_velocity(latents, noise, timesteps)
    wanted = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[prediction]
    told = diffusion.target(prediction, latents, noise, alphas[timesteps])
    assert torch.allclose(told, wanted, atol=1e-6)
    clean, eps = diffusion.clean_and_noise(prediction, told, noisy, alphas[timesteps])
    assert torch.allclose(clean, latents, atol=1e-5)
    assert torch.allclose(eps, noise, atol=1e-5)

    scheduler.set_timesteps(50)
    for row, timestep in enumerate(timesteps.tolist()):
        one = slice(row, row + 1)
        expected = scheduler.step(predicted[one], timestep, noisy[one])
        found = diffusion.clean_and_noise(prediction, predicted[one], noisy[one], alphas[timestep][None])
        jumped = diffusion.ddim_jump(*found, alphas[timestep - 20][None])
        scale = expected.prev_sample.abs().max()
        assert (found[0] - expected.pred_original_sample).abs().max() <= 1e-6 * max(1, found[0].abs().max())
        assert (jumped - expected.prev_sample).abs().max() <= 1e-6 * max(1, scale)


def test_boundary_scalings_are_those_of_diffusers() -> None:
    scheduler = LCMScheduler()
    timesteps = torch.tensor([0, 1, 19, 499, 999])
    skip, out = diffusion.consistency_scalings(timesteps)
    for row, timestep in enumerate(timesteps.tolist()):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        assert boundary_scalings(timestep) == pytest.approx(expected, rel=1e-12)
        assert (skip[row].item(), out[row].item()) == pytest.approx(expected, rel=1e-6)
    assert (skip[0].item(), out[0].item()) == (1, 0)


def test_the_solver_is_that_of_the_published_example() -> None:
    """Its arrays: timesteps 19, 39, … 999; the step before ends at 0."""
    table = SolverTable(torch.linspace(1, 0, 1000), 50)
    assert table.start.tolist() == [20 * (index + 1) - 1 for index in range(50)]
    assert table.end.tolist() == [0, *(20 * (index + 1) - 1 for index in range(49))]
    assert not table.edge.any()


def test_phases_end_where_the_sampler_stops() -> None:
    scheduler_edges = [759, 499, 259, 0]
    table = SolverTable(torch.linspace(1, 0, 1000), 50, phases=4)
    assert sorted(set(table.edge.tolist()), reverse=True) == scheduler_edges
    for start, end, edge in zip(table.start.tolist(), table.end.tolist(), table.edge.tolist(), strict=True):
        assert edge == max(found for found in scheduler_edges if found < start)
        assert end >= edge


def test_the_teachers_loss(teacher: Generator, batch: LatentBatch) -> None:
    scheduler = DDPMScheduler.from_config(teacher.scheduler_config)
    timesteps = (batch.times * 1000).long()
    noisy = scheduler.add_noise(batch.latents, batch.noise, timesteps)
    predicted = teacher.denoiser(noisy, timesteps, batch.conditions).sample
    expected = (predicted - scheduler.get_velocity(batch.latents, batch.noise, timesteps)).square().mean()
    assert TeacherObjective(teacher)(batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_autoencoders_loss(make_recipe: RecipeMaker) -> None:
    recipe: Any = make_recipe("autoencoder", new_autoencoder={"_class_name": "AutoencoderTiny"})
    autoencoder: Any = tiny_autoencoder("tiny")
    pictures, noise = torch.rand(2, 3, 16, 16), randomly(2, 4, 8, 8)
    latents = autoencoder.encoder(pictures * 2 - 1)
    error = autoencoder.decoder(latents + 0.05 * noise) - (pictures * 2 - 1)
    across = (error[..., 1:] - error[..., :-1]).abs().mean() + (
        error[:, :, 1:] - error[:, :, :-1]
    ).abs().mean()
    channels = latents.transpose(0, 1).flatten(1)
    moments = (channels.mean(1) ** 2 + (channels.std(1) - 1) ** 2).mean()
    expected = error.abs().mean() + 0.5 * across + 0.01 * moments
    found = AutoencoderObjective(autoencoder, recipe)(pictures, noise)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("embed_guidance", [None, 8])
def test_the_consistency_loss(
    teacher: Generator, batch: LatentBatch, make_recipe: RecipeMaker, embed_guidance: int | None
) -> None:
    """By diffusers' schedulers, a sample at a time; the student differs from its target."""
    recipe: Any = make_recipe("consistency", guidance_max=2.0, embed_guidance=embed_guidance)
    objective = ConsistencyObjective(teacher, recipe)
    with torch.no_grad():
        for parameter in objective.target.parameters():
            parameter.mul_(0.9)
    lcm = LCMScheduler.from_config(teacher.scheduler_config)
    ddim = DDIMScheduler.from_config(teacher.scheduler_config, timestep_spacing="leading", steps_offset=19)
    ddim.set_timesteps(50)
    lcm.set_timesteps(50)
    distances = []
    for row in range(4):
        one = slice(row, row + 1)
        index = int(batch.times[row] * 50)
        start, end = 20 * index + 19, max(20 * index - 1, 0)
        scale = 1 + float(batch.times[row] * 50) % 1
        noisy = ddim.add_noise(batch.latents[one], batch.noise[one], torch.tensor([start]))
        with torch.no_grad():
            full = teacher.denoiser(noisy, start, batch.conditions[one]).sample
            empty = teacher.denoiser(noisy, start, batch.empty).sample
            before = ddim.step(empty + scale * (full - empty), start, noisy).prev_sample

        def answer(
            network: Any, latents: Tensor, timestep: int, row: int = row, scale: float = scale
        ) -> Tensor:
            from diffusers import LatentConsistencyModelPipeline as Pipeline

            cond = None
            if embed_guidance:
                cond = Pipeline.get_guidance_scale_embedding(None, torch.tensor([scale - 1]), embed_guidance)
            condition = batch.conditions[row : row + 1]
            predicted = network(latents, timestep, condition, timestep_cond=cond).sample
            lcm._step_index = None
            return lcm.step(predicted, torch.tensor(timestep), latents).denoised

        found, wanted = answer(objective.learner, noisy, start), answer(objective.target, before, end)
        distances.append((((found - wanted) ** 2 + 1e-6).sqrt() - 1e-3).mean())
    assert objective(batch).item() == pytest.approx(torch.stack(distances).mean().item(), rel=1e-4)


def test_phased_answers_agree_at_the_edge(
    teacher: Generator, batch: LatentBatch, make_recipe: RecipeMaker
) -> None:
    recipe: Any = make_recipe("consistency", phases=4)
    objective = ConsistencyObjective(teacher, recipe)
    edge = torch.tensor([0, 259, 499, 759])
    found = objective.answer(objective.learner, batch.latents, edge, edge, batch.conditions, torch.ones(4))
    assert torch.allclose(found, batch.latents, atol=1e-5)


def test_the_target_trails_the_student(teacher: Generator, make_recipe: RecipeMaker) -> None:
    recipe: Any = make_recipe("consistency", target_decay=0.75)
    objective = ConsistencyObjective(teacher, recipe)
    before = objective.target.conv_in.weight.clone()
    with torch.no_grad():
        objective.learner.conv_in.weight.add_(1.0)
    objective.follow()
    assert torch.allclose(objective.target.conv_in.weight, before + 0.25, atol=1e-6)


def test_low_rank_updates_begin_at_nothing_and_leave_the_teacher_alone(
    teacher: Generator, batch: LatentBatch, make_recipe: RecipeMaker
) -> None:
    recipe: Any = make_recipe("consistency", lora={"rank": 2})
    objective = ConsistencyObjective(teacher, recipe)
    assert all(".lora_" in name for name in objective.learned())
    with torch.no_grad():
        ours = objective.learner(batch.latents, 500, batch.conditions).sample
        theirs = teacher.denoiser(batch.latents, 500, batch.conditions).sample
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_dropped_blocks_keep_the_teachers_weights(
    tmp_path: Path, batch: LatentBatch, make_recipe: Any
) -> None:
    teacher = load_generator(write_generator(tmp_path / "one", "sd15", 1, 384))
    counts = {}
    for size in ("base", "small", "tiny"):
        student, pairs = drop_blocks(teacher.denoiser, size)
        counts[size] = sum(parameter.numel() for parameter in student.parameters())
        assert len(pairs) == {"base": 9, "small": 8, "tiny": 5}[size]
        old, new = teacher.denoiser.state_dict(), student.state_dict()
        first = 1 if size == "tiny" else 0
        for layer, of in ((0, 0), (1, 2)):
            name = "resnets.{}.conv1.weight"
            mine = new[f"up_blocks.1.{name.format(layer)}"]
            assert torch.equal(mine, old[f"up_blocks.{1 + first}.{name.format(of)}"])
        recipe = make_recipe("blocks", drop_blocks=size)
        loss = BlocksObjective(teacher, recipe)(batch)
        loss.backward()
        assert loss.isfinite()
    whole = sum(parameter.numel() for parameter in teacher.denoiser.parameters())
    assert counts["tiny"] < counts["small"] < counts["base"] < whole
    bk_sdm_tiny = sum(parameter.numel() for parameter in tiny_unet("bk_sdm_tiny", 384).parameters())
    assert counts["tiny"] == bk_sdm_tiny
    with pytest.raises(MobileMMError, match="layers_per_block"):
        drop_blocks(tiny_unet("bk_sdm_tiny", 384), "base")


def test_a_student_that_is_its_teacher_has_no_features_to_learn(
    tmp_path: Path, batch: LatentBatch, make_recipe: RecipeMaker
) -> None:
    teacher = load_generator(write_generator(tmp_path / "one", "sd15", 1, 384))
    recipe: Any = make_recipe("blocks", drop_blocks="base")
    objective = BlocksObjective(teacher, recipe)
    objective.learner = teacher.denoiser
    objective.pairs = [(old, old) for _, old in objective.pairs]
    alone = TeacherObjective(teacher)(batch)
    assert objective(batch).item() == pytest.approx(alone.item(), rel=1e-6)


def test_the_push_of_distribution_matching(
    teacher: Generator, teacher_folder: Path, batch: LatentBatch, make_recipe: RecipeMaker
) -> None:
    """While the fake network is the unguided teacher, the push is what guidance adds, and 0 without."""
    for scale in (1.0, 2.0):
        recipe: Any = make_recipe(
            "distribution_matching", student=teacher_folder, guidance_scale=scale, fake_steps=1, steps=2
        )
        objective = DistributionMatchingObjective(teacher, load_generator(teacher_folder), recipe)
        timesteps = torch.tensor([100, 400, 600, 900])
        alpha = teacher.alphas_cumprod[timesteps].float()
        noisy = diffusion.add_noise(batch.latents, batch.noise, alpha)
        push = objective.push(batch.latents, noisy, timesteps, alpha, batch)
        with torch.no_grad():
            full = teacher.denoiser(noisy, timesteps, batch.conditions).sample
            empty = teacher.denoiser(noisy, timesteps, batch.empty.expand_as(batch.conditions)).sample
        sigma = (1 - alpha).sqrt()[:, None, None, None]
        # v-prediction: x̂₀ = √ᾱ z − √(1 − ᾱ) v
        real = alpha.sqrt()[:, None, None, None] * noisy - sigma * (empty + scale * (full - empty))
        wanted = (scale - 1) * sigma * (full - empty)
        wanted = wanted / (batch.latents - real).abs().mean((1, 2, 3), keepdim=True)
        assert torch.allclose(push, wanted, atol=1e-5)


def test_the_students_gradient_is_the_push(
    teacher: Generator, teacher_folder: Path, batch: LatentBatch, make_recipe: RecipeMaker
) -> None:
    recipe: Any = make_recipe("distribution_matching", student=teacher_folder, fake_steps=2, steps=2)
    objective = DistributionMatchingObjective(teacher, load_generator(teacher_folder), recipe)
    random = torch.Generator().manual_seed(0)
    noises, length, turn = objective.chance(batch, random, step=1)
    assert not turn
    objective(batch, noises, length, turn).backward()
    assert all(parameter.grad is None for parameter in objective.student.denoiser.parameters())
    assert any(parameter.grad is not None for parameter in objective.fake.parameters())
    noises, length, turn = objective.chance(batch, random, step=2)
    assert turn
    objective(batch, noises, length, turn).backward()
    assert any(parameter.grad is not None for parameter in objective.student.denoiser.parameters())


def test_rows_go_through_every_picture_each_epoch() -> None:
    import numpy as np

    order = np.array([0, 1, 2, 3, 4, 4])
    seen = np.concatenate([rows_of_step(order, 4, step, seed=0) for step in range(3)])
    for epoch in (seen[:6], seen[6:]):
        assert sorted(epoch.tolist()) == order.tolist()
    assert seen[:6].tolist() != seen[6:].tolist()
    assert rows_of_step(order, 4, 1, seed=0).tolist() == seen[4:8].tolist()


def test_shifted_times_are_late_and_the_share_of_empty_conditions_is_kept(
    make_recipe: RecipeMaker, pairs: Path
) -> None:
    import numpy as np

    from mobilemm.training.generator.data import DrawingSet, LatentSet
    from mobilemm.training.generator.objectives import latent_batch

    recipe: Any = make_recipe("teacher", time_shift=3.0, empty_share=0.25, condition_noise=0.0)
    conditions = np.ones((3, 4, 1, 2), np.float32)
    drawings = DrawingSet([], np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, np.int64), "")
    data = LatentSet(drawings, np.zeros((4, 4, 8, 8), np.float32), conditions, torch.zeros(1, 1, 2))
    batch = latent_batch(data, np.zeros(4000, int), recipe, torch.Generator().manual_seed(0))
    # t' > ½ where 3 t > ½ (1 + 2 t), that is t > ¼.
    assert (batch.times > 0.5).float().mean().item() == pytest.approx(0.75, abs=0.001)
    assert (batch.conditions == 0).all(-1).float().mean().item() == pytest.approx(0.25, abs=0.03)
