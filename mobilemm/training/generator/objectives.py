"""What a stage minimizes: the autoencoder's loss and the teacher's; what all objectives have in common."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mobilemm.generation import diffusion
from mobilemm.generation.generator import Generator
from mobilemm.training.generator.data import LatentSet
from mobilemm.training.generator.recipe import AutoencoderRecipe


@dataclass
class LatentBatch:
    """Latents (n, c, h, w), conditions (n, tokens, width) some of them empty, noise, times in [0, 1)."""

    latents: Tensor
    conditions: Tensor
    empty: Tensor
    noise: Tensor
    times: Tensor

    def timesteps(self, length: int) -> Tensor:
        """The times as whole numbers below `length`."""
        return (self.times * length).long().clamp(max=length - 1)


class Objective(nn.Module):
    """A loss over a batch, and the network that learns from it. What is frozen in it has no gradients."""

    learner: nn.Module

    def learned(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {name: value for name, value in self.learner.named_parameters() if value.requires_grad}

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return [{"params": list(self.learned().values()), "lr": learning_rate}]

    def follow(self) -> None:
        """Called after each step: averages that trail the weights."""

    def trailing(self) -> dict[str, Tensor]:
        """What `follow` keeps, and a checkpoint must hold."""
        return {}


class AutoencoderObjective(Objective):
    """mean|x̂ − x| + g · mean|∇x̂ − ∇x| + m · (mean² + (deviation − 1)²) of each latent channel.

    With AutoencoderKL the last term is the KL to a unit normal, a mean over latents. Pictures (n, 3, H, W) in
    [0, 1].
    """

    def __init__(self, autoencoder: Any, recipe: AutoencoderRecipe) -> None:
        super().__init__()
        self.learner: Any = autoencoder
        self.recipe = recipe

    def forward(self, pictures: Tensor, noise: Tensor) -> Tensor:
        """`noise` (n, c, h, w) smooths the latents; it is added `latent_noise` times."""
        signed = pictures * 2 - 1
        encoded = self.learner.encode(signed)
        if hasattr(encoded, "latents"):
            latents = encoded.latents
            moments = latents.mean((0, 2, 3)).square() + (latents.std((0, 2, 3)) - 1).square()
            regularizer = moments.mean()
        else:
            latents = encoded.latent_dist.mode()
            regularizer = encoded.latent_dist.kl().mean() / latents[0].numel()
        decoded = self.learner.decode(latents + self.recipe.latent_noise * noise, return_dict=False)[0]
        error = decoded - signed
        across, down = error.diff(dim=3).abs().mean(), error.diff(dim=2).abs().mean()
        loss = error.abs().mean() + self.recipe.gradient_weight * (across + down)
        return loss + self.recipe.moment_weight * regularizer


class TeacherObjective(Objective):
    """‖prediction − target‖² over the schedule. Source: Ho et al. 2020, arXiv 2006.11239, equation 14."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator
        generator.autoencoder.requires_grad_(False)
        self.learner = generator.denoiser

    def forward(self, batch: LatentBatch) -> Tensor:
        alphas = self.generator.alphas_cumprod
        timesteps = batch.timesteps(len(alphas))
        alpha = alphas[timesteps].to(batch.latents.dtype)
        noisy = diffusion.add_noise(batch.latents, batch.noise, alpha)
        predicted = self.generator.denoise(noisy, timesteps, batch.conditions)
        wanted = diffusion.target(self.generator.prediction_type, batch.latents, batch.noise, alpha)
        return functional.mse_loss(predicted, wanted)


def latent_batch(data: LatentSet, rows: Any, recipe: Any, random: torch.Generator) -> LatentBatch:
    """A batch, all its chance drawn from `random`: the ways to say it, what is left out, noise, times.

    Times are stratified, one in each of n equal stretches of [0, 1), then shifted: s t / (1 + (s − 1) t).
    Source of the shift: Esser et al. 2024, arXiv 2403.03206, equation 23.
    """
    latents = torch.from_numpy(data.latents[rows])
    count = len(latents)
    ways = len(data.conditions)
    shares = torch.full((ways,), (1 - recipe.name_share) / max(ways - 1, 1))
    shares[0] = recipe.name_share if ways > 1 else 1.0
    way = torch.multinomial(shares, count, replacement=True, generator=random)
    conditions = torch.from_numpy(data.conditions[way.numpy(), rows])
    jitter = torch.rand(count, 1, 1, generator=random) * torch.randn(conditions.shape, generator=random)
    conditions = conditions + recipe.condition_noise * jitter
    left_out = torch.rand(count, generator=random) < recipe.empty_share
    conditions = torch.where(left_out[:, None, None], data.empty, conditions)
    times = (torch.randperm(count, generator=random) + torch.rand(count, generator=random)) / count
    times = recipe.time_shift * times / (1 + (recipe.time_shift - 1) * times)
    noise = torch.randn(latents.shape, generator=random)
    return LatentBatch(latents, conditions, data.empty, noise, times)


def frozen_copy(module: nn.Module) -> Any:
    """A copy without gradients, in evaluation mode."""
    return copy.deepcopy(module).requires_grad_(False).eval()
