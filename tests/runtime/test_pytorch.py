"""Conversations on PyTorch: what streams, what is remembered, and what happens when something goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mobilemm.data.templates import VicunaTemplate
from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints import Loaded
from mobilemm.runtime.pytorch import ChatSession, choose_device, choose_dtype
from mobilemm.runtime.sampling import Sampling

RED = Image.new("RGB", (40, 30), "red")
BLUE = Image.new("RGB", (30, 40), "blue")


@pytest.fixture
def session(loaded: Loaded) -> ChatSession:
    return ChatSession(loaded.model, loaded.processor, Sampling(max_new_tokens=12))


def said(session: ChatSession) -> list[tuple[str, str, int]]:
    """The conversation as (role, text, number of pictures)."""
    return [
        (
            message["role"],
            "".join(part["text"] for part in message["content"] if part["type"] == "text"),
            sum(part["type"] == "image" for part in message["content"]),
        )
        for message in session.messages
    ]


# --- a model that says what it is told to ----------------------------------------------------------------


class Parrot:
    """Stands for a model: streams the given ids one by one, as `generate` does."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(
        self, ids: list[int], step: Callable[[int], None] = lambda _: None, context: int = 512
    ) -> None:
        self.ids, self.step = ids, step
        text = SimpleNamespace(max_position_embeddings=context)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.steps = 0
        self.options: dict[str, Any] = {}

    def generate(
        self, *, input_ids: torch.Tensor, streamer: Any, stopping_criteria: Any, **options: Any
    ) -> None:
        self.options = options
        streamer.put(input_ids)
        for index, token in enumerate(self.ids):
            self.step(index)
            streamer.put(torch.tensor([token]))
            self.steps += 1
            if any(bool(stop(input_ids, None).all()) for stop in stopping_criteria):
                break
        streamer.end()


def parrot(loaded: Loaded, text: str, **options: Any) -> tuple[ChatSession, Parrot]:
    tokenizer = loaded.processor.tokenizer
    model = Parrot(tokenizer(text, add_special_tokens=False)["input_ids"], **options)
    return ChatSession(model, loaded.processor), model


def byte_level() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


BYTE_LEVEL = byte_level()


def pieces_of(tokenizer: Any, ids: list[int]) -> list[str]:
    class Processor:
        chat_template = "{{ messages }}"

        def __init__(self) -> None:
            self.tokenizer = tokenizer

        def apply_chat_template(self, *_: Any, **__: Any) -> Any:
            from transformers import BatchFeature

            return BatchFeature({"input_ids": torch.zeros(1, 3, dtype=torch.long)})

    return list(ChatSession(Parrot(ids, context=10_000), Processor()).stream("a"))


TEXTS = st.text(
    alphabet=st.one_of(
        st.sampled_from(" \nab.,"), st.characters(codec="utf-8", exclude_characters="\ufffd▁")
    ),
    max_size=30,
)


@settings(max_examples=50, deadline=None)
@given(TEXTS)
def test_pieces_join_to_the_decoded_text_byte_level(text: str) -> None:
    ids = BYTE_LEVEL(text)["input_ids"]
    pieces = pieces_of(BYTE_LEVEL, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_pieces_join_to_the_decoded_text_llama_kind(llama_kind: PreTrainedTokenizerFast) -> None:
    @settings(max_examples=50, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        ids = llama_kind(text, add_special_tokens=False)["input_ids"]
        pieces = pieces_of(llama_kind, ids)
        assert "".join(pieces) == llama_kind.decode(ids, skip_special_tokens=True)
        assert not any("\ufffd" in piece for piece in pieces)

    check()


def test_a_line_break_keeps_the_space_behind_it(llama_kind: PreTrainedTokenizerFast) -> None:
    ids = llama_kind("a line\n is this", add_special_tokens=False)["input_ids"]
    assert "".join(pieces_of(llama_kind, ids)) == "a line\n is this"


@pytest.mark.parametrize("kind", ["bytes", "llama"])
def test_an_emoji_comes_whole(kind: str, llama_kind: PreTrainedTokenizerFast) -> None:
    tokenizer = BYTE_LEVEL if kind == "bytes" else llama_kind
    ids = tokenizer("a 😀🏽é!", add_special_tokens=False)["input_ids"]
    assert len(ids) > 10  # its characters are spread over several tokens
    pieces = pieces_of(tokenizer, ids)
    assert [piece.strip() for piece in pieces if piece.strip()] == ["a", "😀", "🏽", "é", "!"]


def test_damaged_bytes_do_not_stop_the_stream(llama_kind: PreTrainedTokenizerFast) -> None:
    ids = llama_kind("😀", add_special_tokens=False)["input_ids"]
    ids = [*ids, ids[-4], *llama_kind("this is", add_special_tokens=False)["input_ids"]]
    answer = "".join(pieces_of(llama_kind, ids))
    assert answer.endswith(" this is")


def test_special_tokens_are_not_said(loaded: Loaded) -> None:
    session, model = parrot(loaded, "What is this")
    model.ids = [1, *model.ids, 2]
    assert session.reply("?") == "What is this"


# --- real models -----------------------------------------------------------------------------------------


def test_a_stream_is_what_generate_says(loaded: Loaded, session: ChatSession) -> None:
    session.look_at(RED)
    pieces = list(session.stream("What is this?"))
    prompt = f"{VicunaTemplate.system} USER: <image>\nWhat is this? ASSISTANT:"
    inputs = loaded.processor(images=[RED], text=prompt)
    ids = loaded.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = ids[0, inputs["input_ids"].shape[1] :]
    assert "".join(pieces) == loaded.processor.tokenizer.decode(answer, skip_special_tokens=True)
    assert len(pieces) > 1


def test_several_turns(loaded: Loaded, session: ChatSession) -> None:
    session.look_at(RED)
    first = session.reply("What is this?")
    session.look_at(BLUE)
    second = session.reply("And this?")
    assert said(session) == [
        ("user", "What is this?", 1),
        ("assistant", first, 0),
        ("user", "And this?", 1),
        ("assistant", second, 0),
    ]
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": RED}, {"type": "text", "text": "What is this?"}],
        },
        {"role": "assistant", "content": first},
        {
            "role": "user",
            "content": [{"type": "image", "image": BLUE}, {"type": "text", "text": "And this?"}],
        },
    ]
    inputs = loaded.processor.apply_chat_template(messages, add_generation_prompt=True)
    ids = loaded.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = ids[0, inputs["input_ids"].shape[1] :]
    assert second == loaded.processor.tokenizer.decode(answer, skip_special_tokens=True)


def test_a_system_prompt_and_reset(loaded: Loaded) -> None:
    session = ChatSession(loaded.model, loaded.processor, Sampling(max_new_tokens=4), system="this is a line")
    plain = ChatSession(loaded.model, loaded.processor, Sampling(max_new_tokens=4))
    first = session.reply("What?")
    assert first != plain.reply("What?")
    session.look_at(RED)
    session.reset()
    assert said(session) == [("system", "this is a line", 0)]
    assert session.pending == []
    assert session.reply("What?") == first


def test_a_conversation_that_outgrows_the_context(session: ChatSession) -> None:
    session.look_at(RED)
    session.reply("What is this?")
    before = said(session)
    session.look_at(BLUE)
    with pytest.raises(MobileMMError, match=r"the prompt is \d+ tokens long.* context is 512"):
        session.reply("a " * 400)
    assert said(session) == before
    assert len(session.pending) == 1
    session.reply("And this?")
    assert said(session)[-2] == ("user", "And this?", 1)


def test_an_answer_ends_where_the_context_ends(loaded: Loaded) -> None:
    session, model = parrot(loaded, "a")
    length = session._encode([{"role": "user", "content": [{"type": "text", "text": "a"}]}])[
        "input_ids"
    ].shape[1]
    model.config.get_text_config().max_position_embeddings = length + 3
    session.reply("a")
    assert model.options["max_new_tokens"] == 3


def test_what_fails_while_generating_reaches_the_caller(loaded: Loaded) -> None:
    def fail(index: int) -> None:
        if index == 2:
            raise RuntimeError("out of memory")

    session, _ = parrot(loaded, "What is this", step=fail)
    session.look_at(RED)
    stream = session.stream("What?")
    assert next(stream) == "What"
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream)
    assert said(session) == []
    assert session.pending == [RED]
    assert not _generating()


def _generating() -> bool:
    return any(
        thread.name.startswith("Thread-") and "(run)" in thread.name for thread in threading.enumerate()
    )


def test_a_stream_closed_early(loaded: Loaded) -> None:
    """The model stops; what it had said is its answer, and the conversation goes on."""
    going_on = threading.Event()

    def wait(index: int) -> None:
        if index > 2:
            assert going_on.wait(10)

    session, model = parrot(loaded, "a " * 200, step=wait)
    session.look_at(RED)
    stream = session.stream("What?")
    first = next(stream)
    going_on.set()
    stream.close()  # type: ignore[attr-defined]
    assert not _generating()
    assert model.steps < 400
    assert said(session) == [("user", "What?", 1), ("assistant", first, 0)]
    assert session.pending == []
    model.ids = model.ids[:2]
    assert session.reply("And?")
    assert len(session.messages) == 4


def test_a_stream_closed_by_ctrl_c(loaded: Loaded) -> None:
    session, _ = parrot(loaded, "What is this")
    stream = session.stream("What?")
    first = next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert not _generating()
    assert said(session) == [("user", "What?", 0), ("assistant", first, 0)]


def test_a_stream_never_begun_says_nothing(session: ChatSession) -> None:
    session.look_at(RED)
    session.stream("What?").close()  # type: ignore[attr-defined]
    assert said(session) == []
    assert session.pending == [RED]


def test_sampling_reaches_generate(loaded: Loaded) -> None:
    session, model = parrot(loaded, "a")
    session.sampling = Sampling(7, temperature=0.5, top_k=5, top_p=0.9, repetition_penalty=1.3)
    session.reply("a")
    wanted = {
        "max_new_tokens": 7,
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
    }
    assert wanted.items() <= model.options.items()
    session.sampling = Sampling()
    session.reply("a")
    assert model.options["do_sample"] is False


def test_a_seed_makes_sampling_repeatable(loaded: Loaded) -> None:
    def answer(seed: int | None) -> str:
        sampling = Sampling(16, temperature=2.0, seed=seed)
        return ChatSession(loaded.model, loaded.processor, sampling).reply("What?")

    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = answer(3)
    assert torch.equal(torch.random.get_rng_state(), state)  # a seed is the conversation's own
    assert answer(3) == first
    assert answer(4) != first
    assert answer(None) != answer(None)


def test_sampling_has_its_effect(loaded: Loaded) -> None:
    def answer(**sampling: Any) -> str:
        return ChatSession(loaded.model, loaded.processor, Sampling(16, **sampling)).reply("What?")

    greedy = answer()
    assert answer(temperature=2.0, seed=0) != greedy
    assert answer(temperature=2.0, top_k=1, seed=0) == greedy
    assert answer(temperature=2.0, top_p=1e-6, seed=0) == greedy
    assert answer(temperature=1e-4, seed=0) == greedy
    assert answer(repetition_penalty=5.0) != greedy


def test_a_checkpoint_own_sampling_does_not_disturb_greedy(loaded: Loaded, session: ChatSession) -> None:
    greedy = session.reply("What?")
    generation = loaded.model.generation_config
    before = generation.to_dict()
    try:
        generation.update(do_sample=True, temperature=3.0, top_k=7, repetition_penalty=4.0)
        session.reset()
        assert session.reply("What?") == greedy
    finally:
        generation.update(**before)


# --- pictures --------------------------------------------------------------------------------------------


def test_pictures_come_as_paths_bytes_and_images(
    loaded: Loaded, session: ChatSession, tmp_path: Path
) -> None:
    path = tmp_path / "red.png"
    RED.save(path)
    answers = []
    for picture in (RED, path, str(path), path.read_bytes()):
        session.reset()
        session.look_at(picture)
        answers.append(session.reply("What is this?"))
    assert len(set(answers)) == 1


def test_a_picture_that_cannot_be_read(session: ChatSession, tmp_path: Path) -> None:
    session.look_at(RED)
    with pytest.raises(MobileMMError, match="No such file"):
        session.look_at(tmp_path / "none.png")
    assert session.pending == [RED]


# --- processors of others --------------------------------------------------------------------------------


class Foreign:
    """A processor in transformers' form, with or without a chat template."""

    image_token = "<image>"

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self.tokenizer, self.chat_template = tokenizer, chat_template
        self.calls: list[dict[str, Any]] = []

    def apply_chat_template(self, messages: Any, **_: Any) -> Any:
        from transformers.utils.chat_template_utils import render_jinja_template

        return self(text=render_jinja_template([messages], chat_template=self.chat_template)[0])

    def __call__(self, **given: Any) -> Any:
        from transformers import BatchFeature

        self.calls.append(given)
        return BatchFeature({"input_ids": torch.ones(1, 4, dtype=torch.long)})


def test_without_a_chat_template_each_question_stands_by_itself(loaded: Loaded) -> None:
    model, processor = Parrot([70, 71]), Foreign(loaded.processor.tokenizer)
    session = ChatSession(model, processor)
    session.look_at(RED)
    session.look_at(BLUE)
    session.reply("What is this?")
    session.reply("And?")
    session.look_at(BLUE)
    session.reply("Blue?")
    assert [(call["text"], len(call["images"][0])) for call in processor.calls] == [
        (["<image><image>What is this?"], 2),
        (["<image><image>And?"], 2),
        (["<image>Blue?"], 1),
    ]
    with pytest.raises(MobileMMError, match="no chat template"):
        ChatSession(model, processor, system="a").reply("What?")


def test_a_template_that_refuses(loaded: Loaded) -> None:
    template = "{{ raise_exception('System role not supported') }}"
    session = ChatSession(Parrot([70]), Foreign(loaded.processor.tokenizer, template), system="a")
    with pytest.raises(MobileMMError, match="System role not supported"):
        session.reply("What?")
    assert said(session) == [("system", "a", 0)]


# --- choices ---------------------------------------------------------------------------------------------


def test_devices_and_dtypes() -> None:
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu
    assert choose_device(None).type in ("cpu", "cuda", "mps")
    assert choose_dtype(None, cpu) == torch.float32
    assert choose_dtype("bfloat16", cpu) == torch.bfloat16
    for name in ("nonsense", "cuda:99", "meta:x", ""):
        with pytest.raises(MobileMMError, match="device"):
            choose_device(name)
    with pytest.raises(MobileMMError, match="known: float32, bfloat16, float16"):
        choose_dtype("int3", cpu)
