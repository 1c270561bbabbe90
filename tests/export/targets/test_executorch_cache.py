"""Keys and values in int8 in an ExecuTorch program: a quarter of the memory, and nearly the same answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mobilemm.export.assemble import export_bundle
from mobilemm.export.options import ExportOptions
from mobilemm.export.quantization import make_plan
from mobilemm.export.targets import find_target
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import Bundle
from mobilemm.runtime.pte import read_pte
from mobilemm.runtime.self_check import self_check, snr_db
from tests.export.targets.executorch_judges import runner_and_session

pytest.importorskip("executorch")


@pytest.fixture(scope="module")
def in_int8(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`checkpoint` with weights and cache in int8."""
    options = ExportOptions(
        plan=make_plan("int8", vision="fp32", method="rtn"), context_length=256, int8_cache=True
    )
    folder = tmp_path_factory.mktemp("bundles") / "int8-cache"
    return export_bundle(checkpoint, find_target("executorch"), folder, options).bundle


def test_the_cache_is_a_quarter(in_int8: Bundle) -> None:
    with (in_int8.folder / "parts" / "model.pte").open("rb") as file:
        planned = read_pte(file)["text_decoder"].planned
    model = in_int8.manifest.model
    assert planned[2] == 2 * 2 * 256 * model.num_key_value_heads * model.head_dim
    report = json.loads((in_int8.folder / "parts" / "delegation.json").read_text())
    assert "llama.custom_quantized_sdpa" in report["text_decoder"]["portable"]


def test_it_answers_as_with_rounded_keys_and_values(in_int8: Bundle) -> None:
    parity = in_int8.manifest.parts["decoder"].parity
    assert parity is not None
    # Beside what PyTorch has rounded as well are activations and queries.
    assert parity.conversion_db > 20
    assert (parity.top1 or 0) > 0.95
    assert all(check.passed for check in self_check(in_int8, open_backend(in_int8)))


def test_in_pieces_as_in_one(in_int8: Bundle) -> None:
    backend = open_backend(in_int8)
    decoder, other = backend.decoder(), backend.decoder()
    embeds = np.random.default_rng(0).normal(0, 1, (1, 20, in_int8.manifest.model.hidden_size))
    whole = decoder.decode(embeds.astype(np.float32))
    other.decode(embeds[:, :7].astype(np.float32))
    assert snr_db(other.decode(embeds[:, 7:].astype(np.float32))[:, -1:], whole) > 40


def test_the_stock_runner_says_the_same(in_int8: Bundle) -> None:
    said, pieces = runner_and_session(in_int8)
    assert said == pieces
