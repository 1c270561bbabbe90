"""A latent diffusion model, read from a folder in diffusers' layout as published, and written back in it."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError, one_line

SamplerName = Literal["ddim", "euler", "lcm", "tcd"]
SETTINGS_FILE = "mobilemm_generator.json"
_PREDICTIONS = ("epsilon", "v_prediction", "sample")
# PNDM's schedule is DDIM's; its multi-step rule needs no distillation and no phone.
_SAMPLERS: dict[str, SamplerName] = {
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
    "EulerDiscreteScheduler": "euler",
}
# What Stable Diffusion's text encoder gives when nothing in the folder says otherwise.
_CLIP_TOKENS = 77
# The published scale of consistency models that take it as an input.
_LCM_GUIDANCE = 8.5


@dataclass(frozen=True)
class GeneratorSettings:
    """What mobilemm notes beside diffusers' own files, in `mobilemm_generator.json`.

    `steps` are those the model was distilled for; `guidance_scale` is 1 where guidance is within the weights;
    `condition` names where the condition comes from, `condition_tokens` its length. `gamma` is TCD's: 0 keeps
    the noise, 1 renews all of it.
    """

    sampler: SamplerName = "ddim"
    steps: int = 50
    guidance_scale: float = 7.5
    condition: str = "text_encoder"
    condition_tokens: int = _CLIP_TOKENS
    gamma: float = 0.3


class Generator(nn.Module):
    """A denoiser in latent space, the autoencoder of its pictures, and their noise schedule.

    `denoiser` is diffusers' UNet2DConditionModel, `autoencoder` AutoencoderKL or AutoencoderTiny;
    `alphas_cumprod` (train timesteps,) is ᾱ of the schedule, float64. Latents are scaled as the denoiser has
    them; pictures are RGB in [0, 1].
    """

    alphas_cumprod: Tensor

    def __init__(
        self,
        denoiser: Any,
        autoencoder: Any,
        scheduler_config: dict[str, Any],
        settings: GeneratorSettings | None = None,
    ) -> None:
        super().__init__()
        self.denoiser: Any = denoiser
        self.autoencoder: Any = autoencoder
        self.scheduler_config = dict(scheduler_config)
        _check(dict(denoiser.config), self.scheduler_config)
        self.settings = settings or GeneratorSettings(sampler=_sampler(scheduler_config))
        self.prediction_type = str(scheduler_config.get("prediction_type", "epsilon"))
        self.register_buffer("alphas_cumprod", _alphas_cumprod(scheduler_config), persistent=False)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        size = self.denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.denoiser.config.in_channels, height, width

    @property
    def condition_shape(self) -> tuple[int, int]:
        """Tokens and width of the condition."""
        config = self.denoiser.config
        return self.settings.condition_tokens, config.encoder_hid_dim or config.cross_attention_dim

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        _, height, width = self.latent_shape
        return height * self.downsampling, width * self.downsampling

    @property
    def downsampling(self) -> int:
        """Pixels a side for each place of the latents."""
        config = self.autoencoder.config
        if hasattr(config, "encoder_block_out_channels"):
            return int(2 ** (len(config.encoder_block_out_channels) - 1))
        return int(2 ** (len(config.block_out_channels) - 1))

    def encode(self, pictures: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] → latents (n, c, h, w); of a variational autoencoder the mode."""
        encoded = self.autoencoder.encode(pictures * 2 - 1)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return (latents - _shift(self.autoencoder)) * self.autoencoder.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, c, h, w) → pictures (n, 3, H, W) in [0, 1]."""
        return decode(self.autoencoder, latents)

    def denoise(
        self, latents: Tensor, timesteps: Tensor, condition: Tensor, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """The denoiser's prediction, of the schedule's `prediction_type`, shaped as the latents.

        Shapes: latents (n, c, h, w), timesteps () or (n,), condition (n, tokens, width). `guidance_scale`
        (n,) is for a denoiser that takes it as an input (LCM's `time_cond_proj_dim`); 1 when left out.
        """
        return denoise(self.denoiser, latents, timesteps, condition, guidance_scale)


def denoise(
    denoiser: Any,
    latents: Tensor,
    timesteps: Tensor,
    condition: Tensor,
    guidance_scale: Tensor | None = None,
) -> Tensor:
    """`Generator.denoise` of a denoiser alone."""
    width = denoiser.config.time_cond_proj_dim
    embedded = None
    if width is not None:
        scale = latents.new_ones(len(latents)) if guidance_scale is None else guidance_scale
        embedded = guidance_embedding(scale, width).to(latents.dtype)
    predicted: Tensor = denoiser(latents, timesteps, condition, timestep_cond=embedded, return_dict=False)[0]
    return predicted


def decode(autoencoder: Any, latents: Tensor) -> Tensor:
    """`Generator.decode` of an autoencoder alone."""
    scaled = latents / autoencoder.config.scaling_factor + _shift(autoencoder)
    decoded = autoencoder.decode(scaled, return_dict=False)[0]
    return (decoded / 2 + 0.5).clamp(0, 1)


def _shift(autoencoder: Any) -> float:
    return getattr(autoencoder.config, "shift_factor", None) or 0.0


def guidance_embedding(guidance_scale: Tensor, width: int) -> Tensor:
    """(n,) → (n, width): the guidance scale as the sines and cosines that a denoiser takes.

    Source: Luo et al. 2023, "Latent Consistency Models", arXiv 2310.04378, section 4.2, in diffusers' scaling
    (1000 · (scale − 1), sines first).
    """
    half = width // 2
    positions = torch.arange(half, dtype=torch.float32, device=guidance_scale.device)
    frequencies = torch.exp(-torch.log(torch.tensor(10000.0)) * positions / (half - 1))
    angles = 1000.0 * (guidance_scale.float() - 1)[:, None] * frequencies
    embedded = torch.cat([angles.sin(), angles.cos()], -1)
    return nn.functional.pad(embedded, (0, width % 2))


def load_generator(folder: Path | str, dtype: torch.dtype = torch.float32) -> Generator:
    """A generator from a folder in diffusers' layout: `unet/`, `vae/`, `scheduler/`.

    Read as published: full and tiny autoencoders, safetensors or (weights only) pickles, half precision.
    Raises MobileMMError naming what is missing, or is no latent diffusion model that mobilemm draws with.
    """
    folder = Path(folder)
    from diffusers import UNet2DConditionModel

    unet = _read_json(folder / "unet" / "config.json")
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    _expect(folder / "unet", unet, ("UNet2DConditionModel",))
    try:
        _check({"in_channels": 4, "out_channels": 4} | unet, scheduler)
    except MobileMMError as error:
        raise MobileMMError(f"{folder}: {error}") from error
    settings = _read_settings(folder, scheduler, unet.get("time_cond_proj_dim") is not None)
    denoiser = _read_weights(UNet2DConditionModel, folder / "unet", dtype)
    autoencoder = load_autoencoder(folder / "vae", dtype)
    try:
        return Generator(denoiser, autoencoder, scheduler, settings).eval()
    except MobileMMError as error:
        raise MobileMMError(f"{folder}: {error}") from error


def load_autoencoder(folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """AutoencoderKL or AutoencoderTiny from its folder, as `vae/` of a generator is one."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    folder = Path(folder)
    config = _read_json(folder / "config.json")
    _expect(folder, config, ("AutoencoderKL", "AutoencoderTiny"))
    kind = AutoencoderKL if config["_class_name"] == "AutoencoderKL" else AutoencoderTiny
    return _read_weights(kind, folder, dtype).eval()


def save_autoencoder(autoencoder: Any, folder: Path | str) -> Path:
    """Writes an autoencoder alone, in diffusers' layout. The folder appears when it is whole."""
    folder = Path(folder)
    with whole_folder(folder) as writing:
        _save_weights(autoencoder, writing, None)
    return folder


def save_generator(generator: Generator, folder: Path | str, dtype: torch.dtype | None = None) -> Path:
    """Writes a generator in diffusers' layout, which diffusers' own pipelines read part by part.

    `dtype` is that of the file's weights, theirs if None. The folder appears when it is whole; one that is
    there is replaced if it holds a generator, else MobileMMError.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "model_index.json").is_file() and any(folder.iterdir()):
        raise MobileMMError(f"{folder} is not empty and holds no generator; name another folder")
    with whole_folder(folder) as writing:
        for name, module in (("unet", generator.denoiser), ("vae", generator.autoencoder)):
            _save_weights(module, writing / name, dtype)
        index = {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", type(generator.denoiser).__name__],
            "vae": ["diffusers", type(generator.autoencoder).__name__],
            "scheduler": ["diffusers", generator.scheduler_config.get("_class_name", "DDIMScheduler")],
            **{
                name: [None, None]
                for name in ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
            },
        }
        write_json(writing / "model_index.json", index)
        write_json(writing / "scheduler" / "scheduler_config.json", generator.scheduler_config)
        write_json(writing / SETTINGS_FILE, asdict(generator.settings))
    return folder


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when the block has ended well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        writing = Path(temporary) / "whole"
        writing.mkdir()
        yield writing
        if folder.exists():
            os.rename(folder, Path(temporary) / "old")
        os.rename(writing, folder)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A JSON file as people read it; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_weights(module: Any, folder: Path, dtype: torch.dtype | None) -> None:
    from safetensors.torch import save_file

    module.save_config(folder)
    # diffusers notes the folder that a model was read from, which is nobody else's affair.
    config = {
        key: value for key, value in _read_json(folder / "config.json").items() if key != "_name_or_path"
    }
    write_json(folder / "config.json", config)
    weights = {
        name: (tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in module.state_dict().items()
    }
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MobileMMError(f"{path} is missing: a latent diffusion folder has unet/, vae/ and scheduler/")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MobileMMError(f"{path}: cannot be read: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise MobileMMError(f"{path}: a JSON object is expected")
    return values


def _read_settings(folder: Path, scheduler: dict[str, Any], takes_scale: bool) -> GeneratorSettings:
    path = folder / SETTINGS_FILE
    if not path.is_file():
        settings = GeneratorSettings(sampler=_sampler(scheduler), condition_tokens=_text_tokens(folder))
        if settings.sampler in ("lcm", "tcd"):
            settings = replace(settings, steps=4, guidance_scale=_LCM_GUIDANCE if takes_scale else 1.0)
        return settings
    values = _read_json(path)
    known = GeneratorSettings.__dataclass_fields__
    for key, value in values.items():
        if key not in known:
            raise MobileMMError(f"{path}: unknown key {key!r}; known: {', '.join(known)}")
        expected = (int, float) if key in ("guidance_scale", "gamma") else type(known[key].default)
        if not isinstance(value, expected) or isinstance(value, bool):
            raise MobileMMError(f"{path}: key {key!r}: {value!r} is of another kind than expected")
    settings = GeneratorSettings(**values)
    if settings.sampler not in get_args(SamplerName):
        raise MobileMMError(
            f"{path}: key 'sampler': {settings.sampler!r}; there are: {', '.join(get_args(SamplerName))}"
        )
    if settings.steps < 1 or settings.condition_tokens < 1:
        raise MobileMMError(f"{path}: keys 'steps' and 'condition_tokens' are 1 or more")
    return settings


def _sampler(scheduler: dict[str, Any]) -> SamplerName:
    return _SAMPLERS.get(str(scheduler.get("_class_name")), "ddim")


def _text_tokens(folder: Path) -> int:
    path = folder / "text_encoder" / "config.json"
    return (
        int(_read_json(path).get("max_position_embeddings", _CLIP_TOKENS)) if path.is_file() else _CLIP_TOKENS
    )


def _read_weights(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    plain = folder / "diffusion_pytorch_model.safetensors"
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    pickled = folder / "diffusion_pytorch_model.bin"
    half = sorted(folder.glob("diffusion_pytorch_model.fp16.*"))
    if not half and not any(path.is_file() for path in (plain, index, pickled)):
        raise MobileMMError(f"{folder}: no weights (diffusion_pytorch_model.safetensors or .bin)")
    variant = None if any(path.is_file() for path in (plain, index, pickled)) else "fp16"
    # AutoencoderTiny writes two settings that it does not read, and warns of each.
    logging.getLogger("diffusers.configuration_utils").setLevel(logging.ERROR)
    try:
        # Read whole, because a partial load would fill missing tensors with whatever lies in memory.
        model, report = kind.from_pretrained(
            folder,
            torch_dtype=dtype,
            variant=variant,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise MobileMMError(f"{folder}: the weights cannot be read: {one_line(error)}") from error
    missing = report["missing_keys"]
    if missing:
        raise MobileMMError(f"{folder}: the weights lack {len(missing)} tensors, {missing[0]} among them")
    return model


def _expect(folder: Path, config: dict[str, Any], classes: tuple[str, ...]) -> None:
    found = config.get("_class_name")
    if found not in classes:
        raise MobileMMError(
            f"{folder / 'config.json'}: key '_class_name': {found!r}; read are {' and '.join(classes)}"
        )


def _check(unet: Any, scheduler: dict[str, Any]) -> None:
    if unet["in_channels"] != unet["out_channels"]:
        raise MobileMMError(
            f"unet: key 'in_channels': {unet['in_channels']} in, {unet['out_channels']} out; a model that"
            " draws from text alone is needed, not one for inpainting or editing"
        )
    classes = unet.get("class_embed_type") or unet.get("num_class_embeds")
    if unet.get("addition_embed_type") not in (None, "text") or classes:
        raise MobileMMError(
            "unet: key 'addition_embed_type' or 'class_embed_type': only the text's condition is supported"
        )
    prediction_type = scheduler.get("prediction_type", "epsilon")
    if prediction_type not in _PREDICTIONS:
        raise MobileMMError(
            f"scheduler: key 'prediction_type': {prediction_type!r}; there are: {', '.join(_PREDICTIONS)}"
        )
    for key in ("clip_sample", "thresholding"):
        if scheduler.get(key):
            raise MobileMMError(f"scheduler: key {key!r}: clipping is for models of pixels; set it to false")


def new_scheduler(config: dict[str, Any], named: str) -> Any:
    """DDIM's scheduler of a config. Raises MobileMMError, begun with `named`, for what diffusers refuses."""
    from diffusers import DDIMScheduler

    try:
        return DDIMScheduler(**config)
    except (NotImplementedError, TypeError, ValueError) as error:  # the first for a schedule it does not know
        raise MobileMMError(f"{named}: {one_line(error)}") from error


def _alphas_cumprod(config: dict[str, Any]) -> Tensor:
    """ᾱ (train timesteps,) by the scheduler's own betas."""
    keys = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    scheduler = new_scheduler({key: config[key] for key in keys if key in config}, "scheduler: keys 'beta_…'")
    alphas: Tensor = scheduler.alphas_cumprod
    return alphas.double()


def read_condition(folder: Path | str) -> tuple[str, tuple[int, int]]:
    """Of a generator's folder: where its condition comes from, and its shape (tokens, width); no weights."""
    folder = Path(folder)
    unet = _read_json(folder / "unet" / "config.json")
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    settings = _read_settings(folder, scheduler, unet.get("time_cond_proj_dim") is not None)
    width = unet.get("encoder_hid_dim") or unet.get("cross_attention_dim")
    if not isinstance(width, int):
        raise MobileMMError(f"{folder / 'unet' / 'config.json'}: key 'cross_attention_dim' must be a number")
    return settings.condition, (settings.condition_tokens, width)
