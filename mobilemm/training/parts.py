"""What of a model learns, and how fast: one learning rate a part, 0 leaves it as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mobilemm.errors import MobileMMError
from mobilemm.models.modeling import MobileMMForConditionalGeneration
from mobilemm.models.vision_encoder import LAYER_LISTS
from mobilemm.training.recipe import Parts, PartTraining

PARTS = ("projector", "language_model", "vision_encoder", "signal_tokens", "output_projector")
# Where language models, below their `base_model_prefix`, and timm's models keep their layers.
_LANGUAGE_MODEL_LISTS = ("layers", "decoder.layers", "h")
_TIMM_LISTS = ("blocks", "stages")


@dataclass(frozen=True)
class PartCount:
    """A part's parameters, and how many of them learn at which rate."""

    name: str
    parameters: int
    trained: int
    learning_rate: float
    method: str


def select_trained(model: MobileMMForConditionalGeneration, parts: Parts) -> list[PartCount]:
    """Sets what requires a gradient, adds low-rank updates where asked for, and tells what will be trained.

    What learns is kept in float32. Raises MobileMMError when a part has no such layers.
    """
    model.requires_grad_(False)
    for name in PARTS:
        training: PartTraining = getattr(parts, name)
        if training.learning_rate:
            _select(getattr(model, name), name, training)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    there = [name for name in PARTS if getattr(model, name) is not None]
    return [_count(model, name, getattr(parts, name)) for name in there]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What learns, by its name in the model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def part_of(name: str) -> str:
    """The part that a parameter belongs to, however the model is wrapped."""
    found = re.search(rf"(?:^|\.)({'|'.join(PARTS)})\.", name)
    if not found:
        raise ValueError(f"parameter {name!r} belongs to no part")
    return found[1]


def optimizer_groups(model: nn.Module, parts: Parts, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with their learning rates; norms and biases do not decay."""
    groups = []
    named = list(trained_parameters(model).items())
    for part in PARTS:
        for decays in (True, False):
            parameters = [
                parameter
                for name, parameter in named
                if part_of(name) == part and (parameter.ndim >= 2) == decays
            ]
            if parameters:
                groups.append(
                    {
                        "params": parameters,
                        "lr": getattr(parts, part).learning_rate,
                        "weight_decay": weight_decay if decays else 0.0,
                    }
                )
    return groups


def _select(part: Any, name: str, training: PartTraining) -> None:
    if name == "vision_encoder":
        part = part.model  # beside it are layers that nothing runs
    if training.is_adapter:
        _add_low_rank_updates(part, training)
        return
    chosen = list(_layers_from(part, name, training.from_layer))
    if training.method == "layer_norm":
        chosen = [
            module
            for above in chosen
            for module in above.modules()
            if re.search(r"Norm", type(module).__name__) and not list(module.children())
        ]
        if not chosen:
            raise MobileMMError(f"train.{name}.method: layer_norm: this part has no norms")
    for module in chosen:
        module.requires_grad_(True)


def _layers_from(part: nn.Module, name: str, first: int) -> Iterator[nn.Module]:
    """The whole part, or its layers from `first` on with the norms behind the last one."""
    if first == 0:
        yield part
        return
    path, layers = _layers(part, name)
    if first >= len(layers):
        raise MobileMMError(
            f"train.{name}.from_layer: {first}: this part has {len(layers)} layers, from 0 on"
        )
    yield from list(layers)[first:]
    above = part.get_submodule(path.rpartition(".")[0])
    yield from (child for child in above.children() if "Norm" in type(child).__name__)


def _layers(part: nn.Module, name: str) -> tuple[str, Any]:
    prefix = getattr(part, "base_model_prefix", "")
    for path in (*(f"{prefix}.{path}" for path in _LANGUAGE_MODEL_LISTS), *LAYER_LISTS, *_TIMM_LISTS):
        try:
            layers = part.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(layers, (nn.ModuleList, nn.Sequential)):
            return path, layers
    raise MobileMMError(f"train.{name}.from_layer: the layers of {type(part).__name__} were not found")


def _add_low_rank_updates(language_model: nn.Module, training: PartTraining) -> None:
    """LoRA (Hu et al. 2021, arXiv 2106.09685) or DoRA (Liu et al. 2024, arXiv 2402.09353), by peft."""
    try:
        from peft import inject_adapter_in_model
    except ImportError:
        raise MobileMMError("lora and dora need the package peft: pip install 'mobilemm[train]'") from None
    path, layers = _layers(language_model, "language_model")
    targets = [
        f"{path}.{index}.{name}"
        for index, layer in enumerate(layers)
        if index >= training.from_layer
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    if not targets:
        raise MobileMMError(f"train.language_model.from_layer: {training.from_layer}: no linear layers there")
    inject_adapter_in_model(low_rank_config(training, targets), language_model)
    for name, parameter in language_model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def low_rank_config(training: PartTraining, targets: list[str]) -> Any:
    """peft's configuration of the updates."""
    from peft import LoraConfig

    return LoraConfig(
        r=training.rank,
        lora_alpha=training.alpha,  # type: ignore[arg-type]  # a number
        lora_dropout=training.dropout,
        use_dora=training.method == "dora",
        target_modules=targets,
    )


def _count(model: nn.Module, name: str, training: PartTraining) -> PartCount:
    parameters = list(getattr(model, name).parameters())
    return PartCount(
        name,
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        training.learning_rate,
        training.method,
    )


def half_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Stores what does not learn in `dtype`."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
