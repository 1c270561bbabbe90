"""What a checkpoint is made of, from its config and its files' headers; no weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints.image_text_to_text import PROCESSOR_FILES, read_foreign_config
from mobilemm.models.checkpoints.layouts import find_layout
from mobilemm.models.checkpoints.lora import AdapterWeights, adapter_base, is_adapter
from mobilemm.models.checkpoints.reading import GENERATOR, read_empty_model, resolve_folder
from mobilemm.models.checkpoints.weights import CheckpointWeights, open_weights, read_json


@dataclass(frozen=True)
class Part:
    """One part of a model: what it is, its parameters, and its bytes in the checkpoint's number type."""

    name: str
    kind: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """The card that `mobilemm inspect` prints. Memory is in bytes, for a batch of one."""

    model: str
    layout: str
    dtype: str
    parts: list[Part]
    image_size: int | None
    image_tokens: int | None
    context: int | None
    template: str
    vocabulary: int
    kv_cache_bytes_per_token: int
    files_bytes: int
    notes: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def weights_bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def memory_bytes(self) -> int:
        """Weights, and keys and values for the whole context."""
        return self.weights_bytes + self.kv_cache_bytes_per_token * (self.context or 0)


def inspect_model(path: str | Path | None = None, base: str | None = None) -> Inspection:
    """Looks at a model folder or hub id, or without one at the default model.

    Raises MobileMMError as `load` does for what is missing or damaged.
    """
    notes: list[str] = []
    if path is None:
        from mobilemm.models.checkpoints.default import shipped_files

        # Its encoder and language model lie in packages; the config says it all.
        foreign, folder, infos = read_json(shipped_files() / "config.json"), shipped_files(), None
        name = "the default model"
    else:
        folder = resolve_folder(path)
        name = str(path)
        weights: CheckpointWeights | AdapterWeights
        if is_adapter(folder):
            base_folder = resolve_folder(base or adapter_base(folder))
            adapter, folder = folder, folder if (folder / "config.json").is_file() else base_folder
            foreign = read_json(folder / "config.json")
            layout = find_layout(foreign)
            spelling = {"canonical": layout.canonical} if layout else {}
            weights = AdapterWeights(adapter, open_weights(base_folder), **spelling)
            notes.append(f"LoRA of {len(weights.updates)} tensors over {base_folder}")
        else:
            foreign = read_json(folder / "config.json")
            weights = open_weights(folder)
        infos = weights.infos
    layout = find_layout(foreign)
    if layout is None:
        model, config = _foreign_model(folder, foreign)
        layout_name = f"transformers ({config.model_type})"
        settings = _processor_settings(folder)
        image_size = getattr(getattr(config, "vision_config", None), "image_size", None)
        image_size = image_size or (settings.get("crop_size") or {}).get("height")
        image_tokens, tiles = _foreign_image_tokens(settings, config)
        template = _foreign_template(folder)
        notes += tiles
    else:
        model, _ = read_empty_model(layout, foreign, folder)
        config = model.config
        image_size, image_tokens, template = config.image_size, model.num_image_tokens, config.template
        layout_name = layout.name
        if infos is not None and not any("vision_" in tensor for tensor in infos):
            notes.append(f"the vision tower is not in these files: {foreign.get('mm_vision_tower')}")
    text = config.get_text_config()
    dtype = _dtype(infos, config)
    parts = _parts(model, config, dtype) + _generator_parts(folder / GENERATOR)
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 0)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    layers = sum(kind.endswith("attention") and kind != "linear_attention" for kind in kinds)
    if "sliding_attention" in kinds:
        notes.append(
            f"{kinds.count('sliding_attention')} of {layers} layers keep only the last"
            f" {text.sliding_window:,} tokens, so the memory at full context is less"
        )
    files = {info.file for info in infos.values()} if infos else set()
    return Inspection(
        model=name,
        layout=layout_name,
        dtype=str(dtype).removeprefix("torch."),
        parts=parts,
        image_size=image_size[0] if isinstance(image_size, (list, tuple)) else image_size,
        image_tokens=image_tokens,
        context=getattr(text, "max_position_embeddings", None),
        template=template,
        vocabulary=text.vocab_size,
        kv_cache_bytes_per_token=2 * layers * heads * head_dim * dtype.itemsize,
        files_bytes=sum(file.stat().st_size for file in files),
        notes=notes,
    )


def _foreign_model(folder: Path, foreign: dict[str, Any]) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForImageTextToText

    config = read_foreign_config(folder, foreign)
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except Exception as error:
        # A config of the right types may still hold sizes that do not fit together.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MobileMMError(f"{folder / 'config.json'}: no model can be built from it: {reason}") from error
    model.tie_weights()
    return model, config


def _processor_settings(folder: Path) -> dict[str, Any]:
    """What the processor's and its image processor's files say."""
    settings: dict[str, Any] = {}
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            found = read_json(folder / name)
            settings |= {**found, **(found.get("image_processor") or {})}
    return settings


def _foreign_image_tokens(settings: dict[str, Any], config: Any) -> tuple[int | None, list[str]]:
    """Tokens of one picture where it is always the same number, and what there is to say where it is not."""
    tokens = None
    for source, key in (
        (config, "mm_tokens_per_image"),
        (config, "image_seq_length"),
        (config.get_text_config(), "num_image_tokens"),
        (settings, "image_seq_length"),
        (settings, "image_seq_len"),
        (settings, "num_image_tokens"),
    ):
        tokens = tokens or (source.get(key) if isinstance(source, dict) else getattr(source, key, None))
    splits = ("crop_to_patches", "do_image_splitting", "do_pan_and_scan", "image_grid_pinpoints")
    tiled = any(settings.get(key) for key in splits) or getattr(config, "image_grid_pinpoints", None)
    if tokens and tiled:
        return None, [f"a picture is cut into tiles of {tokens} image tokens; how many depends on its size"]
    if tokens is None and settings.get("max_image_tokens"):
        low, high = settings.get("min_image_tokens", 1), settings["max_image_tokens"]
        return None, [f"a picture, or each tile of a large one, takes {low} to {high} image tokens"]
    return tokens, []


def _foreign_template(folder: Path) -> str:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return "the processor's own"
    for name in ("processor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and read_json(folder / name).get("chat_template"):
            return "the processor's own"
    return "none: each question stands by itself"


def _parts(model: nn.Module, config: Any, dtype: torch.dtype) -> list[Part]:
    """A parameter that two parts share counts for the first."""
    children: list[tuple[str, nn.Module | nn.Parameter]] = [*model.named_children()]
    inner = getattr(model, "model", None)
    if isinstance(inner, nn.Module):
        # transformers' own: the parts lie inside `model`, the head beside it.
        children = [*inner.named_children(), *inner.named_parameters(recurse=False)]
        children += [item for item in model.named_children() if item[0] != "model"]
    children += [*model.named_parameters(recurse=False)]
    counted: set[int] = set()
    parts = []
    for name, child in children:
        own = [child] if isinstance(child, nn.Parameter) else list(child.parameters())
        fresh = [parameter for parameter in own if id(parameter) not in counted]
        counted.update(id(parameter) for parameter in own)
        number = sum(parameter.numel() for parameter in fresh)
        if number:
            kind = "parameter" if isinstance(child, nn.Parameter) else _kind(name, child, config)
            parts.append(Part(name, kind, number, number * dtype.itemsize))
    return parts


def _generator_parts(folder: Path) -> list[Part]:
    """Of the generator beside a model that draws, where there is one; in the number types of its files."""
    parts = []
    for name in ("unet", "vae") if folder.is_dir() else ():
        weights = CheckpointWeights(folder / name)
        for file in sorted((folder / name).glob("diffusion_pytorch_model*")):
            if file.suffix in (".safetensors", ".bin"):
                weights.read(file)
        kind = str(read_json(folder / name / "config.json").get("_class_name"))
        number = sum(info.numel for info in weights.infos.values())
        size = sum(info.numel * info.dtype.itemsize for info in weights.infos.values())
        parts.append(Part(f"{folder.name}/{name}", kind, number, size))
    return parts


def _kind(part: str, module: nn.Module, config: Any) -> str:
    if part == "vision_encoder":
        vision = config.vision_config
        return getattr(vision, "architecture", None) or vision.model_type
    if part == "projector":
        return config.projector["type"]
    return type(module).__name__


def _dtype(infos: dict[str, Any] | None, config: Any) -> torch.dtype:
    """The type most parameters are stored in."""
    counts: dict[torch.dtype, int] = {}
    for info in (infos or {}).values():
        if info.dtype.is_floating_point:
            counts[info.dtype] = counts.get(info.dtype, 0) + info.numel
    if counts:
        return max(counts, key=lambda dtype: counts[dtype])
    dtype = config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
