"""Any other image-text-to-text checkpoint, by transformers' own classes. Code inside it is never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from mobilemm.errors import MobileMMError, one_line
from mobilemm.models.checkpoints.processors import has_tokenizer
from mobilemm.models.checkpoints.weights import count_tensors, open_weights

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load_with_transformers(
    folder: Path, foreign: dict[str, Any], dtype: torch.dtype | None, device: str | torch.device | None
) -> tuple[Any, Any]:
    """Model and processor. Raises MobileMMError as `mobilemm.load` does."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    config = read_foreign_config(folder, foreign)
    weights = open_weights(folder)  # missing and damaged shards get their own clear errors
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = f"its processor cannot be read: {one_line(error)}"
        if "trust_remote_code" in str(error):
            reason = "its processor is Python code inside the checkpoint, which is never run"
        elif not any((folder / name).is_file() for name in PROCESSOR_FILES):
            reason = f"neither {' nor '.join(PROCESSOR_FILES)} here"
        elif not has_tokenizer(folder):
            reason = "no tokenizer here; expected tokenizer.json or tokenizer.model"
        raise MobileMMError(f"{folder}: {reason}") from error
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are an error below, with their names
        )
    except Exception as error:
        raise MobileMMError(f"{folder}: transformers cannot load it: {one_line(error)}") from error
    model, info = loaded
    if info["missing_keys"]:
        raise MobileMMError(
            f"{folder}: {count_tensors(sorted(info['missing_keys']))} missing from the weights"
        )
    for name, found, wanted in sorted(info["mismatched_keys"]):
        where = weights.infos[name].file if name in weights else folder
        raise MobileMMError(
            f"{where}: tensor {name!r} has the shape {tuple(found)}; config.json asks for {tuple(wanted)}"
        )
    if device is not None:
        model.to(device)
    return model.eval(), processor


def read_foreign_config(folder: Path, foreign: dict[str, Any]) -> Any:
    """transformers' config of an image-text-to-text model; MobileMMError says why it is none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    path, model_type = folder / "config.json", foreign.get("model_type")
    if model_type is None:
        raise MobileMMError(f"{path}: key 'model_type' is missing")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        code = ", and the Python code in the checkpoint is never run" if foreign.get("auto_map") else ""
        raise MobileMMError(
            f"{path}: model_type {model_type!r} is not known to mobilemm or transformers{code}"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise MobileMMError(f"{path}: not a valid config of {model_type!r}: {one_line(error)}") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise MobileMMError(
            f"{path}: model_type {model_type!r} is no multimodal LLM that mobilemm or transformers reads"
            " (image-text-to-text)"
        )
    return config
