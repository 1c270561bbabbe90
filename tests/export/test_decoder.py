"""The decoder against transformers' own causal language models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, GemmaConfig, LlamaConfig, Qwen2Config

from mobilemm.errors import MobileMMError
from mobilemm.export.decoder import Decoder, DecoderWeights, EagerCache
from mobilemm.export.decoder_spec import DecoderSpec, decoder_spec
from tests.export.language_models import (
    LANGUAGE_MODELS,
    SIZES,
    config_of,
    prompt_and_logits,
    random_language_model,
)


def loaded(spec: DecoderSpec, tensors: dict[str, Tensor]) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(spec)
    weights = DecoderWeights(spec, tensors)
    decoder.load_state_dict({name: weights[name] for name in weights}, assign=True)
    return decoder.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_logits_are_transformers_own(name: str) -> None:
    model = random_language_model(config_of(name))
    spec, embeds, wanted = prompt_and_logits(model)
    decoder, cache = loaded(spec, model.state_dict()), EagerCache()
    steps = [decoder(embeds[:, :30], cache)]
    steps += [decoder(embeds[:, index : index + 1], cache) for index in range(30, 40)]
    torch.testing.assert_close(torch.cat(steps, 1), wanted, rtol=0, atol=1e-4)
    # What the comparison rests on: logits that differ from place to place, by much more than the tolerance.
    assert wanted.std() > 0.3
    assert (wanted[:, 1:] - wanted[:, :-1]).abs().amax(-1).min() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", ["rope_linear", "rope_llama3", "rope_yarn", "mistral_window", "gemma3_text"])
def test_what_makes_a_kind_special_matters(name: str) -> None:
    """With plain positions, or without the window, the logits are others: the test above can fail."""
    model = random_language_model(config_of(name))
    spec, embeds, wanted = prompt_and_logits(model)
    plain = decoder_spec(config_of("llama"))
    options: dict[str, Any] = {"layers": plain.layers, "rope_tables": plain.rope_tables}
    changed = loaded(DecoderSpec(**{**vars(spec), **options}), model.state_dict())(embeds, EagerCache())
    assert (changed - wanted).abs().max() > 0.01


@torch.no_grad()
def test_several_rows_and_chosen_positions() -> None:
    model = random_language_model(config_of("llama"))
    spec, embeds, _ = prompt_and_logits(model)
    rows = torch.cat([embeds, embeds.flip(1)])
    wanted = model(inputs_embeds=rows).logits
    decoder = loaded(spec, model.state_dict())
    torch.testing.assert_close(decoder(rows, EagerCache()), wanted, rtol=0, atol=1e-4)
    chosen = decoder(rows, EagerCache(), logits_positions=torch.tensor([-1, 0, 7]))
    torch.testing.assert_close(chosen, wanted[:, [-1, 0, 7]], rtol=0, atol=1e-4)


def test_a_shorter_context_has_shorter_tables_and_the_same_logits() -> None:
    config = config_of("rope_llama3")
    whole, cut = decoder_spec(config), decoder_spec(config, 48)
    assert (whole.context_length, cut.context_length) == (256, 48)
    assert Decoder(cut).rotary()[0].cos.shape == (48, 8)
    torch.testing.assert_close(Decoder(cut).rotary()[0].cos, Decoder(whole).rotary()[0].cos[:48])


def test_the_spec_says_what_the_config_says() -> None:
    spec = decoder_spec(config_of("smollm3"))
    assert [layer.rope for layer in spec.layers] == [0, None, 0]
    spec = decoder_spec(config_of("qwen2_window"))
    assert [layer.window for layer in spec.layers] == [None, 8, 8]
    spec = decoder_spec(config_of("gemma3_text"))
    assert [layer.window for layer in spec.layers] == [9, None, 9]
    assert len({layer.rope for layer in spec.layers}) == 2
    assert spec.qk_norm
    assert spec.sandwich_norms
    spec = decoder_spec(config_of("gemma2"))
    assert (spec.attention_softcap, spec.logit_softcap, spec.embedding_scale) == (2.0, 20.0, 8.0)
    # A window that no sequence fills is none: attention without one is faster.
    assert {layer.window for layer in decoder_spec(config_of("mistral_window"), 7).layers} == {None}


LLAMA = {**SIZES, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AutoConfig.for_model("gpt2"), "language model 'gpt2' cannot be exported yet; known: llama, "),
        (LlamaConfig(**LLAMA, hidden_act="relu"), "activation 'relu' is unknown to export; known: silu"),
        (
            LlamaConfig(
                **LLAMA,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                    "original_max_position_embeddings": 64,
                },
            ),
            "rope type 'longrope' is unknown to export; known: default, linear",
        ),
        (
            LlamaConfig(
                **LLAMA,
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                },
            ),
            "partial rotary embeddings are unknown",
        ),
        (LlamaConfig(**LLAMA, pretraining_tp=2), "pretraining_tp 2 is unknown to export"),
        (
            Qwen2Config(**{**LLAMA, "layer_types": ["linear_attention"]}),
            "layers of 'linear_attention' are unknown to export",
        ),
    ],
)
def test_unknown_pieces_are_named(config: Any, message: str) -> None:
    with pytest.raises(MobileMMError) as raised:
        decoder_spec(config)
    assert message in str(raised.value)
    assert config.model_type in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_context_beyond_the_positions() -> None:
    with pytest.raises(MobileMMError, match="context length 257: this language model has 256 positions"):
        decoder_spec(config_of("llama"), 257)


def test_gemma_without_a_hidden_activation_is_read_as_transformers_reads_it() -> None:
    for changes in ({"hidden_activation": None}, {"hidden_act": "gelu", "hidden_activation": None}):
        assert decoder_spec(GemmaConfig(**SIZES, **changes)).activation == "gelu_tanh"


def test_missing_and_misshapen_tensors_are_named() -> None:
    model = random_language_model(config_of("llama"))
    spec, tensors = decoder_spec(model.config), dict(model.state_dict())
    weights = DecoderWeights(spec, tensors)
    assert len(weights) == len(list(weights)) == len(dict(Decoder(spec).named_parameters()))
    up = "model.layers.1.mlp.up_proj.weight"
    tensors[up] = tensors[up][:, :-1]
    with pytest.raises(MobileMMError, match=rf"'{up}' has the shape \(128, 63\); \(128, 64\) is expected"):
        weights["layers.1.up.weight"]
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    with pytest.raises(
        MobileMMError, match=r"'llama': tensor 'model.layers.2.self_attn.k_proj.weight' is missing"
    ):
        weights["layers.2.qkv.weight"]


def test_weights_are_the_checkpoints_own_where_nothing_is_to_be_done() -> None:
    model = random_language_model(config_of("llama_biases_tied")).half()
    tensors = dict(model.state_dict())
    del tensors["lm_head.weight"]
    weights = DecoderWeights(decoder_spec(model.config), tensors)
    for name, source in {
        "layers.0.down.weight": "model.layers.0.mlp.down_proj.weight",
        "lm_head.weight": "model.embed_tokens.weight",
    }.items():
        assert weights[name].dtype == torch.float16
        assert weights[name].data_ptr() == tensors[source].data_ptr()
