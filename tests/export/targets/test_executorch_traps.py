"""What ExecuTorch 1.5 gets wrong without a word, each cured: a test fails where its cure is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mobilemm.export.quantization import QuantizedLinear, WeightScheme
from mobilemm.export.quantizers import quantize
from mobilemm.runtime.backends.executorch import ExecutorchProgram
from mobilemm.runtime.bundle import Bundle
from mobilemm.runtime.self_check import snr_db

pytest.importorskip("executorch")

from mobilemm.export.targets.executorch_lowering import (
    DelegatedForms,
    express,
    lower,
)


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
