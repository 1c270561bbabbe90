"""Output projectors: states of the signal tokens → the generator's condition, Θ_T→X in the survey's words.

A new one is one class here and one line in `OUTPUT_PROJECTORS`. Each takes last hidden states (n, signal
tokens, text_width) and gives (n, num_tokens, width): the shape in which the generator takes what its text
encoder says, such as 77 × 768 for Stable Diffusion 1.5 and 77 × 1024 for 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError

QUERY_STD = 0.02
"""Of the learned queries. Equal ones would stay equal: attention treats them alike."""


def build_output_projector(options: dict[str, Any], *, text_width: int, signal_tokens: int) -> nn.Module:
    """The output projector that `options["type"]` names, with the other options as keyword arguments.

    Raises MobileMMError for an unknown name (listing the known ones), and an option that does not fit.
    """
    options = dict(options)
    name = str(options.pop("type", None))
    if name not in OUTPUT_PROJECTORS:
        known = ", ".join(sorted(OUTPUT_PROJECTORS))
        raise MobileMMError(f"unknown output projector {name!r}; known: {known}")
    try:
        return OUTPUT_PROJECTORS[name](text_width=text_width, signal_tokens=signal_tokens, **options)
    except (TypeError, ValueError) as error:
        raise MobileMMError(f"output projector {name!r} with options {options}: {error}") from error


class MLPOutputProjector(nn.Module):
    """All states in a row, each number to mean 0 and deviation 1, through two linear layers, GELU between.

    A few of a language model's last states are an order larger than all others, and say least of what was
    asked for: `standardize` sets what each number is measured by. With `normalize`, each token of the
    condition has length 1, as sentence encoders give it. `dropout` is of the hidden layer, in training.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        text_width: int,
        signal_tokens: int,
        num_tokens: int,
        width: int,
        hidden: int = 512,
        normalize: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_tokens, self.width = num_tokens, width
        self.length = UnitRMSNorm(width) if normalize else nn.Identity()
        self.register_buffer("mean", torch.zeros(signal_tokens, text_width))
        self.register_buffer("scale", torch.ones(signal_tokens, text_width))
        self.layers = nn.Sequential(
            nn.Linear(signal_tokens * text_width, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_tokens * width),
        )

    @torch.no_grad()
    def standardize(self, states: Tensor) -> None:
        """Measures by `states` (n, signal tokens, text_width), which the projector will learn from."""
        self.mean.copy_(states.mean(0))
        self.scale.copy_(1 / states.std(0).clamp(min=1e-3))

    def forward(self, states: Tensor) -> Tensor:
        measured = (states - self.mean) * self.scale
        condition = self.layers(measured.flatten(1)).unflatten(1, (self.num_tokens, self.width))
        return self.length(condition)


class TransformerOutputProjector(nn.Module):
    """A tiny transformer: its encoder reads the states, its decoder's learned queries read the encoder.

    Norms stand in front of each layer. Defaults follow NExT-GPT (Wu et al. 2023, arXiv 2309.05519, table 7):
    four layers each, four heads, width 512 and feed-forward 2048.
    """

    def __init__(
        self,
        text_width: int,
        signal_tokens: int,
        num_tokens: int,
        width: int,
        hidden: int = 512,
        layers: int = 4,
        heads: int = 4,
        expansion: int = 4,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"hidden {hidden} is not a multiple of heads {heads}")
        self.num_tokens, self.width = num_tokens, width
        self.length = UnitRMSNorm(width) if normalize else nn.Identity()
        self.states_norm = nn.LayerNorm(text_width)
        self.input = nn.Linear(text_width, hidden)
        self.positions = nn.Parameter(torch.randn(signal_tokens, hidden) * QUERY_STD)
        self.queries = nn.Parameter(torch.randn(num_tokens, hidden) * QUERY_STD)
        self.encoder = nn.ModuleList(
            TransformerBlock(hidden, heads, expansion, cross=False) for _ in range(layers)
        )
        self.decoder = nn.ModuleList(
            TransformerBlock(hidden, heads, expansion, cross=True) for _ in range(layers)
        )
        self.encoder_norm, self.norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.output = nn.Linear(hidden, width)

    def forward(self, states: Tensor) -> Tensor:
        read = self.input(self.states_norm(states)) + self.positions
        for block in self.encoder:
            read = block(read, None)
        read = self.encoder_norm(read)
        queries = self.queries.expand(states.shape[0], -1, -1)
        for block in self.decoder:
            queries = block(queries, read)
        return self.length(self.output(self.norm(queries)))


class TransformerBlock(nn.Module):
    """Attention among the tokens, with `cross` also to others, and a feed-forward layer; all residual."""

    def __init__(self, width: int, heads: int, expansion: int, cross: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width) if cross else None
        self.cross_attention = Attention(width, heads) if cross else None
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width * expansion),
            nn.GELU(),
            nn.Linear(width * expansion, width),
        )

    def forward(self, tokens: Tensor, others: Tensor | None) -> Tensor:
        normed = self.norm(tokens)
        tokens = tokens + self.attention(normed, normed)
        if self.cross_norm is not None and self.cross_attention is not None and others is not None:
            tokens = tokens + self.cross_attention(self.cross_norm(tokens), others)
        return tokens + self.feed_forward(tokens)


class Attention(nn.Module):
    """Multi-head attention of (n, tokens, width) to (n, others, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, others: Tensor) -> Tensor:
        query, key, value = (
            states.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for states in (self.query(tokens), self.key(others), self.value(others))
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(1, 2).flatten(2))


class UnitRMSNorm(nn.Module):
    """Each token to length 1: an RMS norm whose weight is 1/√width, for targets to lower as such."""

    variance_epsilon = 1e-12

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    @property
    def weight(self) -> Tensor:
        """No state of its own, since transformers begins each RMS norm's weight with ones."""
        return torch.full((self.width,), self.width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.normalize(tokens, dim=-1)


OUTPUT_PROJECTORS: dict[str, type[nn.Module]] = {
    "mlp": MLPOutputProjector,
    "transformer": TransformerOutputProjector,
}
