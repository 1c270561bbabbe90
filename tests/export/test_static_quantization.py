"""Activations in int8 with steps found beforehand, against PyTorch's own fake quantization and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization.observer import MinMaxObserver

from mobilemm.errors import MobileMMError
from mobilemm.export.quantization import PartPlan, QuantizedLinear, WeightScheme, make_plan
from mobilemm.export.quantizers import quantize
from mobilemm.export.static_quantization import (
    ActivationQuantizer,
    QuantizedConv2d,
    StaticallyQuantized,
    quantize_activations,
    quantize_convolutions,
)
from mobilemm.export.targets import find_target

PLAN = PartPlan(WeightScheme(8, None), activations="int8-static")


class Encoder(nn.Module):
    """Patches by a convolution, a depthwise one with padding, a linear layer; and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4, padding="valid")
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.linear = nn.Linear(8, 6)
        self.unused = nn.Linear(8, 6)

    def forward(self, pixels: Tensor) -> Tensor:
        x = torch.relu(self.patches(pixels.to(self.patches.weight.dtype)))
        return self.linear(self.depthwise(x).flatten(2).mT)


def made(samples: Tensor) -> Encoder:
    torch.manual_seed(0)
    module = Encoder().requires_grad_(False).eval()
    quantize_convolutions(module, PLAN, "vision")
    for name in ("linear", "unused"):
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        module.set_submodule(name, QuantizedLinear(quantize(layer.weight, PLAN.default), layer.bias))
    quantize_activations(module, lambda one, index: one(samples[index : index + 1]), len(samples), "vision")
    return module


def pictures() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_convolutions_are_their_dequantized_selves() -> None:
    torch.manual_seed(0)
    module = Encoder().requires_grad_(False)
    exact = nn.Sequential(module.patches, module.depthwise)
    x = pictures()
    wanted = exact(x)
    quantize_convolutions(module, PLAN, "vision")
    assert isinstance(module.patches, QuantizedConv2d)
    assert isinstance(module.depthwise, QuantizedConv2d)
    assert module.depthwise.quantized.shape == (8, 9)
    found = module.depthwise(module.patches(x))
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_every_layer_that_runs_gets_a_quantizer_and_little_is_lost() -> None:
    x = pictures()
    torch.manual_seed(0)
    wanted = Encoder().eval()(x)
    module = made(x)
    for name in ("patches", "depthwise", "linear"):
        assert isinstance(module.get_submodule(name), StaticallyQuantized), name
    assert isinstance(module.unused, QuantizedLinear)
    assert (module(x) - wanted).norm() < 0.05 * wanted.norm()


def test_ranges_are_those_of_an_observer_where_values_are_even() -> None:
    """And zero is a code, also where all values lie above it."""
    module = nn.Sequential(QuantizedLinear(quantize(torch.randn(4, 64), PLAN.default)))
    samples = torch.linspace(0.5, 6.0, 64).repeat(3, 1)
    quantize_activations(module, lambda one, index: one(samples[index]), 3, "vision")
    observer = MinMaxObserver(dtype=torch.qint8, quant_min=-128, quant_max=127)
    observer(torch.cat([samples, torch.zeros(1, 64)]))
    scale, zero_point = observer.calculate_qparams()
    (layer,) = module
    assert isinstance(layer, StaticallyQuantized)
    assert layer.quantizer.zero_point == int(zero_point)
    assert layer.quantizer.step == pytest.approx(float(scale), rel=2**-10)


def test_a_rare_outlier_is_clipped_for_the_sake_of_the_many() -> None:
    values = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))
    values[0, 0] = 60.0
    module = nn.Sequential(QuantizedLinear(quantize(torch.randn(1, 100_000), PLAN.default)))
    quantize_activations(module, lambda one, index: one(values), 1, "vision")
    quantizer = module[0].quantizer
    error = (quantizer(values) - values).square().sum()
    plain = ActivationQuantizer((60.0 - values.min().item()) / 255, round(-128 - values.min().item() / 0.25))
    assert error < 0.9 * (plain(values) - values).square().sum()


def test_pictures_are_needed_and_must_be_finite() -> None:
    with pytest.raises(MobileMMError, match="part 'vision': w8a8 needs pictures in the calibration set"):
        made(pictures()[:0])
    broken = pictures()
    broken[0, 0, 0, 0] = float("inf")
    with pytest.raises(MobileMMError, match=r"layer vision\.patches: its inputs .* are not finite"):
        made(broken)


def test_the_word_is_the_vision_encoders_alone() -> None:
    assert make_plan("int4", vision="w8a8").part("vision") == PLAN
    with pytest.raises(MobileMMError, match="--q-llm: 'w8a8' is no precision"):
        make_plan("w8a8")


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_other_targets_refuse_it(target: str) -> None:
    pytest.importorskip(target)
    with pytest.raises(MobileMMError, match=f"--target {target}: 'vision' in w8a8 is not possible"):
        find_target(target).stores(make_plan("int4", vision="w8a8"))
