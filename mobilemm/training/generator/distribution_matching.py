"""Distribution matching distillation: pictures are pushed where the teacher finds them likelier.

The push is the difference of two denoisers' clean pictures: the teacher's, and that of a second network which
learns to denoise what the student draws. A regression to real pictures is not needed, because the student
begins as a consistency model; the way there is drawn by the student itself, as it will be when it is used.
Sources: Yin et al. 2023, arXiv 2311.18828 (equations 7 and 8) and 2405.14867 (two rates of learning,
simulation of the way); written from the papers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mobilemm.generation import diffusion
from mobilemm.generation.generator import Generator
from mobilemm.generation.sampling import consistency_timesteps, guided_prediction
from mobilemm.training.generator.objectives import LatentBatch, Objective, frozen_copy
from mobilemm.training.generator.recipe import DistributionMatchingRecipe


class DistributionMatchingObjective(Objective):
    """½ ‖x − (x − g)‖² with g = (x̂_fake − x̂_real) / mean|x − x̂_real| held fixed, and the fake's own loss."""

    def __init__(self, teacher: Generator, student: Generator, recipe: DistributionMatchingRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.teacher = teacher.requires_grad_(False).eval()
        self.student = student
        student.autoencoder.requires_grad_(False)
        student.denoiser.requires_grad_(True)
        self.fake: Any = frozen_copy(teacher.denoiser).requires_grad_(True)
        self.learner = nn.ModuleDict({"student": student.denoiser, "fake": self.fake})
        self.path = consistency_timesteps(len(teacher.alphas_cumprod), recipe.steps)

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        return [
            {"params": list(self.student.denoiser.parameters()), "lr": learning_rate},
            {"params": list(self.fake.parameters()), "lr": self.recipe.fake_learning_rate},
        ]

    def chance(self, batch: LatentBatch, random: torch.Generator, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a step needs beside the batch: noises of the way, how far along it, and whose turn it is."""
        noises = torch.randn(len(self.path) + 1, *batch.latents.shape, generator=random)
        length = torch.randint(len(self.path), (1,), generator=random)
        return noises, length, torch.tensor([step % self.recipe.fake_steps == 0])

    def forward(self, batch: LatentBatch, noises: Tensor, length: Tensor, students_turn: Tensor) -> Tensor:
        turn = bool(students_turn)
        with torch.set_grad_enabled(turn and torch.is_grad_enabled()):
            drawn = self.draw(batch.conditions, noises, int(length))
        alphas = self.teacher.alphas_cumprod.to(drawn.dtype)
        # The ends of the schedule say nothing: nearly all noise, or none.
        count = len(alphas)
        timesteps = ((0.02 + 0.96 * batch.times) * count).long()
        alpha = alphas[timesteps]
        noisy = diffusion.add_noise(drawn, noises[-1], alpha)
        loss = self._fake_loss(noisy.detach(), drawn.detach(), noises[-1], timesteps, alpha, batch)
        if turn:
            push = self.push(drawn.detach(), noisy.detach(), timesteps, alpha, batch)
            loss = loss + 0.5 * functional.mse_loss(drawn, drawn.detach() - push)
        return loss

    def draw(self, conditions: Tensor, noises: Tensor, length: int) -> Tensor:
        """The student's clean latents after `length` of its steps, without gradients, and one with."""
        alphas = self.teacher.alphas_cumprod.to(noises.dtype)
        latents = noises[0]
        with torch.no_grad():
            for index in range(length):
                clean = self._answer(latents, self.path[index], conditions)
                following = alphas[self.path[index + 1]].expand(len(latents))
                latents = diffusion.add_noise(clean, noises[index + 1], following)
        return self._answer(latents, self.path[length], conditions)

    @torch.no_grad()
    def push(
        self, drawn: Tensor, noisy: Tensor, timesteps: Tensor, alpha: Tensor, batch: LatentBatch
    ) -> Tensor:
        """g, away from what the fake network thinks likely and to what the guided teacher does."""
        kind = self.teacher.prediction_type
        predicted = guided_prediction(
            self.teacher, noisy, timesteps, batch.conditions, self.recipe.guidance_scale, batch.empty
        )
        real, _ = diffusion.clean_and_noise(kind, predicted, noisy, alpha)
        told = self.fake(noisy, timesteps, batch.conditions, return_dict=False)[0]
        fake, _ = diffusion.clean_and_noise(kind, told, noisy, alpha)
        return (fake - real) / (drawn - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)

    def _answer(self, latents: Tensor, timestep: int, conditions: Tensor) -> Tensor:
        times = torch.full((len(latents),), timestep, device=latents.device)
        predicted = self.student.denoise(latents, times, conditions)
        alpha = self.teacher.alphas_cumprod.to(latents.dtype)[times]
        clean, _ = diffusion.clean_and_noise(self.student.prediction_type, predicted, latents, alpha)
        skip, out = diffusion.consistency_scalings(times)
        return skip * latents + out * clean

    def _fake_loss(
        self,
        noisy: Tensor,
        drawn: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        alpha: Tensor,
        batch: LatentBatch,
    ) -> Tensor:
        predicted = self.fake(noisy, timesteps, batch.conditions, return_dict=False)[0]
        return functional.mse_loss(
            predicted, diffusion.target(self.teacher.prediction_type, drawn, noise, alpha)
        )
