"""The whole model: against transformers' LLaVA with the same weights, by hand, and with other parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from mobilemm.errors import MobileMMError
from mobilemm.models import MobileMMForConditionalGeneration
from mobilemm.models.modeling import expand_image_slots
from tests.models.conftest import (
    IMAGE,
    PLACEHOLDER,
    PROMPTS,
    TEXT,
    VISION,
    VOCABULARY,
    WIDTH,
    expanded,
    make_model,
    pad_left,
    pixels,
)


@pytest.fixture(scope="module")
def llava() -> tuple[MobileMMForConditionalGeneration, LlavaForConditionalGeneration]:
    """A MobileMM made like LLaVA, and transformers' LLaVA with the same weights."""
    ours = make_model(projector={"type": "mlp2x_gelu"}, image_token_id=49)
    theirs = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**VISION),
            text_config=LlamaConfig(**TEXT),
            image_token_index=49,
            image_seq_length=16,
            vision_feature_layer=-2,
        )
    ).eval()
    renamed = {
        "vision_encoder.model.": "model.vision_tower.",
        "projector.0.": "model.multi_modal_projector.linear_1.",
        "projector.2.": "model.multi_modal_projector.linear_2.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    }
    state = {}
    for name, value in ours.state_dict().items():
        old = next(prefix for prefix in renamed if name.startswith(prefix))
        state[renamed[old] + name.removeprefix(old)] = value
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert unexpected == []
    assert all("layers.2." in name or "post_layernorm" in name for name in missing)  # never built in ours
    return ours, theirs


@torch.no_grad()
def test_logits_and_loss_are_llavas(
    llava: tuple[MobileMMForConditionalGeneration, LlavaForConditionalGeneration],
) -> None:
    ours, theirs = llava
    batch = pad_left(expanded(PROMPTS, 49, 16))
    labels = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] == 49), -100)
    first = ours(**batch, pixel_values=pixels(), labels=labels)
    second = theirs(**batch, pixel_values=pixels(), labels=labels)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(first.logits[real], second.logits[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.loss, second.loss)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}], ids=str
)
def test_generation_is_llavas(
    llava: tuple[MobileMMForConditionalGeneration, LlavaForConditionalGeneration], options: dict[str, int]
) -> None:
    ours, theirs = llava
    batch = pad_left(expanded(PROMPTS, 49, 16))
    options = {**options, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    first = ours.generate(**batch, pixel_values=pixels(), **options)
    second = theirs.generate(**batch, pixel_values=pixels(), **options)
    assert first.tolist() == second.tolist()


def test_images_make_a_difference_and_are_taken_in_reading_order(
    model: MobileMMForConditionalGeneration,
) -> None:
    ids = torch.tensor([[1, IMAGE, IMAGE, 9]])
    with torch.no_grad():
        logits = model(ids, pixel_values=pixels(2)).logits
        features = model.get_image_features(pixels(2))
        table = model.get_input_embeddings()
        by_hand = torch.cat([table.weight[[1]], features[0], features[1], table.weight[[9]]])[None]
        torch.testing.assert_close(model.language_model(inputs_embeds=by_hand).logits, logits)
        swapped = model(ids, pixel_values=pixels(2).flip(0)).logits
    assert not torch.allclose(swapped, logits, atol=1e-2)


@torch.no_grad()
def test_one_id_per_image_or_placeholders(model: MobileMMForConditionalGeneration) -> None:
    """The two conventions give the same logits, over the spliced sequence."""
    assert model.num_image_tokens == 4
    slots = pad_left(expanded(PROMPTS, PLACEHOLDER, 4))
    labels = torch.where(slots["input_ids"] == PLACEHOLDER, -100, slots["input_ids"])
    short = pad_left(PROMPTS)
    first = model(
        **short,
        pixel_values=pixels(),
        labels=short["input_ids"].masked_fill(~short["attention_mask"].bool(), -100),
    )
    second = model(
        **slots, pixel_values=pixels(), labels=labels.masked_fill(~slots["attention_mask"].bool(), -100)
    )
    assert first.logits.shape == (4, slots["input_ids"].shape[1], VOCABULARY)
    torch.testing.assert_close(first.logits, second.logits)
    torch.testing.assert_close(first.loss, second.loss)


def test_splicing_by_hand() -> None:
    ids = torch.tensor([[1, IMAGE, 7, 0], [1, 2, IMAGE, IMAGE]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    labels = torch.tensor([[-100, 5, 7, 3], [-100, 2, -100, 4]])
    out_ids, out_mask, out_labels = expand_image_slots(ids, 99, 3, attention_mask=mask, labels=labels)
    assert out_ids.tolist() == [[1, 99, 99, 99, 7, 0, 0, 0], [1, 2, 99, 99, 99, 99, 99, 99]]
    assert out_mask.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [1] * 8]
    nothing = -100
    assert out_labels is not None
    assert out_labels.tolist() == [
        [nothing, nothing, nothing, nothing, 7, nothing, nothing, nothing],
        [nothing, 2, *[nothing] * 6],
    ]
    left_ids, left_mask, none = expand_image_slots(ids.flip(1), 99, 2, attention_mask=mask.flip(1))
    assert left_ids.tolist() == [[0, 0, 7, 99, 99, 1], [99, 99, 99, 99, 2, 1]]
    assert left_mask.tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6]
    assert none is None


def test_loss_by_hand(model: MobileMMForConditionalGeneration) -> None:
    ids = torch.tensor([[1, 5, IMAGE, 7, 8, 9]])
    labels = torch.tensor([[-100, -100, -100, -100, 8, 9]])
    with torch.no_grad():
        output = model(ids, pixel_values=pixels(1), labels=labels)
        # Spliced: 1 5 I I I I 7 8 9; 7 predicts 8, 8 predicts 9.
        scores = output.logits[0].log_softmax(-1)
        by_hand = -(scores[6, 8] + scores[7, 9])
        torch.testing.assert_close(output.loss, by_hand / 2)
        over_two_batches = model(
            ids, pixel_values=pixels(1), labels=labels, num_items_in_batch=torch.tensor(8)
        )
    torch.testing.assert_close(over_two_batches.loss, by_hand / 8)


@torch.no_grad()
def test_logits_to_keep(model: MobileMMForConditionalGeneration) -> None:
    batch = pad_left(PROMPTS)
    logits = model(**batch, pixel_values=pixels()).logits
    kept = model(**batch, pixel_values=pixels(), logits_to_keep=2).logits
    torch.testing.assert_close(kept, logits[:, -2:])


@torch.no_grad()
def test_cached_steps_give_the_logits_of_one_pass(model: MobileMMForConditionalGeneration) -> None:
    ids = torch.tensor([[1, 5, IMAGE, 7, 8, 9, 10]])
    whole = model(ids, pixel_values=pixels(1), use_cache=False)
    assert whole.past_key_values is None
    step = model(ids[:, :4], pixel_values=pixels(1), use_cache=True)
    logits = [step.logits]
    for position in range(4, 7):
        step = model(ids[:, [position]], past_key_values=step.past_key_values, use_cache=True)
        logits.append(step.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "images", "message"),
    [
        ([[1, IMAGE, 7]], 0, "room for 1 images of 4 tokens; 0 given"),
        ([[1, IMAGE, 7]], 2, "room for 1 images of 4 tokens; 2 given"),
        ([[1, 6, 7]], 1, "room for 0 images of 4 tokens; 1 given"),
        ([[1, PLACEHOLDER, PLACEHOLDER, 7]], 1, "2 image placeholders, which is room for 0.5 images"),
    ],
)
def test_images_and_placeholders_must_agree(
    model: MobileMMForConditionalGeneration, ids: list[list[int]], images: int, message: str
) -> None:
    given = pixels(images) if images else None
    with pytest.raises(MobileMMError, match=message):
        model(torch.tensor(ids), pixel_values=given)
    with pytest.raises(MobileMMError, match=message):
        model.generate(torch.tensor(ids), pixel_values=given, max_new_tokens=1)


def test_forward_needs_ids_or_embeddings(model: MobileMMForConditionalGeneration) -> None:
    with pytest.raises(MobileMMError, match="input_ids or inputs_embeds"):
        model(pixel_values=pixels(1))


@torch.no_grad()
def test_text_alone_is_the_language_models(model: MobileMMForConditionalGeneration) -> None:
    ids = torch.tensor([[1, 5, 6, 7]])
    expected = model.language_model(ids).logits
    torch.testing.assert_close(model(ids).logits, expected)
    torch.testing.assert_close(model(ids, pixel_values=pixels(0)).logits, expected)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = make_model().train()
    batch = pad_left(PROMPTS)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    calls: list[str] = []
    for kind, layer in (
        ("vision", model.vision_encoder.model.encoder.layers[0]),
        ("text", model.language_model.model.layers[0]),
    ):
        layer.self_attn.register_forward_hook(lambda *_, kind=kind: calls.append(kind))

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        calls.clear()
        model.zero_grad()
        loss = model(**batch, pixel_values=pixels(), labels=labels, use_cache=False).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain_loss, plain = run()
    assert sorted(calls) == ["text", "vision"]
    model.gradient_checkpointing_enable()
    loss, gradients = run()
    assert sorted(calls) == ["text", "text", "vision", "vision"]  # each run again for the backward pass
    torch.testing.assert_close(loss, plain_loss)
    assert gradients.keys() == plain.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[name])


QFORMER = {"type": "qformer", "num_tokens": 3, "num_hidden_layers": 2, "hidden_size": 24, "vocab_size": 20}


@pytest.mark.parametrize("name", ["ldpnet", "perceiver_resampler", "pixel_shuffle", "linear", "qformer"])
def test_every_projector_fits_between(name: str) -> None:
    model = make_model(projector=QFORMER if name == "qformer" else {"type": name})
    with torch.no_grad():
        logits = model(torch.tensor([[1, IMAGE, 7]]), pixel_values=pixels(1)).logits
    assert logits.shape == (1, 2 + model.num_image_tokens, VOCABULARY)
    assert torch.isfinite(logits).all()


@torch.no_grad()
def test_the_class_token_takes_a_place_of_its_own() -> None:
    options = {"projector": {"type": "linear"}, "vision_feature_select_strategy": "full"}
    model = make_model(**options)
    assert model.num_image_tokens == 17
    logits = model(torch.tensor([[1, IMAGE, 7]]), pixel_values=pixels(1)).logits
    assert logits.shape == (1, 19, VOCABULARY)
    with pytest.raises(MobileMMError, match="vision_feature_select_strategy"):
        make_model(vision_feature_select_strategy="full")


@torch.no_grad()
def test_instructions_reach_the_qformer() -> None:
    model = make_model(projector={**QFORMER, "instruction": True})
    ids = torch.tensor([[1, IMAGE, 7]])
    words = torch.tensor([[5, 6, 7]])
    first = model(ids, pixel_values=pixels(1), qformer_input_ids=words).logits
    second = model(ids, pixel_values=pixels(1), qformer_input_ids=words + 1).logits
    assert not torch.allclose(first, second)
    output = model.generate(ids, pixel_values=pixels(1), qformer_input_ids=words, max_new_tokens=2)
    assert output.shape == (1, 5)


OTHERS = {
    "qwen2": Qwen2Config(**TEXT),
    "qwen3": Qwen3Config(**TEXT, head_dim=8),
    "mistral": MistralConfig(**TEXT, sliding_window=6),
    "gemma2": Gemma2Config(**TEXT, head_dim=8, sliding_window=6),
    "gemma3_text": Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=6),
    "opt": OPTConfig(
        hidden_size=WIDTH,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=40,
        word_embed_proj_dim=WIDTH,
        pad_token_id=0,
        eos_token_id=None,
    ),
    "gpt2": GPT2Config(
        n_embd=WIDTH, n_layer=2, n_head=4, n_positions=40, vocab_size=VOCABULARY, eos_token_id=None
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_language_models(name: str) -> None:
    """A padded batch is each row alone, put together by hand and continued by the language model itself."""
    model = make_model(OTHERS[name])
    batch = pad_left(PROMPTS)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    output = model.generate(**batch, pixel_values=pixels(), **options)
    alone = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    alone.load_state_dict(model.language_model.state_dict())
    images = iter(model.get_image_features(pixels()).detach())
    spliced = model(**batch, pixel_values=pixels()).logits.detach()
    for row, ids in enumerate(PROMPTS):
        parts = [next(images) if i == IMAGE else alone.get_input_embeddings()(torch.tensor([i])) for i in ids]
        embeds = torch.cat(parts)[None].detach()
        assert alone.generate(inputs_embeds=embeds, **options)[0].tolist() == output[row, 7:].tolist()
        with torch.no_grad():
            logits = alone(inputs_embeds=embeds).logits[0]
        if name not in ("opt", "gpt2"):  # forward leaves learned positions of padded rows to the caller
            torch.testing.assert_close(spliced[row, -len(logits) :], logits, rtol=1e-4, atol=1e-4)
