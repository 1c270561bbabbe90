"""Recipes of generators, told apart by their key `stage`. Checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Drawings(_Section):
    """Pictures with captions, as scripts/fetch_pairs.py makes them."""

    path: Path
    sources: list[str] | None = Field(default=None, description="packages of drawings; all when left out")
    groups: list[str] | None = Field(
        default=None, description="first keywords, such as animals-nature; all when left out"
    )
    splits: list[Literal["train", "validation", "test"]] = ["train", "validation", "test"]
    weight: float = Field(gt=0, default=1.0, description="how often an epoch goes through them")


class GeneratorRecipe(_Section):
    """What all stages have in common."""

    output: Path = Field(description="folder of checkpoints, sheets and the result")
    data: list[Drawings] = Field(min_length=1)
    image_size: int = Field(gt=7, default=64, description="pixels a side, the picture padded with white")
    max_steps: int = Field(gt=0)
    batch_size: int = Field(gt=0, default=32, description="pictures a process and pass")
    accumulation: int = Field(gt=0, default=1, description="passes a step")
    learning_rate: float = Field(gt=0, default=1e-3)
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = Field(ge=0, default=100)
    weight_decay: float = Field(ge=0, default=0.0)
    max_grad_norm: float = Field(gt=0, default=1.0)
    ema_decay: float = Field(ge=0, lt=1, default=0.0, description="of the averaged weights; 0: none are kept")
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    cache: Path | None = Field(
        default=None, description="of pictures, latents and conditions; else in output"
    )
    save_every: int = Field(gt=0, default=250, description="steps between checkpoints")
    keep_checkpoints: int = Field(gt=0, default=2)
    log_every: int = Field(gt=0, default=25)
    show_samples: int = Field(ge=0, default=24, description="pictures on the sheet with each checkpoint")
    seed: int = 0


class AutoencoderRecipe(GeneratorRecipe):
    """Pictures to latents and back: |x − x̂| + its gradient's, latents kept near mean 0 and deviation 1."""

    stage: Literal["autoencoder"]
    autoencoder: Path | None = Field(default=None, description="folder of one that goes on learning")
    new_autoencoder: dict[str, Any] | None = Field(
        default=None, description="config of diffusers' AutoencoderTiny or AutoencoderKL (`_class_name`)"
    )
    gradient_weight: float = Field(ge=0, default=0.5)
    moment_weight: float = Field(
        ge=0, default=0.01, description="of latents' mean and deviation; of KL the KL"
    )
    latent_noise: float = Field(ge=0, default=0.05, description="added before decoding: smoother latents")

    @model_validator(mode="after")
    def _one_beginning(self) -> AutoencoderRecipe:
        if (self.autoencoder is None) == (self.new_autoencoder is None):
            raise ValueError("give either 'autoencoder' or 'new_autoencoder'")
        return self


class _LatentRecipe(GeneratorRecipe):
    condition: str = Field(default="all-MiniLM-L6-v2", description="where conditions come from")
    conditions: int = Field(ge=1, le=3, default=3, description="ways to say a caption that are drawn from")
    name_share: float = Field(ge=0, le=1, default=0.7, description="how often it is the name alone")
    empty_share: float = Field(ge=0, le=1, default=0.1, description="how often there is no condition")
    time_shift: float = Field(
        gt=0, default=1.0, description="more than 1: more of the times are late ones, of much noise"
    )
    condition_noise: float = Field(
        ge=0, default=0.008, description="deviation, at most: a projector's condition is not exact either"
    )


class TeacherRecipe(_LatentRecipe):
    """The denoising loss, ‖prediction − target‖², with conditions left out for classifier-free guidance."""

    stage: Literal["teacher"]
    generator: Path | None = Field(default=None, description="folder of one that goes on learning")
    autoencoder: Path | None = Field(default=None, description="of a new denoiser")
    new_denoiser: dict[str, Any] | None = Field(default=None, description="config of UNet2DConditionModel")
    noise_schedule: dict[str, Any] = Field(default={}, description="config of a diffusers scheduler")
    guidance_scale: float = Field(ge=1, default=2.0, description="of sheets, and noted with the result")

    @model_validator(mode="after")
    def _one_beginning(self) -> TeacherRecipe:
        if (self.generator is None) == (self.new_denoiser is None):
            raise ValueError("give either 'generator' or 'new_denoiser'")
        if (self.new_denoiser is None) != (self.autoencoder is None):
            raise ValueError("'new_denoiser' and 'autoencoder' belong together")
        return self


class LowRank(_Section):
    """Low-rank updates in place of whole weights."""

    rank: int = Field(gt=0, default=64)
    alpha: int = Field(gt=0, default=64)


class ConsistencyRecipe(_LatentRecipe):
    """Latent consistency distillation; with `phases` more than 1 phased consistency."""

    stage: Literal["consistency"]
    generator: Path = Field(description="the teacher's folder")
    student: Path | None = Field(default=None, description="folder of one that goes on learning")
    phases: int = Field(ge=1, default=1, description="stretches of time, each consistent with its own end")
    solver_steps: int = Field(ge=2, default=50, description="of DDIM, over the teacher's schedule")
    guidance_min: float = Field(ge=1, default=1.0, description="of the teacher")
    guidance_max: float = Field(ge=1, default=3.0)
    embed_guidance: int | None = Field(
        gt=1, default=None, description="width: the student takes the scale as an input; else it is within"
    )
    huber_width: float = Field(gt=0, default=1e-3)
    target_decay: float = Field(ge=0, lt=1, default=0.95, description="of the target network's average")
    lora: LowRank | None = Field(default=None, description="low-rank updates alone learn, and are the target")
    steps: int = Field(ge=1, default=4, description="noted with the result")

    @model_validator(mode="after")
    def _consistent(self) -> ConsistencyRecipe:
        if self.guidance_max < self.guidance_min:
            raise ValueError("guidance_max is less than guidance_min")
        if self.phases > self.solver_steps:
            raise ValueError("more phases than solver_steps")
        if self.lora is not None and (self.embed_guidance or self.student):
            raise ValueError("lora: goes with neither embed_guidance nor student")
        return self


class BlocksRecipe(_LatentRecipe):
    """A denoiser with fewer blocks, taught by the one it was cut from: output and features."""

    stage: Literal["blocks"]
    generator: Path = Field(description="the teacher's folder")
    drop_blocks: Literal["base", "small", "tiny"] = Field(
        description="base: one layer a stage; small: no middle either; tiny: no innermost stage either"
    )
    output_weight: float = Field(ge=0, default=1.0)
    feature_weight: float = Field(ge=0, default=1.0)


class DistributionMatchingRecipe(_LatentRecipe):
    """A few-step student whose pictures a second network learns to tell from the teacher's."""

    stage: Literal["distribution_matching"]
    generator: Path = Field(description="the teacher's folder")
    student: Path = Field(description="where the student begins, as a consistency stage leaves it")
    guidance_scale: float = Field(ge=1, default=2.0, description="of the teacher")
    fake_steps: int = Field(
        ge=1, default=5, description="steps of the second network for each of the student"
    )
    fake_learning_rate: float = Field(gt=0, default=1e-4)
    steps: int = Field(ge=1, default=4)


AnyGeneratorRecipe = Annotated[
    AutoencoderRecipe | TeacherRecipe | ConsistencyRecipe | BlocksRecipe | DistributionMatchingRecipe,
    Field(discriminator="stage"),
]
GENERATOR_RECIPES: TypeAdapter[Any] = TypeAdapter(AnyGeneratorRecipe)
