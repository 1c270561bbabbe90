"""Latent consistency distillation (LCM, LCM-LoRA) and phased consistency (PCM), written from the papers.

One DDIM step of the guided teacher leads from t_{n+1} to t_n; the student's answers at both ends are to
agree. LCM's answer is the clean picture, PCM's the point at the end of the phase.
Sources: Luo et al. 2023, arXiv 2310.04378 (algorithm 1) and 2311.05556 (LCM-LoRA); Wang et al. 2024, arXiv
2405.18407 (PCM). Numbers of the recipes are those of diffusers' published example of LCM.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.generation import diffusion
from mobilemm.generation.generator import Generator, guidance_embedding
from mobilemm.generation.sampling import consistency_timesteps, guided_prediction
from mobilemm.training.generator.objectives import LatentBatch, Objective, frozen_copy
from mobilemm.training.generator.recipe import ConsistencyRecipe, LowRank

# What LCM-LoRA updates: all projections and convolutions of the blocks.
LORA_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
]


class ConsistencyObjective(Objective):
    """Pseudo-Huber distance between the student at t_{n+1} and its average, or itself, at t_n."""

    def __init__(self, teacher: Generator, recipe: ConsistencyRecipe, student: Any = None) -> None:
        super().__init__()
        if teacher.denoiser.config.time_cond_proj_dim is not None:
            raise MobileMMError("key 'generator': this one is a student already; name its teacher")
        self.recipe = recipe
        self.teacher = teacher.requires_grad_(False).eval()
        self.learner: Any = student or new_student(teacher.denoiser, recipe.embed_guidance)
        if recipe.lora is not None:
            add_low_rank(self.learner, recipe.lora)
        self.target: Any = None if recipe.lora is not None else frozen_copy(self.learner)
        solver = SolverTable(teacher.alphas_cumprod, recipe.solver_steps, recipe.phases)
        self.solver: Any = solver

    def forward(self, batch: LatentBatch) -> Tensor:
        solver, recipe = self.solver, self.recipe
        index = batch.timesteps(recipe.solver_steps)
        start, end, edge = solver.start[index], solver.end[index], solver.edge[index]
        alphas = self.teacher.alphas_cumprod.to(batch.latents.dtype)
        noisy = diffusion.add_noise(batch.latents, batch.noise, alphas[start])
        # The batch's noise decides the scale too, so that a step draws from one generator alone.
        shares = (batch.times * recipe.solver_steps) % 1
        scale = recipe.guidance_min + (recipe.guidance_max - recipe.guidance_min) * shares
        found = self.answer(self.learner, noisy, start, edge, batch.conditions, scale)
        with torch.no_grad():
            before = self.teacher_step(noisy, start, end, batch, scale)
            network = self.learner if self.target is None else self.target
            wanted = self.answer(network, before, end, edge, batch.conditions, scale)
        return diffusion.pseudo_huber(found, wanted, recipe.huber_width)

    def answer(
        self, network: Any, noisy: Tensor, timesteps: Tensor, edge: Tensor, conditions: Tensor, scale: Tensor
    ) -> Tensor:
        """f(z, t): the clean latents, z itself at t = 0; with phases DDIM's jump to the edge."""
        width = network.config.time_cond_proj_dim
        embedded = None if width is None else guidance_embedding(scale, width).to(noisy.dtype)
        predicted = network(noisy, timesteps, conditions, timestep_cond=embedded, return_dict=False)[0]
        alphas = self.teacher.alphas_cumprod.to(noisy.dtype)
        kind = self.teacher.prediction_type
        clean, noise = diffusion.clean_and_noise(kind, predicted, noisy, alphas[timesteps])
        if self.recipe.phases > 1:
            return diffusion.ddim_jump(clean, noise, alphas[edge])
        skip, out = diffusion.consistency_scalings(timesteps)
        return skip * noisy + out * clean

    def teacher_step(
        self, noisy: Tensor, start: Tensor, end: Tensor, batch: LatentBatch, scale: Tensor
    ) -> Tensor:
        """One step of DDIM with classifier-free guidance."""
        alphas = self.teacher.alphas_cumprod.to(noisy.dtype)
        predicted = guided_prediction(
            self.teacher, noisy, start, batch.conditions, scale, batch.empty.to(noisy.dtype)
        )
        kind = self.teacher.prediction_type
        clean, noise = diffusion.clean_and_noise(kind, predicted, noisy, alphas[start])
        return diffusion.ddim_jump(clean, noise, alphas[end])

    @torch.no_grad()
    def follow(self) -> None:
        if self.target is not None:
            averages, weights = list(self.target.parameters()), list(self.learner.parameters())
            torch._foreach_lerp_(averages, weights, 1 - self.recipe.target_decay)

    def trailing(self) -> dict[str, Tensor]:
        return {} if self.target is None else dict(self.target.named_parameters())


class SolverTable(nn.Module):
    """The solver's timesteps, where each step ends, and its phase's edge; (solver_steps,) each, ascending.

    With one phase the edge is timestep 0. Edges are the timesteps that TCD's sampler passes in as many steps.
    """

    start: Tensor
    end: Tensor
    edge: Tensor

    def __init__(self, alphas: Tensor, steps: int, phases: int = 1) -> None:
        super().__init__()
        length = len(alphas)
        if steps > length:
            raise MobileMMError(f"key 'solver_steps': {steps} is more than the schedule's {length} timesteps")
        start = torch.tensor(consistency_timesteps(length, steps, steps)[::-1])
        edges = torch.tensor([0, *consistency_timesteps(length, phases, steps)[:0:-1]])
        self.register_buffer("start", start, persistent=False)
        self.register_buffer("end", (start - length // steps).clamp(min=0), persistent=False)
        # The highest edge below the step's start.
        place = torch.searchsorted(edges, start) - 1
        self.register_buffer("edge", edges[place.clamp(min=0)], persistent=False)


def new_student(denoiser: Any, embed_guidance: int | None) -> Any:
    """The teacher's copy; with a width it takes the guidance scale, which counts for nothing at first."""
    if embed_guidance is None:
        student = frozen_copy(denoiser)
        return student.requires_grad_(True)
    config = dict(denoiser.config) | {"time_cond_proj_dim": embed_guidance}
    student = type(denoiser).from_config(config)
    missing, unexpected = student.load_state_dict(denoiser.state_dict(), strict=False)
    assert missing == ["time_embedding.cond_proj.weight"], missing
    assert not unexpected, unexpected
    nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student.eval()


def add_low_rank(denoiser: Any, settings: LowRank) -> None:
    """Freezes the weights and puts low-rank updates beside them, by peft."""
    from peft import LoraConfig

    denoiser.requires_grad_(False)
    denoiser.add_adapter(LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=LORA_TARGETS))
