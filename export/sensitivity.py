"""Which layers are worth more bits: the damage that each does alone, and the best use of a size in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemm.errors import MobileMMError
from mobilemm.export.decoder import Decoder, DecoderLayer
from mobilemm.export.layerwise import (
    Progress,
    Stream,
    linears,
    load_parameters,
    quantize_linear,
    uses_data,
)
from mobilemm.export.quantization import INT4_BLOCK, Bits, PartPlan, QuantizedWeight, WeightScheme

FINE_BITS: Bits = 8
# Positions whose logits are compared at once.
LOGIT_POSITIONS = 512


@torch.no_grad()
def measure_damage(
    decoder: Decoder,
    weights: Mapping[str, Tensor],
    plan: PartPlan,
    calibration: Tensor,
    *,
    head: QuantizedWeight | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """What quantizing each linear layer alone does to the logits: mean KL divergence a position, in nats.

    All variants go through the model side by side, each from its own layer on, so that only one layer's
    weights are held at a time.

    Args:
        decoder: may lie on the meta device; is left there.
        weights: its parameters by name.
        plan: schemes by layer name; layers of 8 bits and more are not measured.
        calibration: float32 (rows, length, hidden), input embeddings. Each layer measured takes another
            4 · rows · length · hidden bytes; 256 positions are enough to rank layers.
        head: the output head where it is the embedding's table; it is not measured then.
        progress: told of each layer.
    """
    count = len(decoder.layers) + 1
    # Of the first rows nothing is changed; the other rows are those of `names`, in turns.
    stream = Stream.start(decoder, calibration)
    rows = len(calibration)
    names: list[str] = []
    for index in range(len(decoder.layers)):
        if progress is not None:
            progress(f"layers.{index}", index, count)
        with torch.device("meta"):
            layer = DecoderLayer(decoder.spec, index)
        load_parameters(layer, weights, f"layers.{index}.")
        untouched = Stream(decoder, stream.hidden[:rows])
        schemes = {name: plan.scheme(f"layers.{index}.{name}") for name, _ in linears(layer)}
        coarse = {name: scheme for name, scheme in schemes.items() if scheme.bits < FINE_BITS}
        hessians = untouched.hessians(layer) if any(map(uses_data, coarse.values())) else {}
        variants = []
        for name, scheme in coarse.items():
            linear = getattr(layer, name)
            setattr(
                layer, name, quantize_linear(linear, scheme, f"layers.{index}.{name}", hessians.get(name))
            )
            variants += [hidden + residual for hidden, residual in untouched.run(layer)]
            setattr(layer, name, linear)
            names.append(f"layers.{index}.{name}")
        # The sum of both pieces of the residual stream is all that the next layer needs.
        stream.hidden = torch.cat([*(hidden + residual for hidden, residual in stream.run(layer)), *variants])
    if progress is not None:
        progress("lm_head", count - 1, count)
    with torch.device("meta"):
        last = Decoder(replace(decoder.spec, num_layers=0, layers=()))
    load_parameters(last.norm, weights, "norm.")
    load_parameters(last.lm_head, weights, "lm_head.")
    hidden = stream.hidden.unflatten(0, (-1, rows)).flatten(1, 2)  # (variants, positions, hidden)
    damage = torch.zeros(len(hidden))
    scheme = plan.scheme("lm_head")
    quantized_head = None
    if head is None and scheme.bits < FINE_BITS:
        normed, _ = last.norm(hidden[0], None)
        quantized_head = quantize_linear(last.lm_head, scheme, "lm_head", normed.T @ normed)
    head_damage = 0.0
    positions = hidden.shape[1]
    for start in range(0, positions, LOGIT_POSITIONS):
        chosen = slice(start, start + LOGIT_POSITIONS)
        wanted = last.logits(hidden[:1, chosen], None)[0].log_softmax(-1)
        for variant in range(1, len(hidden)):
            got = last.logits(hidden[variant : variant + 1, chosen], None)[0].log_softmax(-1)
            damage[variant] += F.kl_div(got, wanted, reduction="sum", log_target=True) / positions
        if quantized_head is not None:
            exact, last.lm_head = last.lm_head, quantized_head  # type: ignore[assignment]
            got = last.logits(hidden[:1, chosen], None)[0].log_softmax(-1)
            last.lm_head = exact
            head_damage += F.kl_div(got, wanted, reduction="sum", log_target=True).item() / positions
    found = dict(zip(names, damage[1:].clamp(min=0).tolist(), strict=True))
    return found | ({} if quantized_head is None else {"lm_head": max(head_damage, 0.0)})


def spend(
    plan: PartPlan, shapes: Mapping[str, tuple[int, int]], damage: Mapping[str, float], budget: int
) -> PartPlan:
    """The plan with those layers raised to 8 bits whose damage weighs most for the bytes that it costs.

    Args:
        plan: where the search starts.
        shapes: (rows, columns) of each linear layer of the part.
        damage: of each layer that may be raised, as `measure_damage` gives it. It shrinks with the square of
            the step: what is left of it at 8 bits, 1/256 of that at 4, does not count.
        budget: bytes of all these layers together.

    Raises MobileMMError when the plan as it is needs more than the budget.
    """
    size = sum(plan.scheme(name).nbytes(*shape) for name, shape in shapes.items())
    if size > budget:
        raise MobileMMError(
            f"--q-search {budget / 1e6:.1f}: the plan takes {size / 1e6:.1f} MB before any layer gets more"
            " bits; give at least that, or fewer bits"
        )
    fine: dict[str, WeightScheme] = {}
    costs: dict[str, int] = {}
    for name in damage:
        scheme = plan.scheme(name)
        block_size = INT4_BLOCK if scheme.palette else scheme.block_size
        fine[name] = replace(scheme, bits=FINE_BITS, block_size=block_size, symmetric=True, method="rtn")
        costs[name] = fine[name].nbytes(*shapes[name]) - scheme.nbytes(*shapes[name])
    raised = []
    for name in sorted(damage, key=lambda name: (-damage[name] / max(costs[name], 1), name)):
        if size + costs[name] <= budget:
            size += costs[name]
            raised.append((name, fine[name]))
    return replace(plan, exceptions=(*raised, *plan.exceptions))
