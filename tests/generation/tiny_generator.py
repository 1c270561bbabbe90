"""Tiny random latent diffusion models in diffusers' layout: the published families' shapes, narrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from mobilemm.generation.generator import Generator, GeneratorSettings, load_generator, save_generator

STABLE_DIFFUSION_BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
# Of each family: the blocks of its stages, layers a stage, and what else is its own.
FAMILIES: dict[str, dict[str, Any]] = {
    "sd15": {"stages": (CROSS, CROSS, CROSS, PLAIN), "layers_per_block": 2},
    # BK-SDM-Tiny: one pair a stage, no innermost stage, no middle.
    "bk_sdm_tiny": {"stages": (CROSS, CROSS, CROSS), "layers_per_block": 1, "mid_block_type": None},
    "sd_turbo": {
        "stages": (CROSS, CROSS, CROSS, PLAIN),
        "layers_per_block": 2,
        "use_linear_projection": True,
    },
    "lcm": {"stages": (CROSS, PLAIN), "layers_per_block": 1, "time_cond_proj_dim": 8},
    # The default generator's: no cross-attention, the condition joins the timestep's embedding.
    "default": {
        "stages": (PLAIN, ("AttnDownBlock2D", "AttnUpBlock2D")),
        "layers_per_block": 1,
        "mid_block_type": "UNetMidBlock2D",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 4,
        "resnet_time_scale_shift": "scale_shift",
    },
}
SCHEDULERS: dict[str, Any] = {
    "sd15": PNDMScheduler(**STABLE_DIFFUSION_BETAS, skip_prk_steps=True, steps_offset=1),
    "bk_sdm_tiny": PNDMScheduler(**STABLE_DIFFUSION_BETAS, skip_prk_steps=True, steps_offset=1),
    "sd_turbo": EulerDiscreteScheduler(**STABLE_DIFFUSION_BETAS, timestep_spacing="trailing"),
    "lcm": LCMScheduler(**STABLE_DIFFUSION_BETAS),
    "default": DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    ),
}


def write_generator(folder: Path, family: str = "default", tokens: int = 3, width: int = 16) -> Path:
    """A random generator of 8 × 8 latents with 4 channels: pictures of 16 × 16 pixels (64 × 64 for `lcm`)."""
    torch.manual_seed(0)
    unet, vae = tiny_unet(family, width), tiny_autoencoder("full" if family == "sd15" else "tiny")
    pipeline = StableDiffusionPipeline(vae, None, None, unet, SCHEDULERS[family], None, None, None, False)
    pipeline.save_pretrained(folder)
    generator = load_generator(folder)
    settings = GeneratorSettings(
        generator.settings.sampler, 4, generator.settings.guidance_scale, "test", tokens
    )
    save_generator(Generator(unet, vae, generator.scheduler_config, settings), folder)
    return folder


def tiny_unet(family: str, width: int = 16) -> UNet2DConditionModel:
    shape = dict(FAMILIES[family])
    stages = shape.pop("stages")
    channels = tuple(8 * min(1 + index, 2) for index in range(len(stages)))
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        down_block_types=tuple(down for down, _ in stages),
        up_block_types=tuple(up for _, up in reversed(stages)),
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=width,
        **shape,
    ).eval()


def tiny_autoencoder(kind: str) -> AutoencoderKL | AutoencoderTiny:
    if kind == "full":
        return AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.18215,
        ).eval()
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
        scaling_factor=0.7,
    ).eval()
