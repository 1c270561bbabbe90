"""Each template's words, and which of them are learned, against the official prompts written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mobilemm.data.templates import Segment, TokenizerTemplate, find_template
from mobilemm.errors import MobileMMError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE = {"type": "image"}


def user(text: str, images: int = 0) -> dict[str, Any]:
    return {"role": "user", "content": [IMAGE] * images + [{"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def words(segments: Sequence[Segment]) -> str:
    return "".join("<image>" if segment.is_image else segment.text for segment in segments)


def learned(segments: Sequence[Segment]) -> list[str]:
    """What is supervised, one string for each unbroken stretch."""
    stretches: list[str] = []
    before = False
    for segment in segments:
        if segment.supervised:
            if not before:
                stretches.append("")
            stretches[-1] += segment.text
        before = segment.supervised
    return stretches


def official_v1(turns: Sequence[tuple[str, str | None]]) -> str:
    """The prompt of the official code: roles and messages, joined by " " and "</s>" in turn."""
    prompt = SYSTEM + " "
    for question, answer in turns:
        prompt += "USER: " + question + " "
        prompt += "ASSISTANT:" if answer is None else "ASSISTANT: " + answer + "</s>"
    return prompt


def test_v1_is_the_official_prompt() -> None:
    template = find_template("v1")
    conversation = [user("What is this?", 1), assistant("A cat."), user("Really?"), assistant("Yes.")]
    segments = template.render(conversation)
    assert words(segments) == official_v1([("<image>\nWhat is this?", "A cat."), ("Really?", "Yes.")])
    assert learned(segments) == [" A cat.</s>", " Yes.</s>"]
    prompt = template.render(conversation[:3], add_generation_prompt=True)
    assert words(prompt) == official_v1([("<image>\nWhat is this?", "A cat."), ("Really?", None)])


def test_v1_with_several_images_and_its_own_system_words() -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Which "}, IMAGE, IMAGE, {"type": "text", "text": "one?"}],
        },
    ]
    assert words(find_template("v1").render(conversation, True)) == (
        "Be brief. USER: <image>\n<image>\nWhich one? ASSISTANT:"
    )


def test_plain_keeps_images_and_captions_alone() -> None:
    template = find_template("plain")
    segments = template.render([user("Describe the picture.", 1), assistant("a cat")])
    assert words(segments) == "<image>a cat\n"
    assert learned(segments) == ["a cat\n"]
    assert words(template.render([user("Describe it.", 1)], add_generation_prompt=True)) == "<image>"


def test_chatml() -> None:
    template = find_template("chatml")
    segments = template.render([{"role": "system", "content": "S"}, user("Q", 1), assistant("A")], True)
    assert words(segments) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<image>\nQ<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>assistant\n"
    )
    assert learned(segments) == ["A<|im_end|>"]


class JinjaTokenizer:
    """What a tokenizer's `apply_chat_template` does, without a vocabulary."""

    eos_token = "<|im_end|>"

    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template

    def apply_chat_template(
        self, messages: list[dict[str, Any]], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

        def fail(message: str) -> None:
            raise TemplateError(message)

        environment.globals["raise_exception"] = fail
        assert self.chat_template is not None
        return environment.from_string(self.chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt
        )


DEFAULT_SYSTEM = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for message in messages %}[{{ message.role }}]"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
STRIPS_THINKING = (
    "{% for message in messages %}[{{ message.role }}]"
    "{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1] }}"
    "{% else %}{{ message.content }}{% endif %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_tokenizers_own_template_with_a_default_system_prompt() -> None:
    template = TokenizerTemplate(JinjaTokenizer(DEFAULT_SYSTEM))
    conversation = [user("Q", 1), assistant("A"), user("Q2"), assistant("A2")]
    segments = template.render(conversation)
    assert words(segments) == (
        "<|im_start|>system\nHelp.<|im_end|>\n<|im_start|>user\n<image>\nQ<|im_end|>\n"
        "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n"
        "<|im_start|>assistant\nA2<|im_end|>\n"
    )
    assert learned(segments) == ["A<|im_end|>", "A2<|im_end|>"]
    prompt = template.render(conversation[:1], add_generation_prompt=True)
    assert words(prompt).endswith("<image>\nQ<|im_end|>\n<|im_start|>assistant\n")
    assert learned(prompt) == []
    own = template.render([{"role": "system", "content": "S"}, user("Q"), assistant("A")])
    assert words(own).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ")
    assert learned(own) == ["A<|im_end|>"]


def test_a_template_that_takes_parts() -> None:
    template = TokenizerTemplate(JinjaTokenizer(PARTS))
    segments = template.render([user("Q", 2), assistant("A")])
    assert words(segments) == "[user]<image>\n<image>\nQ<|im_end|>[assistant]A<|im_end|>"
    assert learned(segments) == ["A<|im_end|>"]


def test_a_template_that_drops_earlier_text_is_refused() -> None:
    template = TokenizerTemplate(JinjaTokenizer(STRIPS_THINKING))
    one_turn = [user("Q"), assistant("<think>hm</think>A")]
    assert learned(template.render(one_turn)) == ["<think>hm</think>A<|im_end|>"]
    with pytest.raises(MobileMMError, match="message 3 so that the text before it changes"):
        template.render([*one_turn, user("Q2"), assistant("A2")])
    with pytest.raises(MobileMMError, match="renders a finished answer anew"):
        template.render([*one_turn, user("Q2")])


def test_a_template_that_refuses() -> None:
    template = TokenizerTemplate(JinjaTokenizer(NO_SYSTEM))
    assert learned(template.render([user("Q"), assistant("A")])) == ["A<|im_end|>"]
    with pytest.raises(MobileMMError, match="refuses this conversation: System role not supported"):
        template.render([{"role": "system", "content": "S"}, user("Q"), assistant("A")])


def test_templates_that_are_not_there() -> None:
    with pytest.raises(MobileMMError, match="has no chat template; use v1 or chatml"):
        find_template("tokenizer", JinjaTokenizer(None))
    with pytest.raises(MobileMMError, match="unknown template 'v9'; known: v1, plain, chatml, tokenizer"):
        find_template("v9")


TEMPLATES = ["v1", "plain", "chatml", "tokenizer"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "text",
    [
        "<image>",
        "<image>\n<image>",
        "USER: x ASSISTANT: y",
        "ASSISTANT:",
        "{{ 7 * 7 }}",
        "{% if %}",
        "\n",
        "",
        "é漢😀",
    ],
)
def test_what_people_write_stays_text(name: str, text: str) -> None:
    """No image slot comes of words, nothing is rendered twice, and only answers are learned."""
    template = find_template(name, JinjaTokenizer(DEFAULT_SYSTEM))
    segments = template.render([user(text, 1), assistant("A")])
    assert sum(segment.is_image for segment in segments) == 1
    if name != "plain":
        assert text in words([segment for segment in segments if not segment.is_image])
    stretches = learned(segments)
    assert len(stretches) == 1
    assert stretches[0].strip().startswith("A")
    answered = learned(template.render([user("Q", 1), assistant(text)]))
    assert len(answered) == 1
    assert text in answered[0]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "tool", "content": "x"}],
        [{"content": "x"}],
        [user("x"), {"role": "system", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"type": "video"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "text", "text": 3}]}],
        [user("x"), {"role": "assistant", "content": [IMAGE]}],
        [{"role": "system", "content": [IMAGE]}, user("x")],
        ["x"],
        [None],
    ],
    ids=str,
)
def test_wrong_messages(name: str, messages: list[Any]) -> None:
    template = find_template(name, JinjaTokenizer(DEFAULT_SYSTEM))
    with pytest.raises(MobileMMError) as error:
        template.render(messages)
    assert "message" in str(error.value)
