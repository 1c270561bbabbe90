"""A tiny model as an ExecuTorch program: its parts' forms, its methods, the session, and the stock runner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mobilemm.errors import MobileMMError
from mobilemm.export.decoder import ResidualNorm, RMSNorm
from mobilemm.export.quantization import QuantizedEmbedding, QuantizedLinear, WeightScheme, make_plan
from mobilemm.export.quantizers import quantize
from mobilemm.export.targets import find_target
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import Bundle, open_bundle
from mobilemm.runtime.pte import read_pte
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.self_check import self_check, snr_db
from mobilemm.runtime.session import Session
from tests.export.targets.executorch_judges import delegation_is_executed, runner_and_session

pytest.importorskip("executorch")

from mobilemm.export.targets.executorch_decoder import output_rows
from mobilemm.export.targets.executorch_lowering import (
    DelegatedForms,
    express,
    expressible,
    lower,
)
from mobilemm.export.targets.executorch_program import copied

# --- forms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: nn.GELU(approximate="tanh")(x),
        lambda x: F.gelu(x),
        lambda x: F.scaled_dot_product_attention(x, 2 * x, x + 1, scale=0.3),
        lambda x: F.scaled_dot_product_attention(x, x, x, torch.eye(6).bool().logical_not()),
        lambda x: F.scaled_dot_product_attention(x, x, x, torch.linspace(-3, 3, 36).view(6, 6)),
    ],
)
def test_functions_are_the_same_in_other_forms(compute: Any) -> None:
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0)) * 3
    with DelegatedForms():
        found = compute(x)
    torch.testing.assert_close(found, compute(x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(24, 1e-6), nn.LayerNorm(24, bias=False), RMSNorm(24, 1e-5), LlamaRMSNorm(24, 1e-5)],
)
def test_norms_are_the_same_in_other_forms(norm: nn.Module) -> None:
    for parameter in norm.parameters():
        nn.init.uniform_(parameter.requires_grad_(False), 0.5, 2)
    x = torch.randn(2, 5, 24) * 4 + 3
    lowered = lower(nn.Sequential(norm), delegated=True)
    assert type(lowered[0]) is not type(norm)
    torch.testing.assert_close(lowered(x), norm(x), atol=1e-5, rtol=1e-5)
    if isinstance(norm, nn.LayerNorm):  # whose output what follows may view in other shapes
        assert lowered(x.transpose(0, 1)).is_contiguous()


def test_norm_over_channels_is_the_same_in_another_form() -> None:
    norm = LayerNorm2d(24)
    nn.init.uniform_(norm.weight.requires_grad_(False), 0.5, 2)
    x = torch.randn(2, 24, 3, 5) + 3
    torch.testing.assert_close(lower(nn.Sequential(norm), delegated=True)(x), norm(x), atol=1e-5, rtol=1e-5)


def test_residual_norm_is_the_same_in_another_form() -> None:
    norm = ResidualNorm(24, 1e-5)
    lowered = lower(nn.ModuleList([norm]), delegated=True)[0]
    x, residual = torch.randn(2, 1, 5, 24)
    for given in (residual, None):
        for found, wanted in zip(lowered(x, given), norm(x, given), strict=True):
            torch.testing.assert_close(found, wanted)


# --- weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "block", "columns", "group"),
    [
        (4, 128, 576, 64),
        (4, 32, 96, 32),
        (4, 128, 64, 32),
        (4, 128, 200, 32),
        (4, None, 96, 32),
        (8, 128, 576, 576),
    ],
)
def test_weights_are_nearly_the_plans(bits: Any, block: int | None, columns: int, group: int) -> None:
    weight = torch.randn(48, columns, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    planned = quantize(weight, WeightScheme(bits, block))
    assert (planned.scales < 0).any()
    found = expressible(planned)
    assert found.block_size == group
    assert (found.scales > 0).all()
    if bits == 4:
        assert torch.equal(found.scales, found.scales.bfloat16().float())
    # Positive scales in bfloat16, or codes rounded once more, cost little beside what 4 bits cost.
    reached, before = (snr_db(one.dequantize().numpy(), weight.numpy()) for one in (found, planned))
    assert reached > (before - 1.2 if bits == 4 else 38)
    assert (found.dequantize()[3] == 0).all()


def test_positive_scales_change_nothing_but_their_own_rounding() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    planned = quantize(weight, WeightScheme(4, 32))
    found = expressible(planned)
    kept = planned.scales > 0
    assert kept.any()
    codes = planned.codes()[kept]
    assert torch.equal(found.codes()[kept], codes)


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_rows_of_a_layer_have_memory_of_their_own(bits: Any) -> None:
    """XNNPACK writes out the whole memory that a tensor lies in, whatever part of it the tensor is."""
    linear: nn.Module = nn.Linear(64, 48)
    if bits < 32:
        linear = QuantizedLinear(expressible(quantize(torch.randn(48, 64), WeightScheme(bits, 32))))
    lowered = lower(nn.Sequential(output_rows(linear, slice(16, 32))), delegated=True).eval()
    x = torch.randn(1, 5, 64)
    program = torch.export.export(lowered, (x,))
    for tensor in copied(program).state_dict.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    wanted = linear(x)[..., 16:32]
    assert snr_db(lowered(x).detach().numpy(), wanted.detach().numpy()) > 25


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (WeightScheme(4, 32, symmetric=False), "leave --asymmetric out"),
        (WeightScheme(4, 16), "--block-size 32"),
        (WeightScheme(6, 128), "choose int4 or int8"),
    ],
)
def test_weights_that_cannot_be_expressed(scheme: WeightScheme, message: str) -> None:
    linear = QuantizedLinear(quantize(torch.randn(8, 64), scheme))
    with pytest.raises(MobileMMError, match=message):
        express(nn.Sequential(linear))


def test_groups_are_small_unless_asked_otherwise() -> None:
    target = find_target("executorch")
    for asked, stored in ((None, 32), (128, 128), (64, 64)):
        plan = target.stores(make_plan("int4", block_size=asked)).part("decoder")
        assert plan.default.block_size == stored
    assert target.stores(make_plan("int8")).part("decoder").default.block_size is None


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, 128), (8, None)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_embedding_is_the_plans(bits: Any, block: int | None, symmetric: bool) -> None:
    table = torch.randn(30, 96, generator=torch.Generator().manual_seed(0))
    embedding = QuantizedEmbedding(quantize(table, WeightScheme(bits, block, symmetric)))
    lowered = lower(nn.Sequential(embedding), delegated=True)
    ids = torch.tensor([[3, 0, 29, 7]])
    torch.testing.assert_close(lowered(ids), embedding(ids), atol=1e-6, rtol=1e-6)


# --- the bundle -------------------------------------------------------------------------------------------


def test_methods_and_constants(in_executorch: Bundle) -> None:
    with (in_executorch.folder / "parts" / "model.pte").open("rb") as file:
        methods = read_pte(file)
    model = in_executorch.manifest.model
    constants = {name: one.outputs for name, one in methods.items() if not one.instructions}
    assert constants == {
        "get_max_seq_len": (512,),
        "get_max_context_len": (512,),
        "get_vocab_size": (model.vocab_size,),
        "get_bos_id": (1,),
        "get_eos_id": (2,),
        "get_eos_ids": (2,),
        "use_kv_cache": (True,),
        "use_sdpa_with_kv_cache": (True,),
        "enable_dynamic_shape": (True,),
        "image_placeholder_id": (model.image_token_id,),
    }
    assert methods.keys() - constants.keys() == {"vision_encoder", "token_embedding", "text_decoder"}
    # Keys and values of two layers lie in a memory of their own, which all methods know.
    cache = 2 * 2 * 512 * model.num_key_value_heads * model.head_dim * 4
    assert {methods[name].planned[2] for name in methods.keys() - constants.keys()} == {cache}


def test_it_proves_itself(in_executorch: Bundle) -> None:
    checks = list(self_check(open_bundle(in_executorch.folder), open_backend(in_executorch)))
    assert [check.part for check in checks] == ["decoder", "embed", "vision", "conversation"]
    assert all(check.passed for check in checks), [check.text for check in checks]


def test_in_pieces_as_in_one(in_executorch: Bundle) -> None:
    backend = open_backend(in_executorch)
    decoder, other = backend.decoder(), backend.decoder()
    rng = np.random.default_rng(0)
    embeds = rng.normal(0, 1, (1, 20, in_executorch.manifest.model.hidden_size)).astype(np.float32)
    whole = decoder.decode(embeds)
    pieces = np.concatenate(
        [other.decode(embeds[:, :7], logits_positions=np.arange(7)), other.decode(embeds[:, 7:])], 1
    )
    assert pieces.shape == (1, 8, in_executorch.manifest.model.vocab_size)
    assert snr_db(pieces[:, -1:], whole) > 60
    other.truncate(12)
    again = other.decode(embeds[:, 12:], logits_positions=np.array([-1, 0]))
    assert snr_db(again[:, :1], whole) > 60
    assert other.length == 20
    # Each decoder has keys and values of its own.
    assert snr_db(decoder.decode(embeds[:, :1]), other.decode(embeds[:, :1])) > 60
    with pytest.raises(MobileMMError, match="520 positions are more than this model's context of 512"):
        decoder.decode(np.zeros((1, 499, embeds.shape[2]), np.float32))
    assert decoder.length == 21


def test_the_stock_runner_says_the_same(in_executorch: Bundle) -> None:
    """The vocabulary's tail scores best throughout, and neither of them ever says it."""
    said, pieces = runner_and_session(in_executorch)
    assert said == pieces
    assert len(set(pieces)) > 3


def test_the_vocabularys_tail_would_be_said(in_executorch: Bundle) -> None:
    """Without the cure our session says what has no text, and the runner never does."""
    session = Session(in_executorch, open_backend(in_executorch), Sampling(max_new_tokens=4))
    known = session.tokenizer.size
    assert known == in_executorch.manifest.model.vocab_size - 16
    session.tokenizer.size += 16
    session.reply("What?")
    assert max(session.answer_ids) >= known


def test_delegation_is_told(in_executorch: Bundle) -> None:
    report = json.loads((in_executorch.folder / "parts" / "delegation.json").read_text())
    decoder = report["text_decoder"]
    assert decoder["portable"].keys() == {
        "llama.update_cache",
        "llama.custom_sdpa",
        "aten.slice_copy",
        "aten.select_copy",
    }
    assert decoder["backends"].keys() == {"XnnpackBackend", "llm kernels", "portable"}
    assert decoder["backends"]["llm kernels"]["operators"] == 6
    # In front of the first attention, between it and the second, behind that, and the head.
    assert decoder["delegates"] == 4
    assert report["vision_encoder"]["backends"]["XnnpackBackend"]["flops"] > 1e6


def test_delegation_is_what_is_executed(in_executorch: Bundle, tmp_path: Path) -> None:
    events = delegation_is_executed(in_executorch, tmp_path)
    # Seven products of two layers, queries, keys and values apart, and the head: all of them in 4 bits.
    assert sum(count for event, count in events.items() if "QB4W" in event) == 2 * 7 + 1


def test_an_etrecord_is_made_beside_the_bundle(in_executorch: Bundle) -> None:
    from executorch.devtools.etrecord import parse_etrecord

    record = parse_etrecord(str(in_executorch.folder.with_name("etrecord.bin")))
    assert record.edge_dialect_program is not None
    assert {"text_decoder", "vision_encoder", "token_embedding"} <= set(record._debug_handle_map)
    assert not any("etrecord" in file.path for file in in_executorch.manifest.files)


def test_vision_features_are_those_of_the_checkpoint(in_executorch: Bundle) -> None:
    parity = in_executorch.manifest.parts["vision"].parity
    assert parity is not None
    assert parity.conversion_db > 30
