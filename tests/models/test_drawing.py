"""Signal tokens and output projectors: what a model that draws has more than others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import mobilemm
from mobilemm.errors import MobileMMError
from mobilemm.models import MobileMMConfig
from mobilemm.models.checkpoints import save
from mobilemm.models.drawing import learn_to_draw
from mobilemm.models.output_projector import build_output_projector
from tests.export.tiny_checkpoint import write_checkpoint

REQUEST = [{"role": "user", "content": "What is this"}]
DRAWN = {"role": "assistant", "content": [{"type": "drawing", "caption": "cat"}]}
PROJECTOR = {"type": "mlp", "num_tokens": 3, "width": 16, "hidden": 8}


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_draws_says_all_else_as_before(tmp_path: Path, tied: bool) -> None:
    folder = write_checkpoint(tmp_path / "plain", tied=tied)
    model, processor = mobilemm.load(folder)
    ids = torch.tensor([processor.encode_for_training([*REQUEST, {"role": "assistant", "content": "is"}])[0]])
    before = model(input_ids=ids).logits
    learn_to_draw(model, processor, 4, PROJECTOR)
    vocabulary = model.config.text_config.vocab_size
    signals = model.config.signal_token_ids
    assert signals == list(range(vocabulary, vocabulary + 4))
    assert model.config.image_token_id == processor.image_token_id == signals[-1] + 1
    after = model(input_ids=ids, output_hidden_states=True)
    assert torch.equal(after.logits[..., :vocabulary], before)
    rows = model.signal_tokens.rows if tied else model.signal_tokens.head_rows
    torch.testing.assert_close(after.logits[..., vocabulary:], after.hidden_states[-1] @ rows.T)
    assert model(input_ids=ids).hidden_states is None
    with pytest.raises(MobileMMError, match="signal tokens already"):
        learn_to_draw(model, processor, 4, PROJECTOR)


def test_drawings_are_signal_tokens_that_are_learned(tmp_path: Path) -> None:
    model, processor = mobilemm.load(write_checkpoint(tmp_path / "plain"))
    with pytest.raises(MobileMMError, match="draws nothing"):
        processor.encode_for_training([*REQUEST, DRAWN])
    learn_to_draw(model, processor, 3, PROJECTOR)
    ids, labels = processor.encode_for_training([*REQUEST, DRAWN])
    signals = model.config.signal_token_ids
    first = ids.index(signals[0])
    assert ids[first : first + 3] == labels[first : first + 3] == signals
    row = torch.tensor([ids])
    hidden = model(input_ids=row, output_hidden_states=True).hidden_states[-1]
    states = model.signal_states(row, hidden)
    assert torch.equal(states[0], hidden[0, first : first + 3])
    assert model.output_projector(states).shape == (1, 3, 16)
    with pytest.raises(MobileMMError, match="in groups of 3"):
        model.signal_states(row[:, : first + 2], hidden[:, : first + 2])


def test_only_signal_rows_get_a_gradient_from_a_signal(tmp_path: Path) -> None:
    model, processor = mobilemm.load(write_checkpoint(tmp_path / "plain"))
    learn_to_draw(model, processor, 2, PROJECTOR)
    model.requires_grad_(False)
    model.signal_tokens.requires_grad_(True)
    ids, labels = processor.encode_for_training([*REQUEST, DRAWN])
    model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
    assert {name for name, value in model.named_parameters() if value.grad is not None} == {
        "signal_tokens.rows",
        "signal_tokens.head_rows",
    }
    assert all(float(value.grad.abs().sum()) > 0 for value in model.signal_tokens.parameters())


def test_a_drawing_model_survives_its_folder(tmp_path: Path) -> None:
    model, processor = mobilemm.load(write_checkpoint(tmp_path / "plain"))
    learn_to_draw(model, processor, 4, PROJECTOR)
    save(model, tmp_path / "drawer", processor)
    again, its_processor = mobilemm.load(tmp_path / "drawer")
    assert its_processor.signal_text == processor.signal_text == "[IMG0][IMG1][IMG2][IMG3]"
    ids = torch.tensor([its_processor.encode_for_training([*REQUEST, DRAWN])[0]])
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
    states = torch.randn(2, 4, 64)
    assert torch.equal(model.output_projector(states), again.output_projector(states))
    with pytest.raises(MobileMMError, match="draws"):
        save(model, tmp_path / "official", processor, layout="mobilevlm")


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
@pytest.mark.parametrize(("tokens", "width"), [(77, 768), (77, 1024), (1, 384)], ids=["sd15", "sd2", "ours"])
def test_output_projectors_give_the_generators_shape(kind: str, tokens: int, width: int) -> None:
    options = {"type": kind, "num_tokens": tokens, "width": width, "hidden": 32}
    torch.manual_seed(0)
    projector = build_output_projector(options, text_width=48, signal_tokens=4)
    states = torch.randn(2, 4, 48)
    condition = projector(states)
    assert condition.shape == (2, tokens, width)
    assert not torch.allclose(condition[0], condition[1])
    unit = build_output_projector(options | {"normalize": True}, text_width=48, signal_tokens=4)
    torch.testing.assert_close(unit(states).norm(dim=-1), torch.ones(2, tokens))


def test_states_are_measured_by_those_that_are_learned_from() -> None:
    """A number a thousand times larger than the others counts for no more than they do."""
    torch.manual_seed(0)
    options = {"type": "mlp", "num_tokens": 1, "width": 16, "hidden": 32}
    projector = build_output_projector(options, text_width=48, signal_tokens=4)
    states = torch.randn(500, 4, 48)
    wanted = projector(states)
    sizes, middle = torch.ones(48).index_fill(0, torch.tensor(7), 1000.0), torch.randn(4, 48)
    projector.standardize(states * sizes + middle)
    found = projector(states * sizes + middle)
    assert float((found - wanted).square().mean() / wanted.square().mean()) < 0.02
    again = build_output_projector(options, text_width=48, signal_tokens=4)
    again.load_state_dict(projector.state_dict())
    assert torch.equal(again(states), projector(states))


def test_queries_begin_apart() -> None:
    torch.manual_seed(0)
    projector = build_output_projector(
        {"type": "transformer", "num_tokens": 8, "width": 16, "hidden": 32, "layers": 1},
        text_width=48,
        signal_tokens=4,
    )
    assert 0.01 < float(projector.queries.detach().std()) < 0.04
    apart = nn.functional.pdist(projector(torch.randn(1, 4, 48))[0])
    assert float(apart.min()) > 1e-4


def test_the_transformer_is_pytorchs_own() -> None:
    """One pre-norm layer each, against torch.nn.Transformer's layers with the same weights."""
    torch.manual_seed(0)
    projector = build_output_projector(
        {"type": "transformer", "num_tokens": 5, "width": 16, "hidden": 32, "layers": 1, "heads": 4},
        text_width=48,
        signal_tokens=3,
    )
    for parameter in projector.parameters():
        nn.init.normal_(parameter, std=0.2)
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    encoder = nn.TransformerEncoderLayer(32, 4, 128, **options).eval()
    decoder = nn.TransformerDecoderLayer(32, 4, 128, **options).eval()
    _copy_block(projector.encoder[0], encoder)
    _copy_block(projector.decoder[0], decoder)
    states = torch.randn(2, 3, 48)
    read = projector.input(projector.states_norm(states)) + projector.positions
    memory = projector.encoder_norm(encoder(read))
    wanted = projector.output(projector.norm(decoder(projector.queries.expand(2, -1, -1), memory)))
    torch.testing.assert_close(projector(states), wanted, atol=1e-5, rtol=1e-5)


def _copy_block(ours: nn.Module, theirs: nn.Module) -> None:
    pairs = [("norm", "norm1"), ("feed_forward.1", "linear1"), ("feed_forward.3", "linear2")]
    attentions = [("attention", "self_attn")]
    if ours.cross_attention is not None:
        pairs += [("cross_norm", "norm2"), ("feed_forward.0", "norm3")]
        attentions += [("cross_attention", "multihead_attn")]
    else:
        pairs += [("feed_forward.0", "norm2")]
    for mine, its in pairs:
        theirs.get_submodule(its).load_state_dict(ours.get_submodule(mine).state_dict())
    for mine, its in attentions:
        own, attention = ours.get_submodule(mine), theirs.get_submodule(its)
        layers = (own.query, own.key, own.value)
        attention.in_proj_weight.data = torch.cat([layer.weight.data for layer in layers])
        attention.in_proj_bias.data = torch.cat([layer.bias.data for layer in layers])
        attention.out_proj.load_state_dict(own.out.state_dict())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"type": "other"}, "known: mlp, transformer"),
        ({"type": "mlp", "num_tokens": 1}, "width"),
        ({"type": "transformer", "num_tokens": 1, "width": 8, "hidden": 30}, "multiple of heads"),
    ],
)
def test_wrong_output_projectors(options: dict[str, object], reason: str) -> None:
    with pytest.raises(MobileMMError, match=reason):
        build_output_projector(options, text_width=16, signal_tokens=4)


def test_configs_that_draw_by_half_are_refused() -> None:
    with pytest.raises(MobileMMError, match="has both"):
        MobileMMConfig(signal_token_ids=[32000])
