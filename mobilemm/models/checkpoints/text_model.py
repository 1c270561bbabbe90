"""A language model alone, without eyes: what export makes bundles for text of. `mobilemm.load` reads none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mobilemm.errors import MobileMMError, one_line
from mobilemm.models.checkpoints.layouts import find_layout
from mobilemm.models.checkpoints.weights import count_tensors, open_weights, read_json


class TextProcessor:
    """A tokenizer where a processor is expected: the same conversations, but no pictures in them.

    Attributes:
        tokenizer: transformers' own.
        image_token: what stands for a picture elsewhere; here no template writes it.
    """

    image_token = "<image>"

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's."""
        return self.tokenizer.chat_template

    def apply_chat_template(self, messages: Sequence[Any], **options: Any) -> Any:
        """As the tokenizer's, of messages whose content may be a list of texts.

        Raises ValueError for a picture.
        """
        plain = [{"role": message["role"], "content": _text(message["content"])} for message in messages]
        return self.tokenizer.apply_chat_template(plain, **options)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if any(part["type"] != "text" for part in content):
        raise ValueError("this model takes no pictures")
    return "".join(part["text"] for part in content)


def is_text_model(folder: Path) -> bool:
    """Whether a checkpoint is a causal LM and no multimodal one. Raises MobileMMError without config.json."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    if not (folder / "config.json").is_file():
        return False
    foreign = read_json(folder / "config.json")
    model_type = foreign.get("model_type")
    if (
        not isinstance(model_type, str)
        or model_type not in CONFIG_MAPPING
        or find_layout(foreign) is not None
    ):
        return False
    kind = CONFIG_MAPPING[model_type]
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_text_model(folder: Path) -> tuple[Any, TextProcessor]:
    """A causal LM in the checkpoint's own dtype, its weights mapped from disk, and its tokenizer.

    Code inside the checkpoint is never run. Raises MobileMMError for what cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    open_weights(folder)  # missing and damaged shards get their own clear errors
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype="auto", trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:
        raise MobileMMError(f"{folder}: transformers cannot load it: {one_line(error)}") from error
    model, info = loaded
    if info["missing_keys"]:
        raise MobileMMError(
            f"{folder}: {count_tensors(sorted(info['missing_keys']))} missing from the weights"
        )
    return model.eval(), TextProcessor(tokenizer)
