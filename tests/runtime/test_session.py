"""Conversations with bundles: answers are PyTorch's, whatever the cache, an interruption, an error did."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mobilemm
from mobilemm.errors import MobileMMError
from mobilemm.export.families import split_model
from mobilemm.models.checkpoints import Loaded
from mobilemm.runtime.backends import Array
from mobilemm.runtime.backends.onnx import OnnxBackend, OnnxDecoder
from mobilemm.runtime.bundle import Bundle, open_bundle
from mobilemm.runtime.pytorch import ChatSession
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.session import Session, rope_positions
from tests.families import conftest as tiny
from tests.runtime.bundles import write_bundle

RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (30, 40), "blue")
GRADIENT = Image.radial_gradient("L").resize((64, 50)).convert("RGB")
TOKENS = 12


class Watched(OnnxBackend):
    """The real backend, which notes how often each part ran and was loaded."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, threads=1)
        self.ran: list[str] = []
        self.released: list[str] = []

    def run(self, part: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.ran.append(part)
        return super().run(part, inputs)

    def release(self, part: str) -> None:
        self.released.append(part)
        super().release(part)


@pytest.fixture(scope="module")
def backend(bundle: Bundle) -> Watched:
    return Watched(bundle)


@pytest.fixture
def session(bundle: Bundle, backend: Watched) -> Session:
    backend.ran.clear()
    backend.released.clear()
    return Session(bundle, backend, Sampling(TOKENS))


@pytest.fixture
def chat(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> ChatSession:
    """The same model through transformers' `generate`."""
    monkeypatch.setattr(loaded.model.generation_config, "suppress_tokens", None)
    return ChatSession(loaded.model, loaded.processor, Sampling(TOKENS))


def changed(bundle: Bundle, **keys: Any) -> Bundle:
    return dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update=keys))


def with_prompt(bundle: Bundle, **keys: Any) -> Bundle:
    return changed(bundle, prompt=bundle.manifest.prompt.model_copy(update=keys))


def ask(session: Session | ChatSession, *lines: str | Image.Image) -> list[str]:
    """Shows the pictures, says the texts; the answers."""
    answers = []
    for line in lines:
        if isinstance(line, str):
            answers.append(session.reply(line))
        else:
            session.look_at(line)
    return answers


def fresh(session: Session) -> Session:
    """A session over the same conversation, with nothing in its cache."""
    made = Session(session.bundle, session.backend, session.sampling)
    made.messages, made.pending = list(session.messages), list(session.pending)
    return made


# --- the same answers ------------------------------------------------------------------------------------

CONVERSATION = [
    RED,
    "What is this?",
    "And why?",
    BLUE,
    GRADIENT,
    "Which is blue?",
    "Und jetzt? 😀",
    RED,
    "This?",
]


def test_answers_are_those_of_pytorch(session: Session, chat: ChatSession) -> None:
    answers = ask(session, *CONVERSATION)
    assert answers == ask(chat, *CONVERSATION)
    assert len(set(answers)) == len(answers) == 5


def test_in_pieces_as_all_at_once(bundle: Bundle, chat: ChatSession) -> None:
    """Texts and pictures one after the other, as the runners of some runtimes feed them."""
    backend = Watched(bundle)
    backend.prefills_in_pieces = True
    session = Session(bundle, backend, Sampling(TOKENS))
    assert ask(session, *CONVERSATION) == ask(chat, *CONVERSATION)
    image, count = bundle.manifest.model.image_token_id, bundle.manifest.model.num_image_tokens
    ids = [5, 6, *[image] * count, *[image] * count, 7, *[image] * count]
    pieces = list(session._pieces(ids, 2 * count))
    assert [ids[piece] for piece in pieces] == [
        [5, 6],
        [image] * count,
        [image] * count,
        [7, *[image] * count],  # behind the last features a placeholder is a word
    ]


@pytest.mark.slow
def test_with_a_concatenated_cache_too(concatenated: Bundle, chat: ChatSession) -> None:
    session = Session(concatenated, OnnxBackend(concatenated, 1), Sampling(TOKENS))
    assert ask(session, *CONVERSATION) == ask(chat, *CONVERSATION)


def test_a_system_prompt(bundle: Bundle, backend: Watched, loaded: Loaded, chat: ChatSession) -> None:
    session = Session(bundle, backend, Sampling(TOKENS), system="Answer in one word.")
    plain = ask(session, RED, "What is this?")
    wanted = ChatSession(loaded.model, loaded.processor, Sampling(TOKENS), system="Answer in one word.")
    assert plain == ask(wanted, RED, "What is this?")
    assert plain != ask(chat, RED, "What is this?")
    session.reset()
    assert ask(session, RED, "What is this?") == plain


def test_a_repetition_penalty(bundle: Bundle, backend: Watched, loaded: Loaded, chat: ChatSession) -> None:
    sampling = Sampling(TOKENS, repetition_penalty=3.0)
    answers = ask(Session(bundle, backend, sampling), "What is this?")
    assert answers == ask(ChatSession(loaded.model, loaded.processor, sampling), "What is this?")
    assert answers != ask(chat, "What is this?")


FAMILIES = [tiny.smolvlm, tiny.fast_vlm, tiny.internvl, tiny.qwen2_5_vl]


@pytest.mark.slow
@pytest.mark.parametrize("build", FAMILIES, ids=lambda build: build.__name__)
def test_families(build: Any, tmp_path: Path) -> None:
    """Against transformers' `generate`, through the processor that takes one tile a picture."""
    build(tmp_path / "model")
    model, processor = mobilemm.load(tmp_path / "model")
    bundle = open_bundle(write_bundle(model, processor, tmp_path / "bundle"))
    session = Session(bundle, OnnxBackend(bundle, 1), Sampling(8))
    lines = [RED, "What is this?", "And why?", GRADIENT, BLUE, "Which is blue?"]
    assert ask(session, *lines) == ask(
        ChatSession(model, split_model(model, processor).processor, Sampling(8)), *lines
    )


def test_positions_in_three_dimensions(tmp_path: Path) -> None:
    """transformers' own, for text, two pictures of 2×3 tokens, and text."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        vision_config={"depth": 1, "num_heads": 1, "hidden_size": 16, "spatial_merge_size": 2},
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 64},
        image_token_id=50,
    )
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    ids = [1, 2, 3, *[50] * 6, 4, 5, *[50] * 6, 6, 7, 8]
    wanted, _ = model.model.get_rope_index(
        torch.tensor([ids]),
        mm_token_type_ids=torch.tensor([[int(index == 50) for index in ids]]),
        image_grid_thw=torch.tensor([[1, 4, 6], [1, 4, 6]]),
    )
    assert np.array_equal(rope_positions(ids, 50, (2, 3)), wanted[:, 0].numpy())
    assert np.array_equal(rope_positions([1, 2, 3], 50, (2, 3)), np.tile(np.arange(3), (3, 1)))


# --- streaming -------------------------------------------------------------------------------------------


def test_pieces_join_to_the_answer(session: Session) -> None:
    session.look_at(RED)
    pieces = list(session.stream("What is this?"))
    assert len(pieces) > 3
    [_, answer] = session.messages
    assert answer["content"][0]["text"] == "".join(pieces)


def test_a_stop_string_of_the_manifest_ends_the_answer(session: Session, bundle: Bundle) -> None:
    [whole] = ask(session, "What is this?")
    stop = whole[4:7]
    stopping = Session(with_prompt(bundle, stop=[stop]), session.backend, Sampling(TOKENS))
    pieces = list(stopping.stream("What is this?"))
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert stopping.stats is not None
    assert session.stats is not None
    assert stopping.stats.new_tokens < session.stats.new_tokens


def test_an_end_token_ends_the_answer(session: Session, bundle: Bundle) -> None:
    heard: list[int] = []
    decode = session.tokenizer.decode
    session.tokenizer.decode = lambda ids: heard.extend(ids[-1:]) or decode(ids)  # type: ignore[assignment,func-returns-value]
    [whole] = ask(session, "What is this?")
    fourth = list(dict.fromkeys(heard))[3]
    model = bundle.manifest.model.model_copy(update={"eos_token_ids": [fourth]})
    ending = Session(changed(bundle, model=model), session.backend, Sampling(TOKENS))
    [answer] = ask(ending, "What is this?")
    assert whole.startswith(answer)
    assert ending.stats is not None
    assert ending.stats.new_tokens == 3


def test_sampling(bundle: Bundle, backend: Watched) -> None:
    def answer(**sampling: Any) -> str:
        return Session(bundle, backend, Sampling(TOKENS, **sampling)).reply("What?")

    greedy = answer()
    assert answer(temperature=2.0, seed=1) == answer(temperature=2.0, seed=1) != greedy
    assert answer(temperature=2.0, seed=1) != answer(temperature=2.0, seed=2)
    for only_the_best in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert answer(temperature=2.0, seed=1, **only_the_best) == greedy


# --- the cache -------------------------------------------------------------------------------------------


def test_only_what_is_new_is_read(session: Session) -> None:
    """The second turn reads behind the first prompt, and answers as if all had been read anew."""
    ask(session, RED, "What is this?")
    assert session.stats is not None
    before = session.stats.prompt_tokens
    assert session.stats.cached_tokens == 0
    other = fresh(session)
    answer = session.reply("And why?")
    assert before <= session.stats.cached_tokens < session.stats.prompt_tokens
    assert other.reply("And why?") == answer
    assert other.stats is not None
    assert (other.stats.cached_tokens, other.stats.prompt_tokens) == (0, session.stats.prompt_tokens)


def test_what_was_answered_is_not_read_again(bundle: Bundle, backend: Watched, loaded: Loaded) -> None:
    """When an answer's text gives the same tokens again, all of them are in the cache but the last."""
    tokenizer = loaded.processor.tokenizer
    answer = tokenizer(" What is this", add_special_tokens=False)["input_ids"][
        1:
    ]  # behind the prompt's space

    class Scripted(Watched):
        def decoder(self) -> Any:
            decoder = super().decoder()
            real, left = decoder.decode, [*answer, 2]

            def decode(*arguments: Any) -> Array:
                logits = np.zeros_like(real(*arguments))
                logits[0, 0, left.pop(0) if left else 2] = 1
                return logits

            decoder.decode = decode  # type: ignore[method-assign]
            return decoder

    session = Session(with_prompt(bundle, stop=[]), Scripted(bundle), Sampling(TOKENS))
    assert session.reply("And?").strip() == "What is this"
    assert session.stats is not None
    before = session.stats.prompt_tokens
    session.reply("And why?")
    assert session.stats.cached_tokens >= before + len(answer) - 1


def test_another_picture_in_the_same_place(session: Session) -> None:
    ask(session, RED, "What is this?")
    session.reset()
    answers = ask(session, BLUE, "What is this?")
    assert session.stats is not None
    ids = session.tokenizer.encode(session.messages[:1])
    assert session.stats.cached_tokens == ids.index(session.manifest.model.image_token_id)
    other = Session(session.bundle, session.backend, session.sampling)
    assert ask(other, BLUE, "What is this?") == answers
    # The same once more: only the last token is run, for its logits.
    session.reset()
    assert ask(session, BLUE, "What is this?") == answers
    assert session.stats.cached_tokens == session.stats.prompt_tokens - 1


def test_a_picture_is_looked_at_once(session: Session, backend: Watched, tmp_path: Path) -> None:
    ask(session, RED, "What?", RED, "And?")
    assert backend.ran.count("vision") == 1
    session.reset()
    RED.save(tmp_path / "the same.png")
    session.look_at(tmp_path / "the same.png")
    session.reply("And now?")
    assert backend.ran.count("vision") == 1
    ask(session, BLUE, "And?")
    assert backend.ran.count("vision") == 2


def test_the_vision_part_may_go_when_it_has_looked(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Watched(bundle)
    released_before_decoder: list[str] = []
    open_decoder = backend.decoder

    def decoder() -> OnnxDecoder:
        released_before_decoder.extend(backend.released)
        return open_decoder()

    monkeypatch.setattr(backend, "decoder", decoder)
    session = Session(bundle, backend, Sampling(4), keep_vision=False)
    ask(session, RED, "What?")
    assert backend.released == released_before_decoder == ["vision"]
    assert sorted(backend._sessions) == ["decoder", "embed"]
    ask(session, BLUE, "And?")  # loaded once more


def test_without_a_picture_the_vision_part_is_not_loaded(bundle: Bundle) -> None:
    backend = Watched(bundle)
    Session(bundle, backend, Sampling(2)).reply("What?")
    assert sorted(backend._sessions) == ["decoder", "embed"]


# --- what goes wrong -------------------------------------------------------------------------------------


def test_a_stream_closed_early(session: Session) -> None:
    """What had been said is the answer, and the conversation goes on as if nothing more had been computed."""
    session.look_at(RED)
    stream: Iterator[str] = session.stream("What is this?")
    said = next(stream) + next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert session.pending == []
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    assert session.messages[1]["content"][0]["text"] == said
    assert fresh(session).reply("And why?") == session.reply("And why?")


def test_a_stream_closed_by_ctrl_c(session: Session) -> None:
    stream: Any = session.stream("What is this?")
    said = next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    assert session.messages[1]["content"][0]["text"] == said
    assert fresh(session).reply("And why?") == session.reply("And why?")


@pytest.mark.parametrize("step", [0, 5, 9])
@pytest.mark.parametrize("when", ["before", "behind"])
def test_an_interruption_within_a_step(bundle: Bundle, step: int, when: str) -> None:
    """Ctrl-C while the runtime works: the step may have been done or not."""

    class Interrupted(Watched):
        def decoder(self) -> Any:
            decoder = super().decoder()
            real, left = decoder.decode, [step]

            def decode(*arguments: Any) -> Array:
                left[0] -= 1
                if left[0] == -1:
                    if when == "behind":
                        real(*arguments)
                    raise KeyboardInterrupt
                return real(*arguments)

            decoder.decode = decode  # type: ignore[method-assign]
            return decoder

    session = Session(bundle, Interrupted(bundle), Sampling(TOKENS))
    session.look_at(RED)
    with pytest.raises(KeyboardInterrupt):
        session.reply("What is this?")
    assert len(session.messages) == (2 if step else 0)
    assert len(session.pending) == (0 if step else 1)
    other = fresh(session)
    other.backend = OnnxBackend(bundle, 1)
    assert session.reply("And why?") == other.reply("And why?")


def test_what_fails_within_an_answer_is_as_if_it_had_not_been_asked(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = session.reply("What is this?")
    session.look_at(RED)
    run, left = session.backend.run, [4]

    def failing(part: str, inputs: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise MobileMMError("out of memory")
        return run(part, inputs)

    monkeypatch.setattr(session.backend, "run", failing)
    with pytest.raises(MobileMMError, match="out of memory"):
        session.reply("And this?")
    assert [message["content"][-1]["text"] for message in session.messages] == ["What is this?", first]
    assert len(session.pending) == 1
    monkeypatch.undo()
    assert fresh(session).reply("And this?") == session.reply("And this?")


def test_a_conversation_that_outgrows_the_context(session: Session) -> None:
    first = ask(session, RED, "What is this?")
    session.look_at(BLUE)
    with pytest.raises(MobileMMError, match=r"the prompt is \d+ tokens long, .* context is 512: shorten"):
        session.reply("a " * 400)
    assert len(session.messages) == 2
    assert len(session.pending) == 1
    session.reply("And this?")
    session.reset()
    assert ask(session, RED, "What is this?") == first


def test_an_answer_ends_where_the_context_ends(session: Session) -> None:
    room = 512 - len(session.tokenizer.encode([{"role": "user", "content": ""}]))
    letters = "".join("ab"[index % 2] for index in range(room - 3))
    session.sampling = Sampling(50)
    session.reply(letters)
    assert session.stats is not None
    assert session.stats.prompt_tokens + session.stats.new_tokens == 512
    assert 0 < session.stats.new_tokens < 50


def test_a_bundle_without_pictures(bundle: Bundle, backend: Watched) -> None:
    session = Session(changed(bundle, image=None), backend)
    with pytest.raises(MobileMMError, match="this bundle takes no pictures"):
        session.look_at(RED)


def test_a_picture_that_cannot_be_read(session: Session, tmp_path: Path) -> None:
    session.look_at(RED)
    with pytest.raises(MobileMMError, match="No such file"):
        session.look_at(tmp_path / "none.png")
    assert len(session.pending) == 1


def test_stats(session: Session) -> None:
    session.look_at(RED)
    session.reply("What is this?")
    stats = session.stats
    assert stats is not None
    assert stats.new_tokens == TOKENS
    assert stats.decode_steps == TOKENS - 1
    assert stats.image_seconds + stats.prefill_seconds <= stats.ttft
    assert stats.prefill_rate == pytest.approx(stats.prompt_tokens / stats.prefill_seconds)
    assert stats.decode_rate == pytest.approx((TOKENS - 1) / stats.decode_seconds)
    assert str(stats).startswith("ttft 0.")
