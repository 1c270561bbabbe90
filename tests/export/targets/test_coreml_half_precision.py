"""Where float16 goes wrong without a word: right with our cures, and stopped or shown wrong without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

from mobilemm.errors import MobileMMError
from mobilemm.export import mil_interpreter, verify
from mobilemm.export.decoder import Decoder, EagerCache, RMSNorm
from mobilemm.export.decoder_spec import RopeTable, decoder_spec
from mobilemm.export.parts import CacheShape, Part
from mobilemm.export.quantization import QuantizedLinear, WeightScheme
from mobilemm.export.quantizers import quantize
from mobilemm.export.targets import coreml, coreml_lowering
from mobilemm.export.targets.coreml import CoreMLOptions, CoreMLTarget
from mobilemm.export.targets.coreml_package import SPEC_FILE, read_spec
from mobilemm.export.targets.coreml_weights import Weight
from mobilemm.runtime.self_check import snr_db

ct = pytest.importorskip("coremltools")

LENGTH = 160  # as many positions as an export is verified on
SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)


def tiny_decoder() -> Decoder:
    """Two layers in int4; norms with weights of their own."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    decoder = Decoder(decoder_spec(config)).requires_grad_(False)
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.Linear):
            matrix = torch.randn(module.weight.shape) * 2 / module.in_features**0.5
            decoder.set_submodule(name, QuantizedLinear(quantize(matrix, WeightScheme(4, 32), name)))
        elif hasattr(module, "weight"):
            module.weight.copy_(torch.rand_like(module.weight) + 0.5)
    return decoder.eval()


def embeddings() -> Tensor:
    """(1, LENGTH, 64), among them a row of zeros, a small one, and one with an outlier."""
    embeds = torch.randn(1, LENGTH, 64, generator=torch.Generator().manual_seed(1))
    embeds[0, 3] = 0
    embeds[0, 5] *= 1e-2
    embeds[0, 70:90, 7] = 900.0
    return embeds


@torch.no_grad()
def passes_the_gate(embeds: Tensor, folder: Path, layout: Any = "gpu") -> bool:
    """Whether the export of a decoder goes on, as the pipeline decides it."""
    decoder = tiny_decoder()
    part = Part("decoder", decoder, {}, ("logits",), cache=CacheShape(2, 1, 32))
    target = CoreMLTarget(CoreMLOptions(layout=layout))
    wanted = decoder(embeds, EagerCache()).numpy()
    try:
        exported = target.write(part, decoder, folder)
        found = target.run(part, exported, folder, {"inputs_embeds": embeds.numpy()})
        verify.check("decoder", 4, verify.measure(found, wanted, wanted, bits=4, logits=True), half=True)
    except MobileMMError:
        return False
    return True


class WrittenOut(nn.Module):
    """A norm as its formula has it."""

    def __init__(self, weight: Tensor, eps: float, dimension: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.eps, self.dimension = eps, dimension

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.dimension == -1 else self.weight[:, None, None]
        eps = torch.tensor(self.eps, dtype=x.dtype)
        return x * torch.rsqrt((x * x).mean(self.dimension, keepdim=True) + eps) * weight


@pytest.mark.parametrize(
    ("layout", "kind", "dimension"), [("gpu", "_LastDimensionNorm", -1), ("ane", "_ChannelNorm", 1)]
)
def test_norms_of_a_decoder_hold_for_outliers(
    layout: str, kind: str, dimension: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert passes_the_gate(embeddings(), tmp_path, layout)
    monkeypatch.setattr(coreml_lowering, kind, lambda weight, eps: WrittenOut(weight, eps, dimension))
    assert not passes_the_gate(embeddings(), tmp_path, layout)


def phases_in_float16(table: RopeTable, length: int) -> tuple[Tensor, Tensor]:
    """As a graph in float16 computes them."""
    positions = torch.arange(length, dtype=torch.float16)
    angles = torch.outer(positions, table.inverse_frequencies.half())
    return angles.cos(), angles.sin()


@torch.no_grad()
def test_rotary_phases_are_exact_far_into_a_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Further than an export is verified: in float16 all is well up to a few hundred positions."""
    decoder, chunk = tiny_decoder(), 512
    embeds = torch.randn(1, 2048, 64, generator=torch.Generator().manual_seed(1))
    wanted = decoder(embeds, EagerCache())[0, chunk - 1 :: chunk].numpy()
    part = Part("decoder", decoder, {}, ("logits",), cache=CacheShape(2, 1, 32))
    target = CoreMLTarget(CoreMLOptions(prefill=chunk))

    def decibels() -> list[float]:
        model = mil_interpreter.load(tmp_path / target.write(part, decoder, tmp_path).file)
        state, found = model.make_state(), []
        for start in range(0, 2048, chunk):
            inputs = {
                "inputs_embeds": embeds[:, start : start + chunk].half().numpy(),
                "position_ids": np.arange(start, start + chunk, dtype=np.int32)[None],
                "last_index": np.array([chunk - 1], np.int32),
            }
            found.append(model(inputs, "prefill", state)["logits"].astype(np.float32))
        return [snr_db(one.reshape(-1), other) for one, other in zip(found, wanted, strict=True)]

    exact = decibels()
    assert min(exact) > 40
    monkeypatch.setattr(coreml_lowering, "rotary_values", phases_in_float16)
    with pytest.raises(MobileMMError, match="phases of its rotary"):
        decibels()
    monkeypatch.setattr(coreml, "require_rotary", lambda package, tables: None)
    assert decibels()[-1] < exact[-1] - 15


def test_rotary_tables_in_codes_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """coremltools quantizes every large constant, these among them; what is written here is float16."""

    def in_codes(name: str, values: Tensor) -> Weight:
        return Weight(name, quantize(values.float(), WeightScheme(4, None), name))

    monkeypatch.setattr(coreml_lowering, "Weight", in_codes)
    assert not passes_the_gate(embeddings(), tmp_path)


# --- epsilons that float16 holds as subnormal numbers -------------------------------------------------------


class PlainLayerNorm(nn.Module):
    """The norm with an epsilon of its own."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight.clone(), requires_grad=False), eps

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        normed = F.layer_norm(torch.cat([x, -x], -1), (2 * size,), eps=self.eps)
        return normed[..., :size] * self.weight


def flush_subnormals(package: Path) -> int:
    """Makes zeros of float16 numbers in the program that are subnormal; how many there were."""
    spec, count = read_spec(package), 0
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for operation in block.operations:
                arguments = [one for each in operation.inputs.values() for one in each.arguments]
                values = [one.value for one in arguments if one.WhichOneof("binding") == "value"]
                for value in (*values, *operation.attributes.values()):
                    if value.type.tensorType.dataType != 10 or value.WhichOneof("value") != "immediateValue":
                        continue
                    stored = value.immediateValue.tensor.bytes
                    numbers = np.frombuffer(stored.values, np.float16).copy()
                    small = (numbers != 0) & (np.abs(numbers) < SMALLEST_NORMAL)
                    numbers[small] = 0
                    stored.values = numbers.tobytes()
                    count += int(small.sum())
    (package / SPEC_FILE).write_bytes(spec.SerializeToString())
    return count


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@torch.no_grad()
def test_rows_of_zeros_hold_where_subnormals_are_flushed(
    eps: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    rows[0, 0] = 0
    rows[0, 1] *= 2 * eps**0.5  # epsilon is a fifth of its mean square
    module = nn.Sequential(RMSNorm(64, eps)).eval()
    module[0].weight.copy_(torch.rand(64) + 0.5)
    part = Part("vision", module, {"x": rows}, ("y",))
    target = CoreMLTarget()

    def found() -> Any:
        exported = target.write(part, module, tmp_path)
        flushed = flush_subnormals(tmp_path / exported.file)
        return flushed, target.run(part, exported, tmp_path, {"x": rows.numpy()})

    wanted = module(rows).numpy()
    flushed, ours = found()
    assert flushed == 0
    assert not ours[0, 0].any()
    for row in (1, 2, 3):
        assert snr_db(ours[0, row], wanted[0, row]) > 50
    monkeypatch.setattr(coreml_lowering, "_LastDimensionNorm", PlainLayerNorm)
    flushed, plain = found()
    assert flushed == 1
    assert not np.isfinite(plain[0, 0]).any()
    assert snr_db(plain[0, 1], wanted[0, 1]) < 30


# --- layers that coremltools leaves out ---------------------------------------------------------------------


def test_rows_that_blocks_do_not_fill_are_quantized_too(tmp_path: Path) -> None:
    """coremltools leaves such layers in float16 and goes on."""
    torch.manual_seed(0)
    linears = nn.Sequential(nn.Linear(96, 80), nn.Linear(80, 96)).requires_grad_(False).eval()
    part = Part("vision", linears, {"x": torch.zeros(1, 4, 96)}, ("y",))
    target = CoreMLTarget()
    plain = target.write(part, linears, tmp_path)
    config = ct.optimize.coreml.OptimizationConfig(
        ct.optimize.coreml.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=32, weight_threshold=0
        )
    )
    model = ct.models.MLModel(str(tmp_path / plain.file), skip_model_load=True)
    theirs = ct.optimize.coreml.linear_quantize_weights(model, config).get_spec()
    codes = nn.Sequential(
        *(QuantizedLinear(quantize(one.weight, WeightScheme(4, 32), "x"), one.bias) for one in linears)
    )
    ours = read_spec(tmp_path / target.write(part, codes.eval(), tmp_path).file)
    assert (quantized_layers(theirs), quantized_layers(ours)) == (1, 2)


def quantized_layers(spec: Any) -> int:
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    return sum(operation.type.startswith("constexpr_") for operation in block.operations)
