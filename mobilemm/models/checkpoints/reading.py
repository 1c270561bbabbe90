"""`mobilemm.load`: a folder or hub id in any known layout → model and processor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mobilemm.errors import MobileMMError, one_line
from mobilemm.models.checkpoints.image_text_to_text import load_with_transformers
from mobilemm.models.checkpoints.layouts import IGNORABLE, Layout, find_layout, tower_name
from mobilemm.models.checkpoints.lora import AdapterWeights, adapter_base, is_adapter
from mobilemm.models.checkpoints.processors import LARGEST_SIDE, read_processor
from mobilemm.models.checkpoints.towers import Tower
from mobilemm.models.checkpoints.weights import CheckpointWeights, count_tensors, open_weights, read_json
from mobilemm.models.configuration import MobileMMConfig
from mobilemm.models.modeling import MobileMMForConditionalGeneration

# The model that ships, where a name must be written down.
DEFAULT_MODEL = "mobilemm-default"

# Folder of a model's generator, beside its config.json.
GENERATOR = "generator"

# What is fetched of a hub repository: everything but other frameworks' weights and code.
HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt"]


class Loaded(NamedTuple):
    """A model with its processor."""

    model: Any
    processor: Any


def load(
    path: str | Path | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    base: str | Path | None = None,
) -> Loaded:
    """Model and processor from a folder or hub id; without one, the default model.

    Reads mobilemm's own layout, Meituan MobileVLM V1 and V2, LLaVA-1.5 (original and llava-hf), LoRA folders
    over one of these (`base` overrides the base model that the adapter names), and through transformers' own
    class any other image-text-to-text checkpoint. `dtype` left out keeps that of the checkpoint.

    Raises MobileMMError naming file and tensor when something is missing, damaged or of the wrong shape.
    """
    folder = resolve_folder(path)
    dtype = _dtype(dtype)
    base_folder = config_folder = folder
    if base is not None and not is_adapter(folder):
        raise MobileMMError(f"{folder}: a base model was given, but this is no adapter (adapter_config.json)")
    if is_adapter(folder):
        base_folder = resolve_folder(base or adapter_base(folder))
        config_folder = folder if (folder / "config.json").is_file() else base_folder
    foreign = read_json(config_folder / "config.json")
    layout = find_layout(foreign)
    if layout is None and not is_adapter(folder):
        return Loaded(*load_with_transformers(folder, foreign, dtype, device))
    if layout is None:
        raise MobileMMError(
            f"{config_folder / 'config.json'}: adapters are read over MobileVLM, LLaVA and mobilemm models,"
            f" not model_type {foreign.get('model_type')!r}"
        )
    stored = open_weights(base_folder)
    weights = AdapterWeights(folder, stored, layout.canonical) if is_adapter(folder) else stored
    model, tower = read_empty_model(layout, foreign, config_folder)
    read_weights(model, layout, weights, tower, dtype)
    if device is not None:
        nn.Module.to(model, device)
    return Loaded(model, read_processor(model, config_folder, base_folder, foreign, tower))


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype):
        raise MobileMMError(f"unknown dtype {dtype!r}; known: float32, bfloat16, float16")
    return found


def resolve_folder(path: str | Path | None) -> Path:
    """A local folder for a path or hub id (fetched into the hub's cache); None is the default model."""
    if path is None or path == DEFAULT_MODEL:
        from mobilemm.models.checkpoints.default import default_model_folder

        return default_model_folder()
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    name = str(path)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/")):
        raise MobileMMError(f"{path}: there is no such folder; give a model folder or a hub id like ORG/NAME")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:
        # The hub client raises a dozen types; all mean that the model is not to be had.
        raise MobileMMError(
            f"{path}: neither a folder here nor to be had from the hub ({type(error).__name__}:"
            f" {str(error).strip().splitlines()[0] if str(error) else ''})"
        ) from error


def generator_folder(path: str | Path | None) -> Path | None:
    """A model's generator, the folder `generator/` in diffusers' layout beside config.json; None without.

    An adapter that has none of its own has its base model's.
    """
    folder = resolve_folder(path)
    if is_adapter(folder) and not (folder / GENERATOR).is_dir():
        folder = resolve_folder(adapter_base(folder))
    return folder / GENERATOR if (folder / GENERATOR).is_dir() else None


def read_empty_model(
    layout: Layout, foreign: dict[str, Any], folder: Path
) -> tuple[MobileMMForConditionalGeneration, Tower]:
    """The model of a layout's config.json, without weights, and its vision tower.

    Raises MobileMMError naming the file when keys are missing, of another type, or out of range, or when no
    model can be built from them.
    """
    path = folder / "config.json"
    try:
        config, tower = layout.to_config(foreign, folder)
        for part in (config.text_config, config.vision_config, config):
            for key, most in MOST.items():
                value = getattr(part, key, None)
                if isinstance(value, int) and not 1 <= value <= most:
                    raise MobileMMError(f"{key!r} must be a number from 1 to {most:,}, not {value}")
        return build_empty(config), tower
    except Exception as error:
        # transformers' classes raise as many types as their configs have keys.
        if isinstance(error, MobileMMError) and ".json:" in str(error):
            raise
        raise MobileMMError(f"{path}: {one_line(error)}") from error


# Above any published model; what a damaged or hostile config.json may not make us build.
MOST = {
    "num_hidden_layers": 1000,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**26,
    "image_size": LARGEST_SIDE,
    "patch_size": 2**10,
}


def build_empty(config: MobileMMConfig) -> MobileMMForConditionalGeneration:
    """The model without weights: parameters on the meta device, computed buffers real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = MobileMMForConditionalGeneration(config)
    model.tie_weights()
    return model.eval()


def read_weights(
    model: MobileMMForConditionalGeneration,
    layout: Layout,
    weights: CheckpointWeights | AdapterWeights,
    tower: Tower,
    dtype: torch.dtype | None = None,
) -> None:
    """Puts a checkpoint's tensors into an empty model, each checked for presence, use, shape and type."""
    config, folder = model.config, weights.folder
    spellings = {layout.canonical(name): name for name in weights}
    config.vision_tower_stored = layout.name == "mobilemm" or any("vision_tower." in name for name in weights)
    expected = {
        name: layout.foreign_name(name, config)
        for name in model.state_dict()
        if config.vision_tower_stored or not name.startswith("vision_encoder.")
    }
    tied = set(model.all_tied_weights_keys)
    missing = [foreign for name, foreign in expected.items() if foreign not in spellings and name not in tied]
    if missing:
        raise MobileMMError(f"{folder}: {count_tensors(missing)} missing from the weights")
    unexpected = sorted(set(spellings) - set(expected.values()))
    unexpected = [name for name in unexpected if not IGNORABLE.search(name)]
    if unexpected:
        raise MobileMMError(
            f"{folder}: {count_tensors(unexpected)} in the weights that this model has no place for"
        )
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    floating = {name: value.is_floating_point() for name, value in model.state_dict().items()}
    for name, foreign in expected.items():
        if foreign in spellings:
            info = weights.infos[spellings[foreign]]
            found = tuple(info.shape)
            if found != shapes[name]:
                raise MobileMMError(
                    f"{info.file}: tensor {spellings[foreign]!r} has the shape {found}; config.json asks for"
                    f" {shapes[name]}"
                )
            if floating[name] and not info.dtype.is_floating_point:
                raise MobileMMError(
                    f"{info.file}: tensor {spellings[foreign]!r} is {info.dtype}; a floating-point type is"
                    " expected"
                )
    if dtype is None:
        # One type for all: LoRA folders and separate towers come in several, which cannot run together.
        dtype = next(
            weights.infos[spellings[foreign]].dtype
            for name, foreign in expected.items()
            if name.startswith("language_model.") and floating[name] and foreign in spellings
        )
    state = {}
    for name, foreign in expected.items():
        if foreign in spellings:
            tensor = weights[spellings[foreign]]
            state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if not config.vision_tower_stored:
        state |= _read_tower(config, tower, dtype)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    config.dtype = dtype
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    set_generation_config(model)


def _read_tower(config: MobileMMConfig, tower: Tower, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A vision tower that the checkpoint names but does not hold, as our encoder's tensors."""
    from transformers import AutoModel

    name = tower.folder or str((config.checkpoint_config or {}).get("mm_vision_tower"))
    if tower.folder is not None:
        open_weights(tower.folder)  # a damaged file gets its own clear error
    try:
        full, info = AutoModel.from_pretrained(
            name,
            config=tower.config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are an error below, with their names
        )
    except Exception as error:
        raise MobileMMError(
            f"the checkpoint does not hold its vision tower, and {str(name)!r} could not be had:"
            f" {one_line(error)}"
        ) from error
    if info["missing_keys"]:
        missing = count_tensors(sorted(info["missing_keys"]))
        raise MobileMMError(f"{name}: {missing} missing from the vision tower's weights")
    for key, found, wanted in sorted(info["mismatched_keys"]):
        raise MobileMMError(
            f"{name}: tensor {key!r} has the shape {tuple(found)}; config.json asks for {tuple(wanted)}"
        )
    return encoder_state(full, config)


def encoder_state(full: nn.Module, config: MobileMMConfig) -> dict[str, torch.Tensor]:
    """The tensors of an uncut vision model under the names of our cut encoder.

    Raises MobileMMError naming a tensor that the encoder needs and the model has not.
    """
    given = full.state_dict()
    state = {}
    for name in build_empty(config).state_dict():
        if name.startswith("vision_encoder."):
            theirs = tower_name(name.removeprefix("vision_encoder."), config)
            if theirs not in given:
                raise MobileMMError(f"vision encoder {type(full).__name__}: tensor {theirs!r} is missing")
            state[name] = given[theirs]
    return state


def set_generation_config(model: MobileMMForConditionalGeneration) -> None:
    """Gives `generate` the language model's special tokens."""
    text = model.config.text_config
    generation = model.generation_config
    generation.bos_token_id = text.bos_token_id
    generation.eos_token_id = text.eos_token_id
    generation.pad_token_id = text.pad_token_id if text.pad_token_id is not None else 0
