"""Text by `generate`: batches against rows alone, against steps by hand, streamed, and with its options."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer

from mobilemm.models import MobileMMForConditionalGeneration
from tests.models.conftest import (
    IMAGE,
    IMAGES_PER_PROMPT,
    PLACEHOLDER,
    PROMPTS,
    VOCABULARY,
    expanded,
    pad_left,
    pixels,
)


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
