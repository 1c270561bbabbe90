"""The processor that goes with a checkpoint: its tokenizer, and how it prepares pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer, TokenizersBackend
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mobilemm.data.processor import MobileMMProcessor
from mobilemm.errors import MobileMMError, one_line
from mobilemm.models.checkpoints.towers import Tower
from mobilemm.models.checkpoints.weights import read_json
from mobilemm.models.modeling import MobileMMForConditionalGeneration

LARGEST_SIDE = 2**13
IMAGE_OPTIONS = (
    "do_pad",
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


def read_processor(
    model: MobileMMForConditionalGeneration,
    config_folder: Path,
    base_folder: Path,
    foreign: dict[str, Any],
    tower: Tower,
) -> Any:
    """The processor of a checkpoint in a layout of ours, with the settings that its files give or imply.

    Raises MobileMMError when tokenizer or settings are missing, damaged, or not of this model's image size.
    """
    folder = config_folder if has_tokenizer(config_folder) else base_folder
    if not has_tokenizer(folder):
        raise MobileMMError(f"{folder}: no tokenizer here; expected tokenizer.json or tokenizer.model")
    tokenizer = read_tokenizer(folder, model.config.text_config)
    size = model.config.image_size
    options: dict[str, Any] = {}
    settings = config_folder / "preprocessor_config.json"
    if not settings.is_file():
        settings = config_folder / "processor_config.json"
    if settings.is_file():
        found = read_json(settings)
        inner = found.get("image_processor")
        found = inner if isinstance(inner, dict) else found
        options = {key: value for key, value in found.items() if key in IMAGE_OPTIONS}
        # CLIP's older files have plain numbers here.
        if isinstance(options.get("size"), int):
            options["size"] = {"shortest_edge": options["size"]}
        if isinstance(options.get("crop_size"), int):
            options["crop_size"] = {"height": options["crop_size"], "width": options["crop_size"]}
    options.setdefault("do_pad", foreign.get("image_aspect_ratio") == "pad")
    options.setdefault("size", {"shortest_edge": size})
    options.setdefault("crop_size", {"height": size, "width": size})
    if tower.image_mean:
        options.setdefault("image_mean", tower.image_mean)
        options.setdefault("image_std", tower.image_std)
    try:
        sides = [side for key in ("size", "crop_size") for side in dict(options[key]).values()]
        if any(not isinstance(side, int) or not 1 <= side <= LARGEST_SIDE for side in sides):
            raise ValueError(f"a picture's sides must be from 1 to {LARGEST_SIDE} pixels, not {sides}")
        image_processor = LlavaImageProcessorPil(**options)
        # Tried at once: some settings fail, or give another size, only when a picture comes.
        made = image_processor([Image.new("RGB", (2, 1))], return_tensors="pt")["pixel_values"]
    except Exception as error:
        raise MobileMMError(f"{settings}: {one_line(error)}") from error
    if tuple(made.shape) != (1, 3, size, size):
        raise MobileMMError(
            f"{settings}: it makes {made.shape[-2]}×{made.shape[-1]} pictures; the model takes {size}×{size}"
        )
    return _processor(model, image_processor, tokenizer)


def make_processor(
    model: MobileMMForConditionalGeneration, tokenizer: Any, mean: list[float], std: list[float]
) -> MobileMMProcessor:
    """A processor for a new model: pads pictures to squares of its size, tokenizes by its template."""
    size = model.config.image_size
    image_processor = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(mean),
        image_std=list(std),
    )
    return _processor(model, image_processor, tokenizer)


def read_tokenizer(name: str | Path, config: Any = None) -> Any:
    """The tokenizer of a folder or hub id; LLaMA's with the ids that SentencePiece itself gives.

    transformers 5 builds LLaMA's tokenizer anew and differs from the slow one, which the official code uses,
    in two places: a text that begins with a space loses that space, and the setting `legacy` is taken for
    false where the file leaves it out (up to 4.x it was true: the text behind `</s>` gets a "▁" before it).

    Raises MobileMMError when it cannot be read.
    """
    try:
        options = {"config": config} if config is not None else {}
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
        vocab_file = str(getattr(tokenizer, "vocab_file", None) or "")
        if type(tokenizer).__name__ != "LlamaTokenizer" or not vocab_file.endswith(".model"):
            return tokenizer
        if not tokenizer.vocab_size:
            raise MobileMMError("tokenizer.model holds no pieces")
        legacy = get_tokenizer_config(name).get("legacy")
        legacy = True if legacy is None else bool(legacy)
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Metaspace puts no "▁" before a text that has one already; SentencePiece does.
        backend["normalizer"] = {"type": "Replace", "pattern": {"Regex": r"\A "}, "content": "  "}
        backend["pre_tokenizer"]["prepend_scheme"] = "always" if legacy else "first"
        for token in backend["added_tokens"]:
            # With "always" each piece between special tokens is a beginning, with "first" the text's own.
            token["normalized"] = not legacy
        return TokenizersBackend(
            tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
            vocab_file=vocab_file,
            legacy=legacy,
            **tokenizer.special_tokens_map,
            model_max_length=tokenizer.model_max_length,
            padding_side=tokenizer.padding_side,
            chat_template=tokenizer.chat_template,
            clean_up_tokenization_spaces=False,
        )
    except Exception as error:
        # Tokenizer files fail in as many ways as they have formats.
        raise MobileMMError(f"{name}: the tokenizer cannot be read: {one_line(error)}") from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in the folder."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def _processor(
    model: MobileMMForConditionalGeneration, image_processor: Any, tokenizer: Any
) -> MobileMMProcessor:
    return MobileMMProcessor(
        image_processor,
        tokenizer,
        num_image_tokens=model.num_image_tokens,
        image_token_id=model.config.image_token_id,
        template=model.config.template,
    )
