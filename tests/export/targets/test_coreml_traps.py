"""What coremltools converts without a word and wrongly: right with our cures, and stopped without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from mobilemm.errors import MobileMMError
from mobilemm.export import verify
from mobilemm.export.decoder import Decoder, RMSNorm
from mobilemm.export.decoder_spec import decoder_spec
from mobilemm.export.parts import CacheShape, Part
from mobilemm.export.quantization import QuantizedLinear, WeightScheme
from mobilemm.export.quantizers import quantize
from mobilemm.export.targets import coreml, coreml_lowering
from mobilemm.export.targets.coreml import CoreMLTarget
from mobilemm.export.targets.coreml_lowering import StateCache
from mobilemm.export.targets.coreml_package import read_spec

ct = pytest.importorskip("coremltools")


def passes_the_gate(module: nn.Module, x: Tensor, folder: Path, wanted: Tensor | None = None) -> bool:
    """Whether an export with such a part goes on, as the pipeline decides it: by what PyTorch gives."""
    part = Part("vision", module.eval(), {"x": x}, ("y",))
    target = CoreMLTarget()
    exported = target.write(part, part.module, folder)
    found = target.run(part, exported, folder, {"x": x.numpy()})
    with torch.no_grad():
        reference = (module(x) if wanted is None else wanted).numpy()
    try:
        parity = verify.measure(found, reference, reference, bits=16)
        verify.check("vision", 16, parity, half=True)
    except MobileMMError:
        return False
    return True


def uneven_rows() -> Tensor:
    """(1, 4, 64): a row of zeros, as padding is, a small one, a usual one, and one with an outlier."""
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    rows[0] = 0
    rows[1] *= 1e-2
    rows[3, 5] = 900.0
    return rows[None]


class Normed(nn.Module):
    """A norm whose rows count alike, however large."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class WrittenOut(Qwen2RMSNorm):
    """The same under a name that is not recognized."""


class Angles(nn.Module):
    """Cosines of positions times frequencies, as rotary positions and timesteps are embedded."""

    def forward(self, x: Tensor) -> Tensor:
        frequencies = 10_000 ** (-torch.arange(0, 16) / 16)
        angles = x[..., None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)


class TanhGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.square()
        return torch.cat([torch.add(x, y, alpha=2), torch.sub(x, y, alpha=0.5), torch.rsub(x, y, alpha=3)])


def original_norm(norm: Any, layout: str) -> nn.Module:
    return norm


def nothing_keeps(op: Any) -> bool:
    return False


def by_export(module: nn.Module, inputs: tuple[Tensor, ...], check_trace: bool) -> Any:
    """A graph from coremltools' other front end, which reads no arguments that are given by keyword."""
    return torch.export.export(module, inputs).run_decompositions({})


def test_norms_hold_for_zeros_small_rows_and_outliers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Normed(RMSNorm(64, 1e-5))
    assert passes_the_gate(module, uneven_rows(), tmp_path)
    monkeypatch.setattr(coreml_lowering, "rms_norm", original_norm)
    assert not passes_the_gate(module, uneven_rows(), tmp_path)


def test_norms_written_out_hold_for_outliers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own, in encoders: both ways of holding them, and neither."""
    known, unknown = Normed(Qwen2RMSNorm(64, 1e-5)), Normed(WrittenOut(64, 1e-5))
    assert passes_the_gate(known, uneven_rows(), tmp_path)
    assert passes_the_gate(unknown, uneven_rows(), tmp_path)
    monkeypatch.setattr(coreml, "keeps_float32", nothing_keeps)
    assert passes_the_gate(known, uneven_rows(), tmp_path)
    assert not passes_the_gate(unknown, uneven_rows(), tmp_path)


def test_angles_keep_their_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = torch.tensor([[3.0, 999.0, 1501.0, 2047.0]])
    assert passes_the_gate(Angles(), positions, tmp_path)
    monkeypatch.setattr(coreml, "keeps_float32", nothing_keeps)
    assert not passes_the_gate(Angles(), positions, tmp_path)


@pytest.mark.parametrize("module", [TanhGelu(), Scaled()])
def test_arguments_by_keyword_are_not_lost(
    module: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.linspace(-3.5, -1.5, 64).view(1, 64)  # where the two kinds of GELU are a hundredth apart
    assert passes_the_gate(module, x, tmp_path)
    monkeypatch.setattr(torch.jit, "trace", by_export)
    assert not passes_the_gate(module, x, tmp_path)


# --- the decoder's cache and tables -------------------------------------------------------------------------


def tiny_decoder() -> tuple[Decoder, Part]:
    """One layer, its layers in int4."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    decoder = Decoder(decoder_spec(config)).requires_grad_(False)
    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.Linear):
            weight = quantize(module.weight, WeightScheme(4, 32, True, "rtn"), name)
            decoder.set_submodule(name, QuantizedLinear(weight))
    inputs = {"inputs_embeds": torch.zeros(1, 3, 64)}
    return decoder, Part("decoder", decoder, inputs, ("logits",), cache=CacheShape(1, 1, 32))


def write(folder: Path) -> Path:
    decoder, part = tiny_decoder()
    return folder / CoreMLTarget().write(part, decoder, folder).file


def test_states_that_became_constants_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml, "STATES", ())
    with pytest.raises(MobileMMError, match=r"has kept states \[\] and 0 writes into them"):
        write(tmp_path)


def into_a_copy(self: Any, name: str, layer: int, new: Tensor) -> Tensor:
    state = getattr(self.step, name).clone()
    state[layer : layer + 1, :, self.start : self.start + self.step.length] = new
    return state[layer : layer + 1].half()


def test_updates_that_were_lost_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StateCache, "_append", into_a_copy)
    with pytest.raises(
        MobileMMError, match=r"and 0 writes into them, where k_cache, v_cache and 2 are wanted"
    ):
        write(tmp_path)


def test_tables_of_positions_are_not_quantized(tmp_path: Path) -> None:
    """And every layer is, in both functions, which read the same bytes."""
    package = write(tmp_path)
    spec = read_spec(package)
    offsets = {}
    for function in ("prefill", "decode"):
        (block,) = spec.mlProgram.functions[function].block_specializations.values()
        for operation in block.operations:
            name = operation.outputs[0].name if operation.outputs else ""
            if operation.type == "constexpr_blockwise_shift_scale":
                layer = name.split("_weight")[0]
                assert not layer.startswith("rope")
                offsets.setdefault(layer, set()).add(blob_of(block, operation))
    assert set(offsets) == {
        "lm_head",
        *(f"layers_0_{layer}" for layer in ("qkv", "o", "gate", "up", "down")),
    }
    assert all(len(places) == 1 for places in offsets.values())
    # Codes once, tables of cosines and sines in float16 once, what stands for epsilon, and little more.
    codes = sum(
        module.quantized.nbytes
        for module in tiny_decoder()[0].modules()
        if isinstance(module, QuantizedLinear)
    )
    assert (package / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size < codes + 64 * 32 * 2 + 8192


def blob_of(block: Any, operation: Any) -> int:
    """Where in weight.bin an operation's codes lie."""
    argument = operation.inputs["data"].arguments[0]
    if argument.WhichOneof("binding") == "value":
        return int(argument.value.blobFileValue.offset)
    const = next(one for one in block.operations if one.outputs and one.outputs[0].name == argument.name)
    return int(const.attributes["val"].blobFileValue.offset)
