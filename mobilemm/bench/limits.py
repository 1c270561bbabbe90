"""What the phases must move and compute at least."""

from __future__ import annotations

from dataclasses import dataclass

from mobilemm.bench.result import Limit, Settings
from mobilemm.runtime.manifest import Strict


@dataclass(frozen=True)
class Rates:
    """What a machine does a second: bytes read from memory, fp32 operations."""

    bandwidth: float
    operations: float


class Decoding(Strict):
    """A language model, by what it moves and computes.

    Attributes:
        files: bytes of all parts' weights, which loading reads.
        bytes: of the weights that each token reads.
        parameters: that multiply each token.
        head: those of them that only positions with logits need.
        cache_bytes: of one number among the keys and values.
    """

    files: int
    bytes: int
    parameters: int
    head: int
    layers: int
    attention_heads: int
    key_value_heads: int
    head_dim: int
    cache_bytes: int

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one position."""
        return 2 * self.layers * self.key_value_heads * self.head_dim * self.cache_bytes


def prefill_limit(model: Decoding, settings: Settings, rates: Rates) -> Limit:
    """Tokens a second: every weight multiplies and adds once a token; the weights are read once.

    Logits are of the last position alone.
    """
    count = settings.prompt_tokens
    products = max(model.parameters - model.head, 0) * count + model.head
    attention = 2 * model.layers * model.attention_heads * model.head_dim * count * count / 2
    return _rate(count, model.bytes, 2 * (products + attention), rates)


def decode_limit(model: Decoding, length: float, rates: Rates) -> Limit:
    """Tokens a second behind `length` others: each token reads all weights, and all keys and values."""
    moved = model.bytes + length * model.cache_bytes_per_token
    return _rate(1, moved, 2 * model.parameters, rates)


def load_limit(model: Decoding, rates: Rates) -> Limit:
    """Seconds: each byte of the weights is read once, from memory when the system still has it there."""
    return Limit(best=model.files / rates.bandwidth, by="bandwidth")


def _rate(tokens: int, moved: float, computed: float, rates: Rates) -> Limit:
    """Tokens a second, when so many bytes and operations go into them."""
    reading, arithmetic = moved / rates.bandwidth, computed / rates.operations
    if arithmetic >= reading:
        return Limit(best=tokens / arithmetic, by="operations")
    return Limit(best=tokens / reading, by="bandwidth")
