"""Signal tokens: words of the model's own that ask for a picture, and whose states say which one.

`[IMG0] … [IMGk-1]` stand in an answer where a picture shall be; the language model's last hidden states
at their places are what the output projector reads, S_X in the survey's words (Zhang et al. 2024, arXiv
2401.13601, section 2.4; Koh et al. 2023, arXiv 2305.17216). The language model itself is left as it is: their
rows lie here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError

NAME = "[IMG{}]"
MOST = 64


class SignalTokens(nn.Module):
    """Rows of table and head for `count` ids from `first` on, in place of the language model's own.

    With `tied` one row serves as both, as in the language model.
    """

    def __init__(self, first: int, count: int, width: int, tied: bool, softcap: float | None = None) -> None:
        super().__init__()
        self.first, self.count, self.softcap = first, count, softcap
        self.rows = nn.Parameter(torch.randn(count, width) * 0.02)
        self.head_rows = None if tied else nn.Parameter(torch.randn(count, width) * 0.02)

    def among(self, ids: Tensor) -> Tensor:
        """Which of the ids are signal tokens, (…) bool."""
        return (ids >= self.first) & (ids < self.first + self.count)

    def embed(self, ids: Tensor, embeds: Tensor) -> Tensor:
        """(batch, length, width) with the signal tokens' rows in their places."""
        rows = self.rows[(ids - self.first).clamp(0, self.count - 1)]
        return torch.where(self.among(ids)[..., None], rows.to(embeds.dtype), embeds)

    def extend(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Logits (batch, n, vocabulary) with those of the signal tokens, of `hidden` (batch, n, width)."""
        behind = self.first + self.count
        own = self.logits(hidden).to(logits.dtype)
        return torch.cat([logits[..., : self.first], own, logits[..., behind:]], -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Their own alone: (…, width) → (…, count)."""
        rows = self.rows if self.head_rows is None else self.head_rows
        own = hidden @ rows.to(hidden.dtype).T
        return own if self.softcap is None else torch.tanh(own / self.softcap) * self.softcap


def new_signal_tokens(config: Any) -> SignalTokens | None:
    """Those that a MobileMMConfig names, initialized anew; None where the model does not draw."""
    ids = config.signal_token_ids
    if not ids:
        return None
    text = config.text_config
    first, count = ids[0], len(ids)
    if list(ids) != list(range(first, first + count)) or not 0 <= first <= text.vocab_size or count > MOST:
        raise MobileMMError(
            f"signal_token_ids: at most {MOST} ids that follow each other are expected, from inside or right"
            f" behind the vocabulary of {text.vocab_size}; not {ids}"
        )
    softcap = getattr(text, "final_logit_softcapping", None)
    return SignalTokens(first, count, text.hidden_size, bool(text.tie_word_embeddings), softcap)


def names(count: int) -> list[str]:
    """`[IMG0]`, `[IMG1]` …"""
    return [NAME.format(index) for index in range(count)]


def add_to_tokenizer(tokenizer: Any, count: int) -> list[int]:
    """Makes a tokenizer know them; returns their ids. Raises MobileMMError where these do not follow."""
    tokenizer.add_special_tokens(
        {"additional_special_tokens": names(count)}, replace_extra_special_tokens=False
    )
    ids: list[int] = tokenizer.convert_tokens_to_ids(names(count))
    if ids != list(range(ids[0], ids[0] + count)):
        raise MobileMMError(f"this tokenizer has signal tokens already, with other ids: {ids}")
    return ids
