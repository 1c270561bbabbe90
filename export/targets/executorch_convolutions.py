"""Convolutional encoders in int8, with steps that calibration has found, as XNNPACK's kernels ask."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.targets.executorch_lowering import DelegatedForms

CONVOLUTION = torch.ops.aten.conv2d.default


def is_convolutional(module: nn.Module) -> bool:
    """Whether convolutions hold most of the weights: of transformers they only cut the picture up."""
    convolutions = sum(child.weight.numel() for child in module.modules() if isinstance(child, nn.Conv2d))
    return 2 * convolutions > sum(value.numel() for value in module.state_dict().values())


def quantize_convolutions(encoder: nn.Module, pictures: Tensor) -> nn.Module:
    """An encoder whose convolutions compute in int8: weights with a scale a channel, activations with one.

    Batch norms become part of the convolutions in front of them.

    Args:
        encoder: takes one picture at a time, as `pictures`' rows.
        pictures: uint8 (pictures, 3, height, width), whose activations set the steps.

    Raises MobileMMError when a convolution stays in floating point.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with DelegatedForms():
            graph: Any = torch.export.export(encoder, (pictures[:1],)).module()
        prepared = prepare_pt2e(graph, quantizer())
        for picture in pictures:
            prepared(picture[None])
        converted = convert_pt2e(prepared)
    left = [
        node.name
        for node in converted.graph.nodes
        if node.target is CONVOLUTION and "dequantize" not in str(node.args[1].target)
    ]
    if left:
        raise MobileMMError(
            f"{len(left)} convolutions of the vision encoder stay in float32 ({', '.join(left[:3])}):"
            " --convolutions float32 exports them so"
        )
    return converted


def quantizer() -> Any:
    """By operator: naming nn.Conv2d as a module's type, ExecuTorch 1.5 quantizes none and says nothing."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    config = get_symmetric_quantization_config(is_per_channel=True)
    return XNNPACKQuantizer().set_operator_type(CONVOLUTION, config)


class PictureByPicture(nn.Module):
    """A part's batch of pictures through an encoder that takes one.

    Shapes: (pictures, 3, height, width) → (pictures · tokens, width).
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.encoder(picture[None])[0] for picture in pixels])
