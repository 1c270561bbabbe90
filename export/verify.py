"""The shipped part against PyTorch: on the target's own runtime, after quantization."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.decoder import Decoder, DecoderLayer, EagerCache
from mobilemm.export.layerwise import load_parameters
from mobilemm.export.memory import page_out
from mobilemm.export.parts import Part
from mobilemm.export.quantization import GENERATOR_PARTS
from mobilemm.runtime.manifest import Parity
from mobilemm.runtime.self_check import MAX_DB, snr_db

Array = NDArray[np.float32]

# A best token that leads by less than this, in nats, is a near-tie: another choice is no error.
NEAR_TIE = {32: 0.01, 16: 0.1, 8: 0.3, 6: 0.5, 4: 1.0}


@dataclass(frozen=True)
class Floor:
    """The least that a part must reach. `conversion_db`: against the same weights; the rest: fp32."""

    conversion_db: float
    cosine: float
    top1: float = 0.0


# By the bits of the weights. Conversion is arithmetic in another order, or with activations in int8; a
# wrong layout, a lost bias or a swapped axis costs tens of decibels. The damage done by quantization is the
# weights' own affair: random ones lose far more than trained ones, so these floors only catch ruin.
FLOORS: Mapping[str, Mapping[int, Floor]] = {
    "vision": {32: Floor(80, 0.9999), 16: Floor(45, 0.999), 8: Floor(20, 0.98), 4: Floor(15, 0.9)},
    "embed": {32: Floor(100, 0.99999), 16: Floor(60, 0.9999), 8: Floor(80, 0.999), 4: Floor(80, 0.97)},
    # Of pictures a signal-to-noise ratio of 30 dB is seen by nobody.
    "output_projector": {32: Floor(60, 0.9999), 16: Floor(40, 0.999), 8: Floor(25, 0.99), 4: Floor(15, 0.9)},
    **{
        part: {32: Floor(60, 0.9999), 16: Floor(45, 0.999), 8: Floor(30, 0.99), 4: Floor(20, 0.9)}
        for part in GENERATOR_PARTS
    },
    "decoder": {
        32: Floor(80, 0.9999, 1.0),
        16: Floor(35, 0.999, 0.98),
        8: Floor(20, 0.98, 0.9),
        4: Floor(15, 0.75),
    },
}
# Decibels that arithmetic in float16 keeps to the same weights; the models that ship have 46 and more.
HALF_FLOOR = 35.0
ADVICE = {
    "vision": "--q-vision int8 or fp32",
    "embed": "--q-embed int8 or fp32",
    "output_projector": "--q-generator fp32",
    **dict.fromkeys(GENERATOR_PARTS, "--q-generator int8 or fp32"),
    "decoder": "--q-llm int8, a smaller --block-size, or --q-keep for the layers named",
}


def reference(
    part: Part, inputs: Mapping[str, Tensor], watch: Callable[[str, Tensor], None] | None = None
) -> Tensor:
    """What a part gives in fp32 PyTorch, from the checkpoint's own weights.

    Of a decoder one layer at a time is in memory. Its logits are those of all positions; `watch` is shown
    each layer's sum.
    """
    with torch.no_grad():
        if isinstance(part.module, Decoder):
            return decoder_reference(part, inputs, watch)
        module = share_tensors(part.module)
        blocks = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
        for block in (block for blocklist in blocks for block in blocklist):
            _widen_while_running(block)
        return _with_weights(module, part.weights, keep=blocks)(*inputs.values())


def _widen_while_running(block: nn.Module) -> None:
    """Has a block's parameters in float32 only while it computes, so that no fp32 copy of a model exists."""
    narrow: dict[nn.Parameter, Tensor] = {}

    def widen(*_: object) -> None:
        narrow.update({parameter: parameter.data for parameter in block.parameters()})
        for parameter in narrow:
            parameter.data = parameter.data.float()

    def restore(*_: object) -> None:
        for parameter, data in narrow.items():
            parameter.data = data
            page_out(data)
        narrow.clear()

    for parameters in block.modules():
        for name, parameter in list(parameters._parameters.items()):
            if parameter is not None:  # of its own, over the same memory
                parameters._parameters[name] = nn.Parameter(parameter.data, requires_grad=False)
    block.register_forward_pre_hook(widen)
    block.register_forward_hook(restore)


def decoder_reference(
    part: Part,
    inputs: Mapping[str, Tensor],
    watch: Callable[[str, Tensor], None] | None = None,
    cache: EagerCache | None = None,
) -> Tensor:
    """Logits of all positions, weights read layer by layer.

    `watch` is shown each layer's sum; `cache` is filled.
    """
    normed = decoder_states(part, inputs, watch, cache)
    assert isinstance(part.module, Decoder)
    with torch.no_grad():
        # The head is the largest matrix: its rows are taken in pieces, so that no fp32 copy of it exists.
        head = part.weights["lm_head.weight"]
        logits = torch.cat([normed @ rows.float().T for rows in head.split(8192)], -1)
    if (cap := part.module.spec.logit_softcap) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def decoder_states(
    part: Part,
    inputs: Mapping[str, Tensor],
    watch: Callable[[str, Tensor], None] | None = None,
    cache: EagerCache | None = None,
) -> Tensor:
    """Last hidden states (batch, length, hidden), as the head reads them; the rest as `decoder_reference`."""
    source = part.module
    assert isinstance(source, Decoder)
    with torch.device("meta"):
        decoder = Decoder(source.spec)
    rotary = decoder.rotary(inputs.get("position_ids"))
    cache = EagerCache() if cache is None else cache
    hidden: Tensor = inputs["inputs_embeds"].float()
    residual: Tensor | None = None
    with torch.no_grad():
        for index, layer in enumerate(decoder.layers):
            assert isinstance(layer, DecoderLayer)
            load_parameters(layer, part.weights, f"layers.{index}.")
            rope = layer.spec.rope
            hidden, residual = layer(hidden, residual, cache, None if rope is None else rotary[rope])
            layer.to("meta")
            if watch is not None:
                watch(f"layers.{index}", hidden + residual)
        load_parameters(decoder.norm, part.weights, "norm.")
        normed: Tensor = decoder.norm(hidden, residual)[0]
    return normed


def with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a module in float32, with `weights` in the places of parameters on the meta device."""
    return _with_weights(share_tensors(module), weights)


def _with_weights(
    filled: nn.Module, weights: Mapping[str, Tensor], keep: Sequence[nn.Module] = ()
) -> nn.Module:
    """The module itself, all in float32 but for what lies below `keep`."""
    kept = {id(parameter) for module in keep for parameter in module.parameters()}
    for name, parameter in list(filled.named_parameters()):
        if id(parameter) in kept:
            continue
        *path, last = name.split(".")
        owner = filled.get_submodule(".".join(path))
        value = weights.get(name, parameter)
        setattr(owner, last, nn.Parameter(value.detach().float(), requires_grad=False))
    for name, buffer in list(filled.named_buffers()):
        *path, last = name.split(".")
        if buffer.is_floating_point():
            filled.get_submodule(".".join(path))._buffers[last] = buffer.float()
    return filled.eval()


def share_tensors(module: nn.Module) -> nn.Module:
    """A copy of the modules over the same tensors."""
    memo: dict[int, object] = {id(tensor): tensor for tensor in module.parameters()}
    memo |= {id(tensor): tensor for tensor in module.buffers()}
    return copy.deepcopy(module, memo)


def measure(
    shipped: Array, wanted: Array, quantized: Array, *, bits: int = 32, logits: bool = False
) -> Parity:
    """How close the shipped part's output is to fp32's (`wanted`), and to its own weights' in PyTorch.

    Shapes: equal; with `logits` (…, positions, vocabulary).
    """
    if not np.isfinite(shipped).all():
        raise MobileMMError("the shipped part gives NaN or infinite values")
    top1 = ties = kl = None
    if logits:
        top1, ties, kl = _tokens(shipped, wanted, NEAR_TIE[bits])
    return Parity(
        cosine=cosine(shipped, wanted),
        snr_db=snr_db(shipped, wanted),
        max_abs_error=float(np.abs(shipped - wanted).max()),
        conversion_db=snr_db(shipped, quantized),
        top1=top1,
        near_ties=ties,
        kl=kl,
    )


def check(
    part: str,
    bits: int,
    parity: Parity,
    worst: Sequence[str] = (),
    *,
    half: bool = False,
) -> None:
    """Raises MobileMMError for a part below its floor: the figure, the worst layers, the way out.

    Of a part that computes in float16 (`half`) no less error is wanted than of weights in float16, and no
    more is suffered than float16 explains: its weights, quantized or not, are those of PyTorch.
    """
    floors = FLOORS.get(part, FLOORS["vision"])
    floor = floors[4 if bits <= 6 else bits]
    if half:
        decibels = min(max(floor.conversion_db, HALF_FLOOR), floors[16].conversion_db)
        floor = replace(floor, conversion_db=decibels)
    failed = [
        f"{name} {found:.4g}, at least {least:g} is wanted"
        for name, found, least in (
            ("conversion error (dB)", parity.conversion_db, floor.conversion_db),
            ("cosine to fp32", parity.cosine, floor.cosine),
            ("top-1 agreement", 1.0 if parity.top1 is None else parity.top1, floor.top1),
        )
        if not found >= least  # as NaN is not
    ]
    if not failed:
        return
    layers = f"; worst: {', '.join(worst)}" if worst else ""
    raise MobileMMError(
        f"part {part!r} ({bits} bits) is not what PyTorch says: {'; '.join(failed)}{layers}."
        f" Try {ADVICE.get(part, 'more bits')}"
    )


@contextmanager
def layer_decibels(module: nn.Module, wanted: dict[str, Tensor]) -> Iterator[list[float]]:
    """Within it, a run of a decoder leaves how close the sums behind its layers come to `wanted`, in dB.

    `wanted` is emptied, as a layer's sum is needed once. Of other parts nothing is left.
    """
    found: list[float] = []

    def look(layer: nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> None:
        hidden, residual = output
        found.append(snr_db((hidden + residual).numpy(), wanted.pop(f"layers.{len(found)}").numpy()))

    layers = module.layers if isinstance(module, Decoder) else ()
    hooks = [layer.register_forward_hook(look) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def worst_layers(decibels: Sequence[float], count: int = 3) -> list[str]:
    """The layers behind which the quantized model loses most, against the layer before."""
    losses = [
        (before - now, f"layers.{index} ({now:.1f} dB)")
        for index, (before, now) in enumerate(zip([MAX_DB, *decibels], decibels, strict=False))
    ]
    return [text for _, text in sorted(losses, reverse=True)[:count]]


def cosine(a: Array, b: Array) -> float:
    """Of the two as vectors; 1 where both are zero."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if norms else float(not x.any() and not y.any())


def _tokens(shipped: Array, wanted: Array, near_tie: float) -> tuple[float, float, float]:
    """Share of equal best tokens, where a near-tie's second counts as equal; share of near-ties; mean KL."""
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (shipped, wanted))
    best = b.argmax(-1)
    rows = np.arange(len(b))
    margins = b[rows, best] - b[rows, a.argmax(-1)]
    second = np.partition(b, -2, -1)[:, -2]
    ties = (b[rows, best] - second) < near_tie
    log_p, log_q = (x - x.max(-1, keepdims=True) for x in (b, a))
    log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
    log_q -= np.log(np.exp(log_q).sum(-1, keepdims=True))
    kl = float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())
    return float((margins < near_tie).mean()), float(ties.mean()), max(kl, 0.0)
