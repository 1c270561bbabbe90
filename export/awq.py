"""AWQ-style scaling: channels that are fed large inputs get larger weights, and with them finer steps.

The inputs are divided by as much where that is exact: in the norm in front, or in the rows of `up` for
`down`. What is quantized afterwards, and how, is no matter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.decoder import DecoderLayer
from mobilemm.export.quantization import WeightScheme
from mobilemm.export.quantizers import round_to_nearest

EXPONENTS = tuple(step / 10 for step in range(11))


def smooth(layer: DecoderLayer, hessians: Mapping[str, Tensor], schemes: Mapping[str, WeightScheme]) -> None:
    """Scales a layer's channels in place; what it computes stays the same but for rounding.

    For each group of linear layers with common inputs the exponent of the inputs' magnitude is searched whose
    scales give the least error of outputs. The projection behind attention is left alone: several heads of
    queries share the values that a scale would have to go into.

    Args:
        layer: float32.
        hessians: XᵀX over the inputs of `qkv`, `gate` and `down`.
        schemes: how each will be quantized; groups with layers that will not be are left alone.

    Source: Lin et al. 2023, "AWQ", arXiv 2306.00978, section 3.2.
    """
    assert layer.up is not None  # only a target joins it with `gate`, later
    groups: list[tuple[list[str], nn.Module]] = [
        (["qkv"], layer.input_norm),
        (["gate", "up"], layer.mlp_norm),
        (["down"], layer.up),
    ]
    for names, before in groups:
        if not all(schemes[name].quantized for name in names):
            continue
        hessian = hessians[names[0]]
        targets = [(getattr(layer, name).weight, schemes[name]) for name in names]
        scales = find_scales([(weight.data, scheme) for weight, scheme in targets], hessian, names[0])
        for weight, _ in targets:
            weight.data *= scales
        parameters = (
            [before.weight] if getattr(before, "bias", None) is None else [before.weight, before.bias]
        )
        for parameter in parameters:
            assert isinstance(parameter, nn.Parameter)
            parameter.data /= scales if parameter.ndim == 1 else scales[:, None]


def find_scales(targets: list[tuple[Tensor, WeightScheme]], hessian: Tensor, name: str = "weight") -> Tensor:
    """The scales, float32 (columns,), that give these weights (rows, columns) the least error of outputs.

    Raises MobileMMError when the inputs were not finite.
    """
    if not torch.isfinite(hessian).all():
        raise MobileMMError(f"layer {name!r}: its inputs on the calibration data are NaN or infinite")
    squares = hessian.diagonal()
    fed = squares > 0
    magnitudes = torch.where(fed, squares, 1.0).sqrt()
    best, least = torch.ones_like(magnitudes), float("inf")
    for exponent in EXPONENTS:
        scales = magnitudes**exponent
        scales = torch.where(fed, scales / scales[fed].log().mean().exp(), 1.0).clamp_(1e-4, 1e4)
        error = 0.0
        for weight, scheme in targets:
            quantized = round_to_nearest(weight * scales, scheme, search=False, name=name).dequantize()
            difference = (quantized / scales).sub_(weight)
            error += ((difference @ hessian) * difference).sum().item()
        if error < least:
            best, least = scales, error
    return best
