"""Each family through `mobilemm.load` and ChatSession, against transformers' own documented use of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import mobilemm
from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints import Loaded
from mobilemm.models.checkpoints.inspection import inspect_model
from mobilemm.runtime.pytorch import ChatSession
from mobilemm.runtime.sampling import Sampling

RED = Image.new("RGB", (60, 40), "red")
GRADIENT = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
QUESTION = "What is this?"
TOKENS = 10
NO_TEMPLATE = "none: each question stands by itself"

# PaliGemma's processor, on its way to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="session")
def reference(family: Any) -> Loaded:
    """The folder as transformers' users open it."""
    model = AutoModelForImageTextToText.from_pretrained(family.folder).eval()
    return Loaded(model, AutoProcessor.from_pretrained(family.folder))


@pytest.fixture(scope="session")
def loaded(family: Any) -> Loaded:
    return mobilemm.load(family.folder)


@pytest.fixture
def session(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> ChatSession:
    """A conversation that keeps what `generate` gave in `session.generated`."""
    session = ChatSession(loaded.model, loaded.processor, Sampling(max_new_tokens=TOKENS))
    session.generated = []  # type: ignore[attr-defined]
    generate = type(loaded.model).generate

    def recorded(*args: Any, **options: Any) -> torch.Tensor:
        session.generated.append(generate(loaded.model, *args, **options))  # type: ignore[attr-defined]
        return session.generated[-1]  # type: ignore[attr-defined]

    monkeypatch.setattr(loaded.model, "generate", recorded, raising=False)
    return session


def turn(role: str, text: str, *pictures: Image.Image) -> dict[str, Any]:
    images = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": role, "content": [*images, {"type": "text", "text": text}]}


def expected(reference: Loaded, *messages: dict[str, Any]) -> tuple[torch.Tensor, str]:
    """transformers' tokens (prompt and answer) and the answer's text."""
    model, processor = reference
    if processor.chat_template:
        inputs = processor.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    else:
        *images, text = messages[-1]["content"]
        inputs = processor(
            text="<image>" * len(images) + text["text"],
            images=[part["image"] for part in images],
            return_tensors="pt",
        )
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    answer = ids[0, inputs["input_ids"].shape[1] :]
    return ids, processor.decode(answer, skip_special_tokens=True)


def check(session: ChatSession, answer: str, wanted: tuple[torch.Tensor, str]) -> None:
    assert torch.equal(session.generated[-1], wanted[0])  # type: ignore[attr-defined]
    assert answer == wanted[1]


def test_one_picture(session: ChatSession, reference: Loaded) -> None:
    session.look_at(RED)
    check(session, session.reply(QUESTION), expected(reference, turn("user", QUESTION, RED)))


def test_two_pictures(session: ChatSession, reference: Loaded) -> None:
    session.look_at(RED)
    session.look_at(GRADIENT)
    check(session, session.reply(QUESTION), expected(reference, turn("user", QUESTION, RED, GRADIENT)))


def test_without_a_picture(family: Any, session: ChatSession, reference: Loaded) -> None:
    if family.needs_picture:
        with pytest.raises(MobileMMError, match="`images` are expected"):
            session.reply(QUESTION)
        return
    check(session, session.reply(QUESTION), expected(reference, turn("user", QUESTION)))


def test_two_turns(family: Any, session: ChatSession, reference: Loaded) -> None:
    session.look_at(RED)
    first = session.reply(QUESTION)
    second = session.reply("Und das?")
    if not family.several_turns:  # each question stands by itself, about the picture shown last
        check(session, second, expected(reference, turn("user", "Und das?", RED)))
        return
    history = [turn("user", QUESTION, RED), turn("assistant", first)]
    check(session, second, expected(reference, *history, turn("user", "Und das?")))


def test_the_picture_is_seen(session: ChatSession) -> None:
    scores = []
    for picture in (RED, GRADIENT.resize(RED.size)):
        session.reset()
        session.look_at(picture)
        inputs = session._encode([turn("user", QUESTION, picture)])
        with torch.no_grad():
            scores.append(session.model(**inputs).logits[0, -1])
    assert not torch.allclose(scores[0], scores[1], atol=1e-3)


def test_inspect(family: Any, reference: Loaded) -> None:
    card = inspect_model(family.folder)
    model = reference.model
    assert card.layout == f"transformers ({family.name})"
    assert card.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert len(card.parts) >= 3
    assert card.image_tokens == family.image_tokens
    assert card.image_size == family.image_size
    assert card.context == 1024
    assert card.template == ("the processor's own" if family.several_turns else NO_TEMPLATE)
    assert card.dtype == "float32"
    # Keys and values of a real cache after three tokens. LFM2's convolutions keep none.
    with torch.no_grad():
        text = model.get_decoder() if hasattr(model, "get_decoder") else model.model.language_model
        cache = text(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    kept = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in kept)
    assert card.kv_cache_bytes_per_token == 4 * numbers / 3
