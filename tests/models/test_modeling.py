"""The whole model: against transformers' LLaVA with the same weights, and batches against rows alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    TextIteratorStreamer,
    TextStreamer,
    TimmWrapperConfig,
)

from mobilemm.errors import MobileMMError
from mobilemm.models import IMAGE_TOKEN_INDEX, MobileMMConfig, MobileMMForConditionalGeneration
from mobilemm.models.modeling import expand_image_slots

VOCABULARY, WIDTH, SIDE = 50, 32, 32
PLACEHOLDER = VOCABULARY  # the first id behind the vocabulary
IMAGE = IMAGE_TOKEN_INDEX
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# Unequal prompts: one image, two in a row, none, one at the very end.
PROMPTS = [[1, 5, IMAGE, 7, 8], [1, IMAGE, IMAGE, 9], [1, 11, 12, 13, 14, 15, 16], [1, 20, IMAGE]]
IMAGES_PER_PROMPT = [1, 2, 0, 1]


def make_model(text: PreTrainedConfig | None = None, **options: Any) -> MobileMMForConditionalGeneration:
    """A tiny model whose weights are large enough for its answers to hang on every input."""
    torch.manual_seed(0)
    config = MobileMMConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text or LlamaConfig(**TEXT), **options
    )
    model = MobileMMForConditionalGeneration(config)
    randomize(model)
    return model.eval()


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm scales around one, the rest around zero.
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.2)


def pixels(count: int = 4) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def pad_left(rows: list[list[int]]) -> dict[str, Tensor]:
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def one_by_one(model: MobileMMForConditionalGeneration, **options: Any) -> list[list[int]]:
    """The new tokens of each of `PROMPTS` generated alone."""
    answers, first = [], 0
    for row, count in zip(PROMPTS, IMAGES_PER_PROMPT, strict=True):
        images = pixels()[first : first + count]
        first += count
        output = model.generate(
            torch.tensor([row]), pixel_values=images if count else None, max_new_tokens=6, **options
        )
        assert output[0, : len(row)].tolist() == row
        answers.append(output[0, len(row) :].tolist())
    return answers


@pytest.fixture(scope="module")
def model() -> MobileMMForConditionalGeneration:
    return make_model()


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


def expanded(rows: list[list[int]], placeholder: int, count: int) -> list[list[int]]:
    return [[p for i in row for p in ([placeholder] * count if i == IMAGE else [i])] for row in rows]


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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 2},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"use_cache": False},
        {"use_cache": False, "num_beams": 2},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_a_batch_generates_what_its_rows_do_alone(
    model: MobileMMForConditionalGeneration, options: dict[str, Any]
) -> None:
    batch = pad_left(PROMPTS)
    output = model.generate(**batch, pixel_values=pixels(), max_new_tokens=6, do_sample=False, **options)
    length = batch["input_ids"].shape[1]
    assert torch.equal(output[:, :length], batch["input_ids"])
    alone = one_by_one(model, do_sample=False, **options)
    assert output[:, length:].tolist() == alone
    assert len({tuple(answer) for answer in alone}) == len(PROMPTS)  # the prompts do make a difference


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


def test_generation_without_a_cache_still_sees_the_image(model: MobileMMForConditionalGeneration) -> None:
    ids = torch.tensor([[1, 5, IMAGE, 7]])
    answers = {
        tuple(model.generate(ids, pixel_values=pixels(4)[[i]], max_new_tokens=6, use_cache=False)[0].tolist())
        for i in range(4)
    }
    assert len(answers) > 1


@torch.no_grad()
def test_generation_step_by_step_without_generate(model: MobileMMForConditionalGeneration) -> None:
    """Greedy decoding by whole forward passes, each over the prompt with its image and all tokens so far."""
    ids = torch.tensor([[1, 5, IMAGE, 7]])
    for _ in range(6):
        best = model(ids, pixel_values=pixels(1)).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
    for use_cache in (True, False):
        output = model.generate(
            ids[:, :4], pixel_values=pixels(1), max_new_tokens=6, do_sample=False, use_cache=use_cache
        )
        assert output.tolist() == ids.tolist()


def test_sampling_gives_as_many_sequences_as_asked_for(model: MobileMMForConditionalGeneration) -> None:
    batch = pad_left(PROMPTS)
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5}
    torch.manual_seed(3)
    output = model.generate(**batch, pixel_values=pixels(), **options)
    torch.manual_seed(3)
    again = model.generate(**batch, pixel_values=pixels(), **options)
    assert output.shape == (4 * 3, 7 + 5)
    assert torch.equal(output, again)
    assert torch.equal(output[:, :7], batch["input_ids"].repeat_interleave(3, 0))
    assert not torch.equal(output[0], output[1])
    assert int(output[:, 7:].min()) >= 0
    assert int(output[:, 7:].max()) < VOCABULARY


def test_rows_that_end_early_are_padded(model: MobileMMForConditionalGeneration) -> None:
    answers = one_by_one(model, do_sample=False)
    end = answers[0][1]
    batch = pad_left(PROMPTS)
    output = model.generate(
        **batch, pixel_values=pixels(), max_new_tokens=6, do_sample=False, eos_token_id=end, pad_token_id=0
    )
    for answer, row in zip(answers, output[:, 7:].tolist(), strict=True):
        kept = answer[: answer.index(end) + 1] if end in answer else answer
        assert row == kept + [0] * (len(row) - len(kept))


def test_dictionary_output_keeps_scores(model: MobileMMForConditionalGeneration) -> None:
    batch = pad_left(PROMPTS)
    options = {"max_new_tokens": 3, "do_sample": False}
    plain = model.generate(**batch, pixel_values=pixels(), **options)
    output = model.generate(
        **batch, pixel_values=pixels(), **options, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(output.sequences, plain)
    assert torch.equal(torch.stack(output.logits, 1).argmax(-1), plain[:, 7:])


def test_generation_takes_ids_under_all_their_names(model: MobileMMForConditionalGeneration) -> None:
    ids = torch.tensor([[1, 5, IMAGE, 7]])
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, pixel_values=pixels(1), **options)
    assert torch.equal(model.generate(inputs=ids, pixel_values=pixels(1), **options), expected)
    assert torch.equal(model.generate(input_ids=ids, pixel_values=pixels(1), **options), expected)
    features = model.get_image_features(pixels(1)).detach()
    assert torch.equal(model.generate(ids, image_features=features, **options), expected)
    slots = torch.tensor(expanded([[1, 5, IMAGE, 7]], PLACEHOLDER, 4))
    embeds = model.embed(slots, pixels(1)).detach()
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), expected[:, 4:])
    assert torch.equal(
        model.generate(slots, pixel_values=pixels(1), **options)[:, slots.shape[1] :], expected[:, 4:]
    )


def test_repetition_penalty_with_a_placeholder_outside_the_vocabulary(
    model: MobileMMForConditionalGeneration,
) -> None:
    """The penalty divides or multiplies the scores of ids in the prompt, of which the placeholder is none."""
    slots = torch.tensor(expanded([[1, 5, IMAGE, 7]], PLACEHOLDER, 4))
    assert int(slots.max()) >= VOCABULARY
    output = model.generate(
        slots,
        pixel_values=pixels(1),
        max_new_tokens=1,
        do_sample=False,
        repetition_penalty=1.7,
        return_dict_in_generate=True,
        output_scores=True,
    )
    with torch.no_grad():
        scores = model(slots, pixel_values=pixels(1)).logits[0, -1]
    penalized = torch.where(scores < 0, scores * 1.7, scores / 1.7)
    expected = scores.clone()
    seen = torch.tensor([1, 5, 7, 0])  # 0: what stands in the placeholders' positions
    expected[seen] = penalized[seen]
    torch.testing.assert_close(output.scores[0][0], expected)


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


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")


def test_text_streamer_prints_the_answer(
    model: MobileMMForConditionalGeneration, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = torch.tensor([[1, 5, IMAGE, 7]])
    options = {"pixel_values": pixels(1), "max_new_tokens": 5, "do_sample": False}
    streamer = TextStreamer(tokenizer(), skip_prompt=True)
    output = model.generate(ids, streamer=streamer, **options)
    assert torch.equal(output, model.generate(ids, **options))
    assert capsys.readouterr().out.split() == [f"w{index}" for index in output[0, 4:].tolist()]


def test_iterator_streamer_yields_while_generating(model: MobileMMForConditionalGeneration) -> None:
    ids = torch.tensor([[1, 5, IMAGE, 7]])
    options: dict[str, Any] = {"pixel_values": pixels(1), "max_new_tokens": 5, "do_sample": False}
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=20)
    thread = threading.Thread(target=model.generate, args=(ids,), kwargs={"streamer": streamer, **options})
    thread.start()
    pieces = list(streamer)
    thread.join()
    answer = model.generate(ids, **options)[0, 4:].tolist()
    assert "".join(pieces).split() == [f"w{index}" for index in answer]
    assert len([piece for piece in pieces if piece]) > 1


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModel, MobileMMForConditionalGeneration])
def test_saved_models_come_back_bit_for_bit(
    model: MobileMMForConditionalGeneration, tmp_path: Path, auto: Any
) -> None:
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MobileMMConfig)
    ignored = {"transformers_version", "_name_or_path", "architectures", "dtype"}
    assert {k: v for k, v in config.to_dict().items() if k not in ignored} == {
        k: v for k, v in model.config.to_dict().items() if k not in ignored
    }
    again = auto.from_pretrained(tmp_path)
    assert type(again) is MobileMMForConditionalGeneration
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    batch = pad_left(PROMPTS)
    with torch.no_grad():
        logits = model(**batch, pixel_values=pixels()).logits
        assert torch.equal(again.eval()(**batch, pixel_values=pixels()).logits, logits)


def test_a_model_with_unused_layers_and_a_timm_encoder_comes_back(tmp_path: Path) -> None:
    encoder = TimmWrapperConfig(architecture="test_vit", model_args={"depth": 2})
    for index, options in enumerate(
        [
            {"keep_unused_layers": True},
            {"vision_config": encoder, "image_size": 64, "vision_feature_layer": -1},
        ]
    ):
        config = MobileMMConfig(
            **{"vision_config": CLIPVisionConfig(**VISION), "text_config": LlamaConfig(**TEXT), **options}
        )
        model = MobileMMForConditionalGeneration(config).eval()
        randomize(model)
        model.save_pretrained(tmp_path / str(index))
        again = AutoModel.from_pretrained(tmp_path / str(index))
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name
        size = config.image_size
        image = torch.randn(1, 3, size, size)
        with torch.no_grad():
            assert torch.equal(again.get_image_features(image), model.get_image_features(image))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = make_model(LlamaConfig(**TEXT, tie_word_embeddings=True))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert not (again.get_input_embeddings().weight == 0).all()
    batch = pad_left(PROMPTS)
    with torch.no_grad():
        logits = model(**batch, pixel_values=pixels()).logits
        assert torch.equal(again(**batch, pixel_values=pixels()).logits, logits)
    untied = make_model()
    assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight


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


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps(model: MobileMMForConditionalGeneration, tmp_path: Path, device_map: str) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=device_map)
    batch = pad_left(PROMPTS)
    with torch.no_grad():
        logits = model(**batch, pixel_values=pixels()).logits
        torch.testing.assert_close(again(**batch, pixel_values=pixels()).logits, logits)


def test_layers_offloaded_to_disk_stay_whole(model: MobileMMForConditionalGeneration, tmp_path: Path) -> None:
    """Little memory makes accelerate split the model, which it may do between layers, never inside one."""
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": 60_000},
        offload_folder=tmp_path / "offload",
    )
    assert "disk" in again.hf_device_map.values()
    inside = [
        name for name in again.hf_device_map if ".layers." in name and not name.split(".layers.")[1].isdigit()
    ]
    assert inside == []
    batch = pad_left(PROMPTS)
    with torch.no_grad():
        logits = model(**batch, pixel_values=pixels()).logits
        torch.testing.assert_close(again(**batch, pixel_values=pixels()).logits, logits)


def test_attention_implementation_reaches_all_parts(
    model: MobileMMForConditionalGeneration, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    eager = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.language_model.config._attn_implementation == "eager"
    assert eager.vision_encoder.model.config._attn_implementation == "eager"
    batch = pad_left(PROMPTS)
    with torch.no_grad():
        output = eager(**batch, pixel_values=pixels(), output_attentions=True)
        expected = model(**batch, pixel_values=pixels()).logits
        # The last position is of the prompt in every row; what stands at padded ones is nobody's business.
        torch.testing.assert_close(output.logits[:, -1], expected[:, -1], rtol=1e-4, atol=1e-4)
    assert output.attentions[0].shape == (4, 4, output.logits.shape[1], output.logits.shape[1])


def test_half_precision_from_full_precision_pixels(
    model: MobileMMForConditionalGeneration, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    batch = pad_left(PROMPTS)
    with torch.no_grad():
        assert half(**batch, pixel_values=pixels()).logits.dtype == torch.bfloat16
    assert half.generate(**batch, pixel_values=pixels(), max_new_tokens=2).shape == (4, 9)


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
