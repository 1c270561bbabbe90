"""Text that comes piece by piece: whole characters, and never a part of a stop string."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mobilemm.runtime.streaming import TextStream

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = Tokenizer(models.BPE({letter: index for index, letter in enumerate(LETTERS)}, []))
BYTES.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES.decoder = decoders.ByteLevel()


def streamed(text: str, *stop: str, tokenizer: Any = BYTES) -> tuple[list[str], bool]:
    """The pieces that came while tokens came, and at the end; and whether a stop string ended them."""
    stream = TextStream(tokenizer.decode, stop)
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids = getattr(ids, "ids", ids)
    pieces = [stream.put(token) for token in ids]
    pieces.append(stream.end())
    return [piece for piece in pieces if piece], stream.stopped


TEXTS = st.text(alphabet=st.one_of(st.sampled_from(" ab<|/s>é😀"), st.characters(codec="utf-8")), max_size=30)


@settings(max_examples=200, deadline=None)
@given(TEXTS.filter(lambda text: "\ufffd" not in text))
def test_pieces_join_to_the_text(text: str) -> None:
    pieces, stopped = streamed(text)
    assert "".join(pieces) == text
    assert not stopped
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(
    TEXTS.filter(lambda text: "\ufffd" not in text),
    st.lists(st.sampled_from(["</s>", "<|b|>", "ab", "a", "<<|"]), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    """Byte by byte, so that each stop string comes in parts: what is shown is the text before it, no more."""
    pieces, stopped = streamed(text, *stop)
    ends = [end for end in range(len(text) + 1) for string in stop if text[:end].endswith(string)]
    if not ends:
        assert ("".join(pieces), stopped) == (text, False)
        return
    # The string that is complete first ends the text; of several, the one that begins first.
    complete = text[: min(ends)]
    wanted = min(complete.find(string) for string in stop if string in complete)
    assert ("".join(pieces), stopped) == (text[:wanted], True)


def test_an_emoji_comes_whole() -> None:
    pieces, _ = streamed("a 😀🏽é!")
    assert pieces == ["a", " ", "😀", "🏽", "é", "!"]


def test_what_could_be_a_stop_string_is_held_back_until_it_is_not() -> None:
    stream = TextStream(BYTES.decode, ["<|end|>"])
    shown = [stream.put(token) for token in BYTES.encode("a<|en|").ids]
    assert shown == ["a", "", "", "", "", "<|en|"]
    assert stream.end() == ""


def test_the_beginning_of_a_stop_string_at_the_end_is_text() -> None:
    assert streamed("a</s", "</s>") == (["a", "</s"], False)


def test_nothing_comes_behind_a_stop_string() -> None:
    stream = TextStream(BYTES.decode, ["\n"])
    assert [stream.put(token) for token in BYTES.encode("a\nb").ids] == ["a", "", ""]
    assert stream.stopped
    assert stream.end() == ""


def test_a_stop_string_within_one_token() -> None:
    words = {"yes": 0, "no</s>maybe": 1}
    stream = TextStream(lambda ids: "".join(list(words)[index] for index in ids), ["</s>"])
    assert [stream.put(0), stream.put(1)] == ["yes", "no"]
    assert stream.stopped


def test_unfinished_bytes_are_told_at_the_end() -> None:
    stream = TextStream(BYTES.decode)
    assert [stream.put(token) for token in BYTES.encode("a😀").ids[:-1]] == ["a", "", "", ""]
    assert set(stream.end()) == {"\ufffd"}


@pytest.mark.parametrize("text", ["a line\n is this", "What is this", "a 😀🏽é!"])
def test_a_tokenizer_that_puts_a_space_in_front(text: str, llama_kind: PreTrainedTokenizerFast) -> None:
    pieces, _ = streamed(text, "</s>", tokenizer=llama_kind)
    assert "".join(pieces) == text
    assert len(pieces) > 1
