"""Conversations rendered by a `Prompt`: what it takes, and what it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mobilemm.errors import MobileMMError
from mobilemm.runtime.manifest import Prompt, Turn
from mobilemm.runtime.prompt import PromptTokenizer, render, with_marks

PROMPT = Prompt(
    begin="<s>",
    system=None,
    user=Turn(prefix="U:", suffix=";", prefix_before_image="I:"),
    later_user=Turn(prefix="L:", suffix=";"),
    assistant=Turn(prefix="A:", suffix="."),
    generation="A:",
    image_prefix="[",
    image_suffix="]",
)
ANSWER = {"role": "assistant", "content": "yes"}


def user(text: str, images: int = 0) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text}, *[{"type": "image"}] * images]}


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        ([{"role": "user", "content": "a"}], "<s>U:a;A:"),
        ([user("a", 2)], "<s>I:[<image>][<image>]a;A:"),  # pictures come first
        ([user("a"), ANSWER, user("b", 1)], "<s>U:a;A:yes.L:[<image>]b;A:"),
        ([user("a"), user("b")], "<s>U:a;U:b;A:"),
        ([user("  a ")], "<s>U:  a ;A:"),
    ],
)
def test_rendering(messages: list[Any], wanted: str) -> None:
    assert with_marks(render(PROMPT, messages)) == wanted
    assert with_marks(render(PROMPT, messages, add_generation_prompt=False)) == wanted.removesuffix("A:")


@pytest.mark.parametrize(
    ("strip", "plain", "with_picture"),
    [("none", " a ", "[<image>] a "), ("text", "a", "[<image>]a"), ("content", "a", "[<image>] a")],
)
def test_stripping(strip: str, plain: str, with_picture: str) -> None:
    prompt = PROMPT.model_copy(update={"strip": strip})
    assert with_marks(render(prompt, [user(" a ")], False)) == f"<s>U:{plain};"
    assert with_marks(render(prompt, [user(" a ", 1)], False)) == f"<s>I:{with_picture};"


def test_a_system_message_stands_in_place_of_the_beginning() -> None:
    messages = [{"role": "system", "content": "s"}, user("a"), ANSWER, user("b")]
    with pytest.raises(MobileMMError, match="takes no system prompt"):
        render(PROMPT, messages)
    system = {"system": Turn(prefix="S:", suffix="|")}
    assert render(PROMPT.model_copy(update=system), messages) == ["S:s|U:a;A:yes.L:b;A:"]
    merged = system | {"user_after_system": Turn(prefix="", suffix=";")}
    assert render(PROMPT.model_copy(update=merged), messages) == ["S:s|a;A:yes.L:b;A:"]


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([{"role": "tool", "content": "a"}], "unknown role 'tool'"),
        ([{"content": "a"}], "unknown role None"),
        ([user("a"), {"role": "system", "content": "a"}], "can only stand first"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "only stand in a user's"),
        ([{"role": "user", "content": [{"type": "video"}]}], "'text' or 'image', not 'video'"),
        ([{"role": "user", "content": 3}], "must be text or a list"),
    ],
)
def test_wrong_messages(messages: list[Any], why: str) -> None:
    with pytest.raises(MobileMMError, match=why):
        render(PROMPT, messages)


def test_a_placeholder_in_somebodys_words_is_no_picture(llama_kind: PreTrainedTokenizerFast) -> None:
    backend = json.loads(llama_kind.backend_tokenizer.to_str())
    token = {**backend["added_tokens"][0], "id": len(llama_kind), "content": "<image>"}
    backend["added_tokens"].append(token)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(backend))
    assert tokenizer.encode("a<image>b", add_special_tokens=False).ids.count(len(llama_kind)) == 1
    encoder = PromptTokenizer(tokenizer, PROMPT, len(llama_kind), 4)
    ids = encoder.encode([user("What <image> is", 1)])
    assert ids.count(len(llama_kind)) == 4
    assert encoder.decode([index for index in ids if index != len(llama_kind)]).endswith("What <image> is;A:")


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": 3}')
    with pytest.raises(MobileMMError, match=r"tokenizer\.json: not a tokenizer that can be read"):
        PromptTokenizer(path, PROMPT, 5, 4)


def test_truncation_and_padding_of_a_tokenizer_file_do_not_apply(
    tmp_path: Path, llama_kind: PreTrainedTokenizerFast
) -> None:
    state = json.loads(llama_kind.backend_tokenizer.to_str())
    state["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(state))
    assert len(PromptTokenizer(path, PROMPT, 9999, 4).encode([user("a" * 50)])) > 50
