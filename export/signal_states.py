"""What the signal tokens' states are behind quantized weights, and by how much all are moved.

The states of all requests have most in common; what is asked for is told by small differences. Rounded
weights move all of them nearly alike, and by more than they differ. That mean error is a bias, known before
shipping and taken away where the states are read: Nagel et al. 2019, arXiv 1906.04721, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mobilemm.data.drawings import REQUESTS
from mobilemm.data.things import KINDS, with_article
from mobilemm.export import verify
from mobilemm.export.decoder import Decoder, EagerCache
from mobilemm.export.model import Model
from mobilemm.export.quantization import QuantizedEmbedding, QuantizedLinear, QuantizedWeight

ROWS = 48


@dataclass(frozen=True)
class Bias:
    """What is taken away, and what that gives.

    Attributes:
        shift: mean of the states behind quantized weights less PyTorch's, (signal tokens, width).
        before, after: cosine of the conditions to PyTorch's, mean over requests, with the shift and without.
        requests: how many.
    """

    shift: Tensor
    before: float
    after: float
    requests: int


@torch.no_grad()
def measure_bias(model: Model, decoder: Decoder, table: QuantizedWeight | None) -> Bias:
    """Of the states behind a few requests for drawings; `decoder` and `table` as in `signal_states`."""
    signals = list(model.split.signal_token_ids)
    things = [with_article(kind) for kind in dict.fromkeys(KINDS.values())]
    requests = [request.format(thing) for request, thing in zip(REQUESTS, things, strict=False)]
    rows = [model.tokenizer.encode([{"role": "user", "content": request}]) + signals for request in requests]
    ids, places = _padded(rows, len(signals))
    embedded = torch.cat([model.embed(row, []) for row in ids.tolist()])
    wanted = verify.decoder_states(model.parts["decoder"], {"inputs_embeds": embedded})
    wanted = wanted.take_along_dim(places, 1)
    found = signal_states(model, decoder, table, rows)
    shift = (found - wanted).mean(0)

    assert model.split.output_projector is not None
    projector = model.split.output_projector.float().eval()
    aims, *drawn = (projector(states).flatten(1) for states in (wanted, found, found - shift))
    before, after = (float(F.cosine_similarity(condition, aims).mean()) for condition in drawn)
    return Bias(shift, before, after, len(rows))


@torch.no_grad()
def signal_states(
    model: Model,
    decoder: Decoder,
    table: QuantizedWeight | None,
    rows: Sequence[Sequence[int]],
    progress: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Last hidden states at the signal tokens, with which each row of ids ends: (rows, signal tokens, width).

    Args:
        decoder: as it ships, its weights in it.
        table: the embedding's as it ships, None where it stays in floating point.
        progress: told how many rows are done.
    """
    signals = len(model.split.signal_token_ids)
    scale = getattr(model.parts["embed"].module, "scale", 1.0)
    embedding = None if table is None else QuantizedEmbedding(table)

    def embed(ids: Tensor) -> Tensor:
        if embedding is None:
            return torch.cat([model.embed(row, []) for row in ids.tolist()])
        embedded: Tensor = embedding(ids) * scale
        return embedded

    rotary = decoder.rotary()
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    shared = min(sum(1 for _ in alike), min(map(len, rows)) - signals)
    beginning = EagerCache()
    if shared:
        decoder.states(embed(torch.tensor([rows[0][:shared]])), beginning, rotary)
    found = torch.empty(len(rows), signals, decoder.spec.hidden_size)
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    for start in range(0, len(rows), ROWS):
        progress(start)
        chosen = by_length[start : start + ROWS]
        ids, places = _padded([rows[row][shared:] for row in chosen], signals)
        states = decoder.states(embed(ids), beginning.repeated(len(chosen)), rotary)
        found[chosen] = states.take_along_dim(places, 1)
    return found


def dequantized(decoder: Decoder) -> Decoder:
    """The same decoder with its weights in float32 as they are behind quantization, to be run often."""
    for name, child in list(decoder.named_modules()):
        if isinstance(child, QuantizedLinear):
            with torch.device("meta"):
                linear = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
            linear.weight = nn.Parameter(child.quantized.dequantize(), requires_grad=False)
            if child.bias is not None:
                linear.bias = nn.Parameter(child.bias, requires_grad=False)
            decoder.set_submodule(name, linear)
    return decoder


def _padded(rows: Sequence[Sequence[int]], signals: int) -> tuple[Tensor, Tensor]:
    """Ids (rows, longest), and the signal tokens' places (rows, signal tokens, 1).

    The rest is filled behind them, where they do not see it.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
    places = torch.tensor([range(len(row) - signals, len(row)) for row in rows])
    return ids, places[..., None]
