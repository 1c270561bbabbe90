"""Samplers as tables of coefficients, and the modules that ship: all steps in one graph, or one at a time.

DDIM, Euler, LCM and TCD have one form: the next latents are a sum of the latents, the denoiser's prediction
and fresh noise, each times a number that is known beforehand. So a phone needs no scheduler, and a graph has
no branch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.generation.generator import Generator, decode, denoise

# Those of the published consistency models: the solver's steps, σ_data, time's scale.
ORIGINAL_STEPS = 50
SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


@dataclass(frozen=True)
class SamplingTable:
    """Of each step: the timestep, and what latents, prediction and fresh noise count for in the next latents.

    `initial` is what the first noise is multiplied by. `noises` is how many of them a picture takes.
    """

    timesteps: tuple[float, ...]
    latents: tuple[float, ...]
    prediction: tuple[float, ...]
    noise: tuple[float, ...]
    initial: float = 1.0

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def noises(self) -> int:
        return 1 + sum(value != 0 for value in self.noise)

    @property
    def rows(self) -> list[list[float]]:
        """Of each step what `GeneratorStep` takes as `scales`, `initial` within the first."""
        enters = [self.initial] + [1.0] * (self.steps - 1)
        latents = [value * enter for value, enter in zip(self.latents, enters, strict=True)]
        columns = (self.timesteps, enters, latents, self.prediction, self.noise)
        return [list(row) for row in zip(*columns, strict=True)]


def sampling_table(
    generator: Generator, steps: int | None = None, sampler: str | None = None
) -> SamplingTable:
    """The table of a generator's sampler, or of another one, for so many steps (those it is made for).

    Sources: DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12), Euler's method on the probability flow
    (Karras et al. 2022, arXiv 2206.00364), LCM (Luo et al. 2023, arXiv 2310.04378, algorithm 3), TCD (Zheng
    et al. 2024, arXiv 2402.19159, algorithm 2). Raises MobileMMError for steps that the schedule lacks.
    """
    steps = generator.settings.steps if steps is None else steps
    sampler = sampler or generator.settings.sampler
    schedule = _Schedule(generator)
    most = schedule.original_steps if sampler in ("lcm", "tcd") else schedule.length
    if not 1 <= steps <= most:
        raise MobileMMError(f"{steps} steps: {sampler} takes 1 to {most} with this schedule")
    if sampler == "ddim":
        return _ddim(schedule, steps)
    if sampler == "euler":
        return _euler(schedule, steps)
    if sampler == "lcm":
        return _lcm(schedule, steps)
    if sampler == "tcd":
        return _tcd(schedule, steps)
    raise MobileMMError(f"unknown sampler {sampler!r}; there are: ddim, euler, lcm, tcd")


def boundary_scalings(timestep: float, scaling: float = TIMESTEP_SCALING) -> tuple[float, float]:
    """c_skip and c_out of a consistency function f = c_skip · x + c_out · x₀, the identity at timestep 0.

    Source: Luo et al. 2023, arXiv 2310.04378, with the published models' σ_data 0.5 and time's scale 10.
    """
    scaled = timestep * scaling
    square = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / square, scaled / math.sqrt(square)


def consistency_timesteps(length: int, steps: int, original_steps: int = ORIGINAL_STEPS) -> list[int]:
    """The timesteps of LCM and TCD: evenly spread over those it was distilled on, highest first."""
    every = length // original_steps
    origin = [every * (index + 1) - 1 for index in range(original_steps)][::-1]
    return [origin[math.floor(index * original_steps / steps)] for index in range(steps)]


class UnrolledGenerator(nn.Module):
    """Condition and noise → pictures: every step and the decoder in one graph, over shared weights.

    Shapes: condition (n, tokens, width), noise (n, noises, c, h, w) → (n, 3, H, W) in [0, 1]. `noises` (of
    the table) is 1 for deterministic samplers, and the number of steps for those that renew the noise.
    """

    rows: Tensor
    """The table's, float32 (steps, 5)."""

    def __init__(
        self,
        generator: Generator,
        steps: int | None = None,
        sampler: str | None = None,
        guidance_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.step = GeneratorStep(generator, guidance_scale)
        self.decoder = LatentDecoder(generator)
        self.table = sampling_table(generator, steps, sampler)
        self.latent_shape = generator.latent_shape
        rows = torch.tensor(self.table.rows, dtype=torch.float32, device=generator.alphas_cumprod.device)
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, condition: Tensor, noise: Tensor) -> Tensor:
        return self.decoder(self.latents(condition, noise))

    def latents(self, condition: Tensor, noise: Tensor) -> Tensor:
        """The latents that `forward` decodes, (n, c, h, w)."""
        latents = noise[:, 0]
        for index in range(self.table.steps):
            fresh = noise[:, index + 1] if self.table.noise[index] else None
            latents = self.step(latents, condition, fresh, self.rows[index])
        return latents


class GeneratorStep(nn.Module):
    """One step of a sampler, whose numbers are an input: one graph serves any sampler and number of steps.

    Shapes: latents (n, c, h, w), condition (n, tokens, width), noise as the latents, scales (5,): a row of
    `SamplingTable.rows` → latents. The first step's latents are noise; `noise` is read by samplers that renew
    it, and may be None where it counts for nothing.
    """

    guidance: Tensor

    def __init__(self, generator: Generator, guidance_scale: float | None = None) -> None:
        super().__init__()
        self.denoiser: Any = generator.denoiser
        scale = generator.settings.guidance_scale if guidance_scale is None else guidance_scale
        self.register_buffer("guidance", torch.tensor([float(scale)]), persistent=False)

    def forward(self, latents: Tensor, condition: Tensor, noise: Tensor | None, scales: Tensor) -> Tensor:
        times, scales = scales[0].expand(latents.shape[0]), scales.to(latents.dtype)
        takes_scale = self.denoiser.config.time_cond_proj_dim is not None
        guidance = self.guidance.expand(latents.shape[0]) if takes_scale else None
        predicted: Tensor = denoise(self.denoiser, latents * scales[1], times, condition, guidance)
        following = latents * scales[2] + predicted * scales[3]
        return following if noise is None else following + noise * scales[4]


class LatentDecoder(nn.Module):
    """Latents (n, c, h, w) → pictures (n, 3, H, W) in [0, 1]: what follows the last step."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.autoencoder: Any = generator.autoencoder

    def forward(self, latents: Tensor) -> Tensor:
        return decode(self.autoencoder, latents)


@torch.no_grad()
def sample_latents(
    generator: Generator,
    condition: Tensor,
    noise: Tensor,
    table: SamplingTable | None = None,
    guidance_scale: float | None = None,
    empty_condition: Tensor | None = None,
) -> Tensor:
    """Latents (n, c, h, w) by classifier-free guidance: ε = ε_empty + w · (ε_condition − ε_empty).

    Shapes: condition (n, tokens, width), noise (n, noises, c, h, w), empty_condition (1, tokens, width) or
    (n, …); without it, or with w = 1, nothing is guided and the denoiser runs once a step.
    Source: Ho & Salimans 2022, arXiv 2207.12598.
    """
    table = table or sampling_table(generator)
    scale = generator.settings.guidance_scale if guidance_scale is None else guidance_scale
    latents = noise[:, 0] * table.initial
    rows = zip(table.timesteps, table.latents, table.prediction, table.noise, strict=True)
    for index, (timestep, keep, gain, renew) in enumerate(rows):
        times = torch.full((len(latents),), timestep, dtype=torch.float32, device=latents.device)
        predicted = guided_prediction(generator, latents, times, condition, scale, empty_condition)
        latents = keep * latents + gain * predicted
        if renew:
            latents = latents + renew * noise[:, index + 1]
    return latents


def guided_prediction(
    generator: Generator,
    latents: Tensor,
    timesteps: Tensor,
    condition: Tensor,
    guidance_scale: float | Tensor,
    empty_condition: Tensor | None,
) -> Tensor:
    """The denoiser's prediction with classifier-free guidance; `guidance_scale` is one, or (n,) of them.

    A denoiser that takes the scale as an input runs once, with it.
    """
    scales = torch.as_tensor(guidance_scale, dtype=latents.dtype, device=latents.device).expand(len(latents))
    if generator.denoiser.config.time_cond_proj_dim is not None:
        return generator.denoise(latents, timesteps, condition, scales)
    if empty_condition is None or bool((scales == 1).all()):
        return generator.denoise(latents, timesteps, condition)
    both = torch.cat([empty_condition.expand_as(condition), condition])
    empty, full = generator.denoise(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), both).chunk(2)
    return empty + scales[:, None, None, None] * (full - empty)


class _Schedule:
    """A schedule in float64: how latents and prediction make the clean latents and their noise."""

    def __init__(self, generator: Generator) -> None:
        config = generator.scheduler_config
        self.alphas = generator.alphas_cumprod.double().cpu().numpy()
        self.length = len(self.alphas)
        self.prediction = generator.prediction_type
        # Past the last step: ᾱ = 1, no noise, unless the config wants the schedule's own first value.
        self.final = 1.0 if config.get("set_alpha_to_one", True) else float(self.alphas[0])
        self.spacing = str(config.get("timestep_spacing", "leading"))
        self.offset = int(config.get("steps_offset", 0))
        self.original_steps = int(config.get("original_inference_steps", ORIGINAL_STEPS))
        self.timestep_scaling = float(config.get("timestep_scaling", TIMESTEP_SCALING))
        self.gamma = generator.settings.gamma

    def alpha(self, timestep: float) -> float:
        """ᾱ, between two timesteps by σ interpolated, as Euler's method has it."""
        sigmas = np.sqrt((1 - self.alphas) / self.alphas)
        return float(1 / (1 + np.interp(timestep, np.arange(self.length), sigmas) ** 2))

    def clean(self, alpha: float) -> np.ndarray:
        """What latents and prediction count for in x₀."""
        signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
        if self.prediction == "epsilon":
            return np.array([1 / signal, -noise / signal])
        return np.array([signal, -noise]) if self.prediction == "v_prediction" else np.array([0.0, 1.0])

    def noise(self, alpha: float) -> np.ndarray:
        """What latents and prediction count for in ε."""
        signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
        if self.prediction == "epsilon":
            return np.array([0.0, 1.0])
        if self.prediction == "v_prediction":
            return np.array([noise, signal])
        return np.array([1 / noise, -signal / noise])

    def jump(self, alpha: float, to: float) -> np.ndarray:
        """DDIM's step from ᾱ to another: √ᾱ' x₀ + √(1 − ᾱ') ε."""
        return math.sqrt(to) * self.clean(alpha) + math.sqrt(1 - to) * self.noise(alpha)

    def timesteps(self, steps: int, whole: bool) -> list[float]:
        if self.spacing == "trailing":
            spread = np.round(np.arange(self.length, 0, -self.length / steps)) - 1
        elif self.spacing == "linspace":
            spread = np.linspace(0, self.length - 1, steps)[::-1]
            spread = spread.round() if whole else spread.astype(np.float32)
        elif self.spacing == "leading":
            spread = np.arange(steps)[::-1] * (self.length // steps) + self.offset
        else:
            raise MobileMMError(
                f"scheduler: key 'timestep_spacing': {self.spacing!r}; there are: leading, linspace, trailing"
            )
        return [float(value) for value in np.minimum(spread, self.length - 1)]


def _table(rows: list[tuple[float, np.ndarray, float]], initial: float = 1.0) -> SamplingTable:
    return SamplingTable(
        timesteps=tuple(timestep for timestep, _, _ in rows),
        latents=tuple(float(scales[0]) for _, scales, _ in rows),
        prediction=tuple(float(scales[1]) for _, scales, _ in rows),
        noise=tuple(noise for _, _, noise in rows),
        initial=initial,
    )


def _ddim(schedule: _Schedule, steps: int) -> SamplingTable:
    rows = []
    for timestep in schedule.timesteps(steps, whole=True):
        before = int(timestep) - schedule.length // steps
        to = float(schedule.alphas[before]) if before >= 0 else schedule.final
        rows.append((timestep, schedule.jump(float(schedule.alphas[int(timestep)]), to), 0.0))
    return _table(rows)


def _euler(schedule: _Schedule, steps: int) -> SamplingTable:
    """Euler's step in σ is DDIM's once latents are scaled to keep their variance; the beginning differs."""
    timesteps = schedule.timesteps(steps, whole=False)
    alphas = [schedule.alpha(timestep) for timestep in timesteps]
    # σ_max · noise where the spacing begins at the last timestep, else √(σ² + 1) · noise: in scaled latents.
    initial = 1.0 if schedule.spacing == "leading" else math.sqrt(1 - alphas[0])
    pairs = zip(timesteps, alphas, [*alphas[1:], 1.0], strict=True)
    return _table([(timestep, schedule.jump(alpha, to), 0.0) for timestep, alpha, to in pairs], initial)


def _lcm(schedule: _Schedule, steps: int) -> SamplingTable:
    timesteps = consistency_timesteps(schedule.length, steps, schedule.original_steps)
    rows = []
    for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        skip, out = boundary_scalings(timestep, schedule.timestep_scaling)
        denoised = out * schedule.clean(float(schedule.alphas[timestep])) + np.array([skip, 0.0])
        to = 1.0 if following is None else float(schedule.alphas[following])
        rows.append((float(timestep), math.sqrt(to) * denoised, math.sqrt(1 - to)))
    return _table(rows)


def _tcd(schedule: _Schedule, steps: int) -> SamplingTable:
    timesteps = consistency_timesteps(schedule.length, steps, schedule.original_steps)
    rows = []
    for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        target = math.floor((1 - schedule.gamma) * (following or 0))
        alpha, between = float(schedule.alphas[timestep]), float(schedule.alphas[target])
        scales, noise = schedule.jump(alpha, between), 0.0
        if following is not None and schedule.gamma > 0:
            ratio = float(schedule.alphas[following]) / between
            scales, noise = math.sqrt(ratio) * scales, math.sqrt(1 - ratio)
        rows.append((float(timestep), scales, noise))
    return _table(rows)
