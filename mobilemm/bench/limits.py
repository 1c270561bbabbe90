"""What a bundle's phases must move and compute at least, from its manifest."""

from __future__ import annotations

from dataclasses import dataclass

from mobilemm.bench.result import Limit, Settings
from mobilemm.runtime.manifest import Manifest

CACHE_BYTES = {"float32": 4, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Rates:
    """What a machine does a second: bytes read from memory, fp32 operations."""

    bandwidth: float
    operations: float


def prefill_limit(manifest: Manifest, settings: Settings, rates: Rates) -> Limit:
    """Tokens a second: every weight multiplies and adds once a token; the weights are read once."""
    model, count = manifest.model, settings.prompt_tokens
    head = model.vocab_size * model.hidden_size  # for the last position alone
    products = max(manifest.parts["decoder"].parameters - head, 0) * count + head
    attention = 2 * model.num_layers * model.num_attention_heads * model.head_dim * count * count / 2
    return _rate(count, decoder_bytes(manifest), 2 * (products + attention), rates)


def decode_limit(manifest: Manifest, length: float, rates: Rates) -> Limit:
    """Tokens a second behind `length` others: each token reads all weights, and all keys and values."""
    moved = decoder_bytes(manifest) + length * cache_bytes_per_token(manifest)
    return _rate(1, moved, 2 * manifest.parts["decoder"].parameters, rates)


def load_limit(total: int, rates: Rates) -> Limit:
    """Seconds: each byte of the weights is read once, from memory when the system still has it there."""
    return Limit(best=total / rates.bandwidth, by="bandwidth")


def _rate(tokens: int, moved: float, computed: float, rates: Rates) -> Limit:
    """Tokens a second, when so many bytes and operations go into them."""
    reading, arithmetic = moved / rates.bandwidth, computed / rates.operations
    if arithmetic >= reading:
        return Limit(best=tokens / arithmetic, by="operations")
    return Limit(best=tokens / reading, by="bandwidth")


def decoder_bytes(manifest: Manifest) -> int:
    """Of the decoder's weights; where all parts are one file, by the sizes that the parts had alone."""
    return manifest.parts["decoder"].bytes or manifest.parts["decoder"].peak_memory // 2


def cache_bytes_per_token(manifest: Manifest) -> int:
    """Keys and values of one position, in the type that the decoder has them in."""
    model = manifest.model
    kinds = {one.dtype for one in manifest.parts["decoder"].inputs if one.name.startswith("past_key_values.")}
    default = "float16" if manifest.target == "coreml" else "float32"
    width = CACHE_BYTES[next(iter(kinds), default)]
    return 2 * model.num_layers * model.num_key_value_heads * model.head_dim * width
