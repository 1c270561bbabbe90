"""The parts that draw: from logits at the signal tokens to a condition, from a condition to a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError

ROWS_PER_WIDTH = 4
"""Words of the vocabulary, in hidden widths, whose logits tell the hidden state."""

MOST_CONDITION = 1e4
"""Of the rows that are inverted: by so much, at worst, errors of the logits grow. SmolLM2's is 110."""


class OutputProjector(nn.Module):
    """Logits at the signal tokens → the generator's condition.

    A decoder gives logits and no hidden states, on every runtime and to every runner. The head is a
    matrix with far more rows than columns, so that some of its rows, inverted, give the state back: to the
    precision of float32, and without a second output. `read_through` says which rows; `shift` is what the
    decoder's quantization adds to the states, and is taken away.

    Shapes: (1, signal tokens, words) → (1, tokens, width); the words are the vocabulary's first.
    """

    shift: Tensor

    def __init__(
        self, projector: nn.Module, signal_tokens: int, words: int, width: int, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.reader = nn.Linear(words, width, bias=False)
        self.register_buffer("shift", torch.zeros(signal_tokens, width))
        self.projector = projector
        self.softcap = softcap

    def read_through(self, head: Tensor) -> None:
        """Sets the inverse of the head's first rows (words, width), as the decoder that ships has them.

        Raises MobileMMError where they do not tell the state, or only with loss.
        """
        found = torch.linalg.svdvals(head.double())
        if not float(found[-1]) * MOST_CONDITION >= float(found[0]):
            raise MobileMMError(
                f"the head's first {len(head):,} words do not tell the hidden state (condition number"
                f" {float(found[0]) / max(float(found[-1]), 1e-30):.2g}): what draws cannot be exported"
            )
        inverse = torch.linalg.pinv(head.double()).float()
        self.reader.weight = nn.Parameter(inverse, requires_grad=False)

    def forward(self, signal_logits: Tensor) -> Tensor:
        if self.softcap is not None:
            signal_logits = torch.atanh((signal_logits / self.softcap).clamp(-0.9999, 0.9999)) * self.softcap
        return self.projector(self.reader(signal_logits) - self.shift)


def words_read(vocab_size: int, hidden_size: int) -> int:
    """How many of the vocabulary's logits tell the hidden state. Raises MobileMMError for too few."""
    words = min(vocab_size, ROWS_PER_WIDTH * hidden_size)
    if words < hidden_size:
        raise MobileMMError(
            f"a vocabulary of {vocab_size} words cannot tell a hidden state of {hidden_size} numbers: this"
            " model's drawing cannot be exported"
        )
    return words


def with_signal_rows(
    config: Any, weights: Mapping[str, Tensor], signals: Any
) -> tuple[Any, dict[str, Tensor]]:
    """A language model's config and weights, the signal tokens' rows in its table and in an untied head."""
    behind = signals.first + signals.count
    found = dict(weights)
    rows = {"model.embed_tokens.weight": signals.rows}
    if not config.tie_word_embeddings:
        rows["lm_head.weight"] = signals.head_rows
    for name, own in rows.items():
        table = found[name]
        found[name] = torch.cat([table[: signals.first], own.detach().to(table), table[behind:]])
    config.vocab_size = max(config.vocab_size, behind)
    return config, found


STEP_COUNTS = (1, 2, 4)
"""Numbers of steps that every step-wise bundle can draw in."""


def schedules(generator: Any, steps: int | None = None) -> list[list[list[float]]]:
    """Of STEP_COUNTS, the generator's own number of steps and `steps` each the sampler's rows, fewest first.

    Raises MobileMMError for a number of steps that a manifest cannot hold.
    """
    from mobilemm.generation.sampling import sampling_table
    from mobilemm.runtime.manifest import MOST_STEPS

    own = generator.settings.steps
    wanted = own if steps is None else steps
    if wanted > MOST_STEPS:
        raise MobileMMError(f"this generator draws in {wanted} steps: --steps {MOST_STEPS} or fewer")
    counts = {count for count in (*STEP_COUNTS, own, wanted) if count <= MOST_STEPS}
    return [sampling_table(generator, count).rows for count in sorted(counts)]


def peak_signal_to_noise(found: Tensor, wanted: Tensor) -> float:
    """In dB, of pictures in [0, 1]."""
    error = float((found.double() - wanted.double()).square().mean())
    return 200.0 if error == 0 else -10 * math.log10(error)
