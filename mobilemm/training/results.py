"""What a finished run leaves: a whole model, or an adapter folder that holds the projector too."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mobilemm.doctor import installed
from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints.reading import DEFAULT_MODEL, generator_folder, load
from mobilemm.models.checkpoints.writing import save
from mobilemm.models.modeling import MobileMMForConditionalGeneration
from mobilemm.training.parts import low_rank_config, trained_parameters
from mobilemm.training.recipe import Recipe

PACKAGES = ("mobilemm", "torch", "transformers", "accelerate", "peft", "trl", "safetensors", "timm")


def write_result(
    recipe: Recipe,
    model: MobileMMForConditionalGeneration,
    processor: Any,
    history: Sequence[dict[str, Any]],
) -> Path:
    """Puts the trained model, or its adapter, into the run's folder, with `result.json` beside it.

    An older one there is replaced. result.json holds recipe, seed, versions and the loss of each logged step.
    """
    run = Path(recipe.output)
    adapted = recipe.train.language_model.is_adapter and recipe.train.language_model.learning_rate > 0
    place = run / ("adapter" if adapted else "model")
    shutil.rmtree(place, ignore_errors=True)
    if adapted:
        write_adapter(place, recipe, model, processor)
    else:
        drawer = recipe.drawing.generator if recipe.drawing is not None else generator_folder(recipe.model)
        save(model, place, processor, layout="mobilemm", generator=drawer)
    loss = [[row["step"], row["loss"]] for row in history if "loss" in row]
    result = {"recipe": recipe.model_dump(mode="json"), "versions": installed(PACKAGES), "loss": loss}
    (run / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return place


def write_adapter(
    folder: Path, recipe: Recipe, model: MobileMMForConditionalGeneration, processor: Any
) -> None:
    """An adapter in peft's layout; all else that learned lies beside it, as LLaVA's LoRA folders have it.

    `mobilemm.load(folder)` reads it over its base model. The folder appears when it is whole.
    """
    trained = {name: tensor.detach().cpu().contiguous() for name, tensor in trained_parameters(model).items()}
    updates = {
        f"base_model.model.{_peft_name(name)}": tensor for name, tensor in trained.items() if ".lora_" in name
    }
    others = {f"base_model.model.{name}": tensor for name, tensor in trained.items() if ".lora_" not in name}
    targets = sorted({name.split(".lora_")[0] for name in trained if ".lora_" in name})
    config = low_rank_config(recipe.train.language_model, targets)
    settings = {
        name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()
    }
    base = recipe.model or DEFAULT_MODEL
    settings |= {"base_model_name_or_path": base, "peft_type": "LORA", "inference_mode": True}
    folder.parent.mkdir(parents=True, exist_ok=True)
    writing = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (writing / "adapter_config.json").write_text(
            json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8"
        )
        save_file(updates, writing / "adapter_model.safetensors")
        torch.save(others, writing / "non_lora_trainables.bin")
        writing.chmod(0o755)
        os.rename(writing, folder)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise


def _peft_name(name: str) -> str:
    """peft's spelling on disk: without the adapter's name, and of DoRA's magnitudes without `.weight`."""
    name = name.replace(".default", "")
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


def merge(adapter: Path, folder: Path, base: str | None = None) -> Path:
    """Folds an adapter folder into its base model, W + (α / r) · B A, and writes the whole model."""
    if not (adapter / "adapter_config.json").is_file():
        raise MobileMMError(f"{adapter}: no adapter here (adapter_config.json is missing)")
    model, processor = load(adapter, base=base)
    return save(model, folder, processor, generator=generator_folder(base or adapter))
