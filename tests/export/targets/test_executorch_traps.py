"""What ExecuTorch 1.5 gets wrong without a word, each cured: a test fails where its cure is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mobilemm.errors import MobileMMError
from mobilemm.export import verify
from mobilemm.export.parts import Part
from mobilemm.export.quantization import QuantizedLinear, WeightScheme
from mobilemm.export.quantizers import quantize
from mobilemm.runtime.backends.executorch import ExecutorchProgram
from mobilemm.runtime.bundle import Bundle
from mobilemm.runtime.self_check import snr_db

pytest.importorskip("executorch")

from mobilemm.export.targets import executorch_convolutions, executorch_lowering
from mobilemm.export.targets.executorch import ExecutorchTarget
from mobilemm.export.targets.executorch_lowering import (
    DelegatedForms,
    express,
    lower,
)


def through_the_gate(module: nn.Module, folder: Path, bits: int = 32) -> None:
    """An encoder, (1, 3, 8, 8) pixels → rows, written, run and compared as an export does.

    Raises MobileMMError where an export would stop.
    """
    noise = torch.randint(0, 256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    part = Part("vision", module, {"pixels": noise}, ("image_features",))
    target = ExecutorchTarget()
    shipped = target.run(part, target.write(part, module, folder), folder, {"pixels": noise.numpy()})
    wanted = module(noise).detach().numpy()
    verify.check("vision", bits, verify.measure(shipped, wanted, wanted, bits=bits))


class Encoder(nn.Module):
    """Rows of 64 numbers, none of them small, through a last layer."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.last = last

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.last(pixels.float().flatten(0, 1).flatten(1) / 32 - 4)


def run_on_xnnpack(module: nn.Module, x: torch.Tensor, path: Path) -> np.ndarray:
    """A module's output as XNNPACK computes it, all of it handed over."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(
        torch.export.export(module.eval(), (x,)),
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    path.write_bytes(edge.to_executorch().buffer)
    return ExecutorchProgram(path)("forward", x.numpy())


class TanhGelu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")


def test_gelu_by_tanh_is_not_one_by_erf(tmp_path: Path) -> None:
    x = torch.linspace(-4, 4, 4001)[None]
    wanted = F.gelu(x, approximate="tanh").numpy()
    with DelegatedForms():
        cured = run_on_xnnpack(TanhGelu(), x, tmp_path / "cured.pte")
    assert np.abs(cured - wanted).max() < 5e-6
    # The trap itself, so that the cure can go when it is no more.
    assert np.abs(run_on_xnnpack(TanhGelu(), x, tmp_path / "plain.pte") - wanted).max() > 1e-4


def test_an_encoder_with_the_wrong_gelu_is_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    through_the_gate(Encoder(TanhGelu()), tmp_path)
    monkeypatch.delitem(executorch_lowering.FORMS, F.gelu)  # type: ignore[arg-type]
    with pytest.raises(MobileMMError, match="conversion error"):
        through_the_gate(Encoder(TanhGelu()), tmp_path)


@pytest.mark.parametrize(("bits", "block", "columns"), [(4, 32, 80), (4, 128, 192), (8, 64, 48)])
def test_quantized_linears_are_what_they_say(bits: Any, block: int, columns: int, tmp_path: Path) -> None:
    """Weights alone in int4 or int8, with activations in floating point, come out as noise."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(32, columns, generator=generator), torch.randn(32, generator=generator)
    x = torch.randn(1, 7, columns, generator=generator)
    module = express(nn.Sequential(QuantizedLinear(quantize(weight, WeightScheme(bits, block)), bias)))
    wanted = module(x).numpy()
    lowered = lower(module, delegated=True)
    found = run_on_xnnpack(lowered, x, tmp_path / "linear.pte")
    assert snr_db(found, lowered(x).numpy()) > 35
    assert snr_db(found, wanted) > 30


def test_linears_with_weights_alone_are_no_export(tmp_path: Path) -> None:
    """As torchao quantizes them: their codes are taken for weights, and their scales dropped."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis

    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    through_the_gate(Encoder(QuantizedLinear(quantize(weight, WeightScheme(8, None)))), tmp_path, bits=8)
    linear = nn.Linear(64, 24, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(linear, IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)))
    with pytest.raises(MobileMMError, match="conversion error"):
        through_the_gate(Encoder(linear), tmp_path, bits=8)


def test_convolutions_left_in_floating_point_are_no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 8, 1)).eval()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    encoder = Pixels(net)
    assert executorch_convolutions.is_convolutional(encoder)
    pictures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    quantized = executorch_convolutions.quantize_convolutions(encoder, pictures)
    assert 25 < snr_db(quantized(pictures[:1]).numpy(), encoder(pictures[:1]).numpy()) < 60
    config = get_symmetric_quantization_config(is_per_channel=True)
    by_type = XNNPACKQuantizer().set_module_type(nn.Conv2d, config)
    monkeypatch.setattr(executorch_convolutions, "quantizer", lambda: by_type)
    with pytest.raises(MobileMMError, match="2 convolutions of the vision encoder stay in float32"):
        executorch_convolutions.quantize_convolutions(encoder, pictures)


class Pixels(nn.Module):
    """An encoder of pixels in uint8."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.net(pixels.float() / 64 - 2)


class Counter(nn.Module):
    """Adds up what it is given."""

    sum: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sum", torch.zeros(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sum.add_(x)
        return self.sum.clone()


class Passer(nn.Module):
    """Computes much, keeps nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.sin() + x.cos()).exp() @ x.outer(x)


def test_a_cache_in_the_arena_of_all_methods_is_no_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one method keeps is overwritten by another; `executable_of` gives such a program to nobody."""
    from executorch.exir import passes, to_edge
    from executorch.runtime import Runtime

    from mobilemm.export.targets.executorch_program import executable_of, write_program

    x = torch.arange(1.0, 65)

    def second_sum() -> float:
        programs = {
            "count": torch.export.export(Counter(), (x,)),
            "pass": torch.export.export(Passer(), (x,)),
        }
        edge = to_edge(programs)
        lowered = {name: edge.exported_program(name) for name in programs}
        write_program(executable_of(lowered, {}), tmp_path / "two.pte")
        program = Runtime.get().load_program(tmp_path / "two.pte")
        count, other = (program.load_method(name) for name in ("count", "pass"))
        count.execute([x])
        other.execute([x])
        return float(count.execute([x])[0][-1])

    assert second_sum() == 128
    whole = passes.MemoryPlanningPass
    monkeypatch.setattr(passes, "MemoryPlanningPass", lambda *, share_mutable_buffers, **rest: whole(**rest))
    with pytest.raises(MobileMMError, match="its cache lies where other methods compute"):
        second_sum()
    monkeypatch.setattr("mobilemm.export.targets.executorch_program.mutable_bytes", lambda program: 0)
    assert second_sum() != 128  # the trap itself


def test_methods_in_one_arena_leave_the_cache_alone(in_executorch: Bundle) -> None:
    """As `executorch.runtime` loads methods: intermediate values of one lie where another's are."""
    import executorch.extension.llm.custom_ops.custom_ops
    import executorch.kernels.quantized  # noqa: F401
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(in_executorch.part_path("decoder"))
    methods = {name: program.load_method(name) for name in ("text_decoder", "token_embedding")}
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 12, in_executorch.manifest.model.hidden_size, generator=generator)

    def last(disturbed: bool) -> np.ndarray:
        for index in range(12):
            (logits,) = methods["text_decoder"].execute([embeds[:, index : index + 1], torch.tensor([index])])
            if disturbed:
                methods["token_embedding"].execute([torch.arange(300)[None]])
        return logits.clone().numpy()

    assert snr_db(last(disturbed=True), last(disturbed=False)) > 100
