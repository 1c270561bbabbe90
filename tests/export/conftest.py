"""A tiny decoder with inputs as uneven as those of trained models; a tiny checkpoint and its bundles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from mobilemm.errors import MobileMMError
from mobilemm.export import verify
from mobilemm.export.assemble import Result, export_bundle
from mobilemm.export.decoder import Decoder
from mobilemm.export.decoder_spec import decoder_spec
from mobilemm.export.options import ExportOptions
from mobilemm.export.quantization import make_plan
from mobilemm.export.targets import find_target
from mobilemm.runtime.bundle import Bundle
from tests.export.tiny_checkpoint import write_checkpoint


@pytest.fixture
def tiny() -> tuple[Decoder, dict[str, Tensor], Tensor]:
    """A decoder of two layers on the meta device, its weights, and input embeddings (8, 48, 96)."""
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=120,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    spec = decoder_spec(config)
    with torch.device("meta"):
        decoder = Decoder(spec)
    generator = torch.Generator().manual_seed(5)
    weights: dict[str, Tensor] = {}
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 1:
            weights[name] = 0.5 + torch.rand(parameter.shape, generator=generator)
            weights[name][::11] *= 5
        else:
            weights[name] = (
                torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[1] ** 0.5
            )
    mixing = torch.randn(12, 96, generator=generator)
    embeddings = torch.randn(8, 48, 12, generator=generator) @ mixing
    return decoder, weights, embeddings + 0.2 * torch.randn(embeddings.shape, generator=generator)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal checkpoint of a few hundred kilobytes."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@dataclass(frozen=True)
class Exported:
    """A bundle, how it was asked for, and what was told meanwhile."""

    result: Result
    options: ExportOptions
    told: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return self.result.bundle.folder


@pytest.fixture(scope="session")
def in_full(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """`checkpoint` as an ONNX bundle in float32."""
    options = ExportOptions(plan=make_plan("fp32", vision="fp32"))
    folder = tmp_path_factory.mktemp("bundles") / "full"
    told: list[str] = []
    result = export_bundle(str(checkpoint), find_target("onnx"), folder, options, report=told.append)
    return Exported(result, options, tuple(told))


@pytest.fixture(scope="session")
def in_int4(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """With the language model in 4 bits, the encoder in 8: finished in a second run.

    In the first vision is held to a floor that nothing reaches; `told` is what both have said.
    """
    options = ExportOptions(plan=make_plan("int4", method="rtn", block_size=32))
    folder = tmp_path_factory.mktemp("bundles") / "int4"
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(verify.FLOORS, "vision", dict.fromkeys((4, 8, 16, 32), verify.Floor(150, 0.98)))  # type: ignore[arg-type]
        with pytest.raises(MobileMMError) as raised:
            export_bundle(str(checkpoint), find_target("onnx"), folder, options, report=told.append)
    told.append(f"error: {raised.value}")
    assert not folder.exists()
    result = export_bundle(str(checkpoint), find_target("onnx"), folder, options, report=told.append)
    return Exported(result, options, tuple(told))


@pytest.fixture(scope="session")
def in_executorch(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny checkpoint as an ExecuTorch bundle, the language model in 4 bits, the encoder in 8.

    Its vocabulary has 16 rows more than its tokenizer. Beside it lies `etrecord.bin`.
    """
    pytest.importorskip("executorch")
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "padded", padding=16)
    options = ExportOptions(plan=make_plan("int4", method="rtn", block_size=32))
    folder = tmp_path_factory.mktemp("bundles") / "executorch"
    target = find_target("executorch", etrecord=folder.with_name("etrecord.bin"))
    return export_bundle(str(checkpoint), target, folder, options).bundle


@pytest.fixture(scope="session")
def default_in_full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model as an ONNX bundle in float32, not verified. Only for slow tests."""
    options = ExportOptions(plan=make_plan("fp32", vision="fp32"), verify=False)
    folder = tmp_path_factory.mktemp("bundles") / "default"
    export_bundle(None, find_target("onnx"), folder, options)
    return folder
