"""Activations in int8 with steps found beforehand: shown pictures, each layer's inputs get a range.

For runtimes whose processors multiply int8 by int8 (Apple's Neural Engine from the A17 and the M4 on), and
have no time to look at each input first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.quantization import PartPlan, QuantizedLinear, QuantizedWeight
from mobilemm.export.quantizers import quantize

BINS = 2048
# Parts of an input's range that are tried: less than 1 clips the largest values in favour of the many.
RANGES = tuple(1 - step / 40 for step in range(36))
# The least step that float16 holds with all its digits.
LEAST_STEP = float(np.finfo(np.float16).smallest_normal)


class ActivationQuantizer(nn.Module):
    """Rounds to int8 and back: `(clamp(round(x / step) + zero_point, -128, 127) - zero_point) · step`.

    Shapes: any → the same.
    """

    def __init__(self, step: float, zero_point: int) -> None:
        super().__init__()
        self.step, self.zero_point = step, zero_point

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.step, self.zero_point, -128, 127)


class QuantizedConv2d(nn.Module):
    """`nn.Conv2d` over a quantized kernel, a row of which is all that makes one output channel.

    Shapes: (batch, channels, height, width) → as the convolution's.
    """

    packed: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, convolution: nn.Conv2d, weight: QuantizedWeight) -> None:
        super().__init__()
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("bias", None if convolution.bias is None else convolution.bias.detach().float())
        self.bits, self.block_size, self.rows = weight.bits, weight.block_size, weight.shape
        self.kernel = tuple(convolution.weight.shape)
        self.stride, self.dilation, self.groups = convolution.stride, convolution.dilation, convolution.groups
        self.padding: tuple[int, ...] = (0, 0)
        if not isinstance(convolution.padding, str):  # that is "valid", which pads nothing
            self.padding = convolution.padding

    @property
    def quantized(self) -> QuantizedWeight:
        """The kernel as a matrix (output channels, all else), sharing memory with the buffers."""
        return QuantizedWeight(self.packed, self.scales, None, self.bits, self.block_size, self.rows)

    @property
    def weight(self) -> Tensor:
        """A tensor of the dtype that it computes in: models ask for no more."""
        return self.scales

    def forward(self, x: Tensor) -> Tensor:
        weight = self.quantized.dequantize().view(self.kernel)
        return nn.functional.conv2d(
            x,
            weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


class StaticallyQuantized(nn.Module):
    """A quantized layer behind the quantizer of its inputs."""

    def __init__(self, quantizer: ActivationQuantizer, layer: QuantizedLinear | QuantizedConv2d) -> None:
        super().__init__()
        self.quantizer, self.layer = quantizer, layer
        # Models ask a convolution's weight for its dtype, and for no more.
        self.register_buffer("weight", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.quantizer(x))


def quantize_convolutions(module: nn.Module, plan: PartPlan, part: str) -> None:
    """Puts a `QuantizedConv2d` in the place of each convolution that zeros pad, or nothing.

    Subclasses, such as timm's that pad by the size of their input, stay as they are.
    """
    for name, child in list(module.named_modules()):
        scheme = plan.scheme(name)
        if type(child) is nn.Conv2d and child.padding_mode == "zeros" and child.padding != "same":
            weight = quantize(child.weight.detach().float().flatten(1), scheme, f"{part}.{name}")
            module.set_submodule(name, QuantizedConv2d(child, weight))


@torch.no_grad()
def quantize_activations(
    module: nn.Module, run: Callable[[nn.Module, int], object], count: int, part: str
) -> None:
    """Gives each quantized layer of a part a quantizer of its inputs, as `count` runs show them.

    Each input's range is that of least squared error over all that was seen. The runs are made twice.

    Args:
        module: changed in place.
        run: runs the module on the sample of an index.

    Raises MobileMMError for inputs that are not finite, and when there is no sample.
    """
    layers = {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, (QuantizedLinear, QuantizedConv2d))
    }
    if not count:
        raise MobileMMError(f"part {part!r}: w8a8 needs pictures in the calibration set: give some, or int8")
    seen = {name: _Seen() for name in layers}
    for look in ("widen", "count"):
        hooks = [
            layer.register_forward_pre_hook(_observer(getattr(seen[name], look)))
            for name, layer in layers.items()
        ]
        try:
            for index in range(count):
                run(module, index)
        finally:
            for hook in hooks:
                hook.remove()
        if broken := [name for name, one in seen.items() if not np.isfinite(one.high - one.low)]:
            raise MobileMMError(
                f"layer {part}.{broken[0]}: its inputs on calibration pictures are not finite"
            )
    for name, layer in layers.items():
        if seen[name].counts is not None:  # never run: there is nothing to be quantized
            module.set_submodule(
                name, StaticallyQuantized(ActivationQuantizer(*seen[name].parameters()), layer)
            )


def _observer(look: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, inputs: look(inputs[0])


@dataclass
class _Seen:
    """What a layer was fed: the range, zero in it, and then a histogram over it."""

    low: float = 0.0
    high: float = 0.0
    counts: NDArray[np.float64] | None = None

    def widen(self, x: Tensor) -> None:
        low, high = (bound.item() for bound in x.aminmax())
        if not np.isfinite(high - low):  # as min and max of NaN would not show
            low, high = -np.inf, np.inf
        self.low, self.high = min(self.low, low), max(self.high, high)

    def count(self, x: Tensor) -> None:
        if self.high > self.low:
            found = torch.histc(x.float(), BINS, self.low, self.high).double().numpy()
            self.counts = found if self.counts is None else self.counts + found
        else:
            self.counts = np.zeros(BINS)

    def parameters(self) -> tuple[float, int]:
        """Step and zero point of the range with the least squared error."""
        assert self.counts is not None
        middles = self.low + (np.arange(BINS) + 0.5) * (self.high - self.low) / BINS
        best, least = (LEAST_STEP, 0), np.inf
        for part in RANGES:
            low, high = self.low * part, self.high * part
            step = float(np.float16(max((high - low) / 255, LEAST_STEP)))
            zero_point = int(np.clip(np.round(-128 - low / step), -128, 127))
            codes = np.clip(np.round(middles / step) + zero_point, -128, 127)
            error = float((self.counts * ((codes - zero_point) * step - middles) ** 2).sum())
            if error < least:
                best, least = (step, zero_point), error
        return best
