"""A decoder quantized one layer after the other, so that no more than one layer is held in full precision.

With calibration data each layer is shown what the layers before it, already quantized, make of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.awq import smooth
from mobilemm.export.decoder import Decoder, DecoderLayer, EagerCache
from mobilemm.export.gptq import gptq
from mobilemm.export.memory import page_out
from mobilemm.export.palettes import palettize
from mobilemm.export.quantization import PartPlan, QuantizedLinear, QuantizedWeight, WeightScheme
from mobilemm.export.quantizers import check_finite, quantize

Progress = Callable[[str, int, int], None]
"""Called with what is done next, how many layers are done, and how many there are."""

# Hidden states that go through a layer at once.
BATCH_TOKENS = 2048


@torch.no_grad()
def quantize_decoder(
    decoder: Decoder,
    weights: Mapping[str, Tensor],
    plan: PartPlan,
    *,
    calibration: Tensor | None = None,
    head: QuantizedWeight | None = None,
    progress: Progress | None = None,
) -> None:
    """Fills a decoder with its weights, quantized as planned: `nn.Linear` becomes `QuantizedLinear`.

    Layers that the plan leaves in 16 or 32 bits stay `nn.Linear` in float32.

    Args:
        decoder: may lie on the meta device; changed in place.
        weights: its parameters by name, each asked for once.
        plan: schemes by the names of linear layers: `layers.0.qkv`, …, `lm_head`.
        calibration: float32 (rows, length, hidden), input embeddings; "gptq" and "awq" need them.
        head: the output head where it is the embedding's table, quantized already.
        progress: told of each layer.

    Raises MobileMMError for NaN in weights or in what the layers are fed, and for missing calibration data.
    """
    names = [
        f"layers.{index}.{name}"
        for index in range(len(decoder.layers))
        for name, _ in linears(decoder.layers[index])
    ]
    schemes = {name: plan.scheme(name) for name in (*names, "lm_head")}
    needing = [name for name, scheme in schemes.items() if needs_data(scheme)]
    if needing and calibration is None:
        method = plan.scheme(needing[0]).method
        raise MobileMMError(
            f"{needing[0]}: the method {method!r} needs calibration data; give some, or use --q-method hqq"
        )
    count = len(decoder.layers) + 1
    wanting = any(uses_data(scheme) for scheme in schemes.values())
    stream = None if calibration is None or not wanting else Stream.start(decoder, calibration)
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer)
        if progress is not None:
            progress(f"layers.{index}", index, count)
        load_parameters(layer, weights, f"layers.{index}.")
        _quantize_layer(layer, f"layers.{index}.", plan, stream)
        if stream is not None:
            stream.advance(layer)
    if progress is not None:
        progress("lm_head", count - 1, count)
    load_parameters(decoder.norm, weights, "norm.")
    if head is not None:
        decoder.set_submodule("lm_head", QuantizedLinear(head))
        return
    load_parameters(decoder.lm_head, weights, "lm_head.")
    scheme = plan.scheme("lm_head")
    if scheme.quantized:
        hessian = None
        if stream is not None and scheme.method in ("gptq", "kmeans"):
            hessian = torch.zeros(decoder.lm_head.in_features, decoder.lm_head.in_features)
            for hidden, residual in stream.batches():
                normed, _ = decoder.norm(hidden, residual)
                hessian.addmm_(normed.flatten(0, 1).T, normed.flatten(0, 1))
        quantized = quantize_linear(decoder.lm_head, scheme, "lm_head", hessian)
        decoder.set_submodule("lm_head", quantized)


@dataclass
class Stream:
    """What calibration data has become behind the layers so far, and how to run it through the next.

    `hidden` and `residual` are (rows, length, hidden); the residual stream is their sum.
    """

    decoder: Decoder
    hidden: Tensor
    residual: Tensor | None = None

    @classmethod
    def start(cls, decoder: Decoder, embeddings: Tensor) -> Stream:
        """At the first layer. Raises MobileMMError for embeddings of another shape."""
        width = decoder.spec.hidden_size
        if embeddings.ndim != 3 or embeddings.shape[2] != width or not embeddings.numel():
            raise MobileMMError(
                f"calibration embeddings must be (rows, length, {width}), not {tuple(embeddings.shape)}"
            )
        check_finite(embeddings, "calibration embeddings")
        if embeddings.shape[1] > decoder.spec.context_length:
            raise MobileMMError(
                f"calibration rows of {embeddings.shape[1]} tokens are longer than the model's context of"
                f" {decoder.spec.context_length}"
            )
        return cls(decoder, embeddings.float())

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """A few rows at once."""
        step = max(1, BATCH_TOKENS // self.hidden.shape[1])
        for start in range(0, len(self.hidden), step):
            rows = slice(start, start + step)
            yield self.hidden[rows], None if self.residual is None else self.residual[rows]

    def run(self, layer: DecoderLayer) -> Iterator[tuple[Tensor, Tensor]]:
        """The layer's outputs, batch after batch, each without a past."""
        positions = None
        if self.decoder.spec.mrope_section is not None:  # text counts alike in all three dimensions
            positions = torch.arange(self.hidden.shape[1]).expand(3, 1, -1)
        rotary = self.decoder.rotary(positions)
        rope = layer.spec.rope
        for hidden, residual in self.batches():
            yield layer(hidden, residual, EagerCache(), None if rope is None else rotary[rope])

    def advance(self, layer: DecoderLayer) -> None:
        """Goes behind the layer."""
        outputs = list(self.run(layer))
        self.hidden = torch.cat([hidden for hidden, _ in outputs])
        self.residual = torch.cat([residual for _, residual in outputs])

    def hessians(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """XᵀX over the inputs X of each of the layer's linear layers; the same tensor for the same inputs."""
        found: dict[str, Tensor] = {}

        def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                flat = inputs[0].flatten(0, -2)
                hessian = found.setdefault(name, torch.zeros(flat.shape[1], flat.shape[1]))
                hessian.addmm_(flat.T, flat)

            return hook

        hooks = [
            module.register_forward_pre_hook(observe(name)) for name, module in linears(layer) if name != "up"
        ]
        try:
            for _ in self.run(layer):
                pass
        finally:
            for handle in hooks:
                handle.remove()
        if "gate" in found:
            found["up"] = found["gate"]
        return found


def linears(layer: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers below a module, by name."""
    return [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


def needs_data(scheme: WeightScheme) -> bool:
    """Whether the scheme's method cannot do without calibration data."""
    return scheme.quantized and scheme.method in ("gptq", "awq")


def uses_data(scheme: WeightScheme) -> bool:
    """Whether the scheme's method looks at calibration data where there is some."""
    return needs_data(scheme) or scheme.palette


def load_parameters(module: nn.Module, weights: Mapping[str, Tensor], prefix: str) -> None:
    """Gives a module its parameters in float32, copies of `weights` under their names with this prefix."""
    for name, _ in list(module.named_parameters()):
        *path, last = name.split(".")
        owner = module.get_submodule(".".join(path))
        source = weights[prefix + name].detach()
        value = source.to(torch.float32, copy=True)
        page_out(source)
        setattr(owner, last, nn.Parameter(value, requires_grad=False))


def _quantize_layer(layer: DecoderLayer, prefix: str, plan: PartPlan, stream: Stream | None) -> None:
    schemes = {name: plan.scheme(prefix + name) for name, _ in linears(layer)}
    hessians: dict[str, Tensor] = {}
    if stream is not None and any(uses_data(scheme) for scheme in schemes.values()):
        hessians = stream.hessians(layer)
    if any(scheme.quantized and scheme.method == "awq" for scheme in schemes.values()):
        smooth(layer, hessians, schemes)
        assert stream is not None
        hessians = stream.hessians(layer)
    for name, scheme in schemes.items():
        if scheme.quantized:
            linear = getattr(layer, name)
            setattr(layer, name, quantize_linear(linear, scheme, prefix + name, hessians.get(name)))


def quantize_linear(
    linear: nn.Linear, scheme: WeightScheme, name: str, hessian: Tensor | None = None
) -> QuantizedLinear:
    """A linear layer quantized by the scheme's method.

    `hessian` is XᵀX over its inputs: for "gptq", and for "kmeans" its diagonal.
    """
    if scheme.method == "gptq" and hessian is not None:
        return QuantizedLinear(gptq(linear.weight, hessian, scheme, name=name), linear.bias)
    if scheme.palette and hessian is not None:
        return QuantizedLinear(palettize(linear.weight, scheme, hessian.diagonal(), name), linear.bias)
    return QuantizedLinear(quantize(linear.weight, scheme, name), linear.bias)
