"""The arithmetic that training and distillation share: noise in, predictions, DDIM's jump, boundaries.

ᾱ is given a sample, (n,); latents, noise and predictions are (n, c, h, w).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mobilemm.generation.sampling import SIGMA_DATA, TIMESTEP_SCALING


def add_noise(latents: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """z_t = √ᾱ z₀ + √(1 − ᾱ) ε. Source: Ho et al. 2020, arXiv 2006.11239, equation 4."""
    return _root(alpha) * latents + _root(1 - alpha) * noise


def target(prediction_type: str, latents: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """What the denoiser is to predict: ε, v = √ᾱ ε − √(1 − ᾱ) z₀, or z₀ itself.

    Source of v: Salimans & Ho 2022, arXiv 2202.00512, section 4.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return _root(alpha) * noise - _root(1 - alpha) * latents
    return latents


def clean_and_noise(
    prediction_type: str, predicted: Tensor, noisy: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor]:
    """ẑ₀ and ε̂ that a prediction about noisy latents stands for."""
    signal, sigma = _root(alpha), _root(1 - alpha)
    if prediction_type == "epsilon":
        return (noisy - sigma * predicted) / signal, predicted
    if prediction_type == "v_prediction":
        return signal * noisy - sigma * predicted, signal * predicted + sigma * noisy
    return predicted, (noisy - signal * predicted) / sigma


def ddim_jump(clean: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """DDIM's deterministic step to ᾱ. Source: Song et al. 2020, arXiv 2010.02502, equation 12 with σ = 0."""
    return add_noise(clean, noise, alpha)


def consistency_scalings(timesteps: Tensor, scaling: float = TIMESTEP_SCALING) -> tuple[Tensor, Tensor]:
    """c_skip and c_out of timesteps (n,), each (n, 1, 1, 1); see sampling.boundary_scalings."""
    scaled = timesteps.to(torch.float32)[:, None, None, None] * scaling
    square = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / square, scaled / square.sqrt()


def pseudo_huber(found: Tensor, wanted: Tensor, width: float) -> Tensor:
    """mean(√((a − b)² + c²) − c): quadratic near zero, linear far off.

    Source: Song & Dhariwal 2023, arXiv 2310.14189, section 3.3.
    """
    return (((found - wanted) ** 2 + width**2).sqrt() - width).mean()


def _root(values: Tensor) -> Tensor:
    return values.clamp(min=0).sqrt()[:, None, None, None]
