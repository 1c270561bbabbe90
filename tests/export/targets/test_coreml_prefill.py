"""Several functions for several positions at once: the smallest that holds what is said is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from mobilemm.errors import MobileMMError
from mobilemm.export import mil_interpreter
from mobilemm.export.assemble import export_bundles
from mobilemm.export.decoder import Decoder, EagerCache
from mobilemm.export.decoder_spec import decoder_spec
from mobilemm.export.options import ExportOptions
from mobilemm.export.parts import CacheShape, Part
from mobilemm.export.quantization import make_plan
from mobilemm.export.targets import Exported, find_target
from mobilemm.export.targets.coreml import CoreMLOptions, CoreMLTarget
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.backends.coreml import CoreMLDecoder, _InterpretedPackage
from mobilemm.runtime.bundle import open_bundle
from mobilemm.runtime.self_check import self_check, snr_db

pytest.importorskip("coremltools")

LENGTHS, CONTEXT, WIDTH = (32, 8), 64, 64


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Part, Exported, Path]:
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        max_position_embeddings=CONTEXT,
    )
    torch.manual_seed(0)
    decoder = Decoder(decoder_spec(config)).requires_grad_(False).eval()
    part = Part("decoder", decoder, {}, ("logits",), cache=CacheShape(2, 1, 32))
    folder = tmp_path_factory.mktemp("several")
    return decoder, part, CoreMLTarget(CoreMLOptions(prefill=LENGTHS)).write(part, decoder, folder), folder


def embeddings(count: int) -> Tensor:
    return torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_every_function_is_verified(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are run, and give what PyTorch gives."""
    decoder, part, exported, folder = written
    ran = []
    original = mil_interpreter.Model.__call__

    def watched(self: Any, inputs: Any, function: Any = None, state: Any = None) -> Any:
        ran.append(function)
        return original(self, inputs, function, state)

    monkeypatch.setattr(mil_interpreter.Model, "__call__", watched)
    embeds = embeddings(CONTEXT)
    found = CoreMLTarget().run(part, exported, folder, {"inputs_embeds": embeds.numpy()})
    assert snr_db(found, decoder(embeds, EagerCache()).numpy()) > 40
    assert set(ran) == {"decode", "prefill_8", "prefill_32"}


@torch.no_grad()
def test_weights_are_shared_by_all(written: Any) -> None:
    decoder, _, exported, folder = written
    size = (folder / exported.file / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    weights = 2 * sum(parameter.numel() for parameter in decoder.parameters())
    assert size < weights + 2 * CONTEXT * 16 * 2 + 8192


class Watched(_InterpretedPackage):
    """Notes which functions ran."""

    def run(self, inputs: Any, function: str | None, state: Any) -> dict[str, Any]:
        self.ran = [*getattr(self, "ran", []), function]
        return super().run(inputs, function, state)


@pytest.mark.parametrize(
    ("turns", "functions"),
    [
        ((7,), ["prefill_8"]),
        ((9,), ["prefill_32"]),
        ((40,), ["prefill_32", "prefill_8"]),
        ((45,), ["prefill_32", "prefill_32"]),
        ((3, 20), [*["decode"] * 3, "prefill_32"]),
        ((45, 7), ["prefill_32", "prefill_32", "prefill_8"]),
        ((60, 4), ["prefill_32", *["prefill_32"], *["decode"] * 4]),
        ((50, 12), ["prefill_32", "prefill_32", "prefill_8", *["decode"] * 4]),
    ],
)
@torch.no_grad()
def test_the_smallest_that_fits_is_taken(written: Any, turns: tuple[int, ...], functions: list[str]) -> None:
    decoder, _, exported, folder = written
    package = Watched(folder / exported.file, None)
    taken = CoreMLDecoder(package, CONTEXT, folder)
    embeds = embeddings(sum(turns))
    found = [taken.decode(rows.numpy())[0, -1] for rows in embeds.split(turns, 1)]
    wanted = decoder(embeds, EagerCache())[0, np.cumsum(turns) - 1].numpy()
    for one, other in zip(found, wanted, strict=True):
        assert snr_db(one, other) > 40
    assert package.ran == functions


def test_a_bundle_of_several_is_whole(checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(plan=make_plan("int4", method="rtn", block_size=32))
    places = [(find_target("coreml", prefill=[64, 16]), tmp_path / "bundle")]
    (result,) = export_bundles(str(checkpoint), places, options)
    bundle = open_bundle(result.bundle.folder)
    for check in self_check(bundle, open_backend(bundle)):
        assert check.passed, check.text


def test_lengths_and_their_names() -> None:
    assert CoreMLOptions().prefill_functions == {"prefill": 64}
    assert CoreMLOptions(prefill=[128]).prefill_functions == {"prefill": 128}
    assert CoreMLOptions(prefill=[128, 16, 128]).prefill_functions == {"prefill_16": 16, "prefill_128": 128}
    with pytest.raises(MobileMMError, match="--prefill-length: 9 lengths; choose 8 at most"):
        CoreMLOptions(prefill=range(2, 11))
