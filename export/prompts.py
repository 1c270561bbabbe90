"""A processor's chat template → the manifest's `Prompt`, which any language can follow, and the proof."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError
from PIL import Image as PIL

from mobilemm.data.processor import MobileMMProcessor
from mobilemm.data.templates import IMAGE_MARK
from mobilemm.errors import MobileMMError, one_line
from mobilemm.export.split import SplitModel
from mobilemm.runtime.manifest import Prompt, RenderedExample, Turn
from mobilemm.runtime.prompt import PromptTokenizer, render, with_marks

# Words that no template knows, to be found again in what it writes.
SYSTEM, QUESTION, ANSWER, LATER = "Probesystem", "Probequestion", "Probeanswer", "Probelater"

Render = Callable[..., str]


def derive_prompt(split: SplitModel) -> Prompt:
    """How a model's conversations are written, found by letting its processor write some.

    What is found is then compared, text and ids, with the processor's own rendering of a dozen conversations,
    a few of which become the prompt's examples.

    Raises MobileMMError when the processor has no chat template or no `tokenizers` tokenizer, and when its
    template cannot be said in a `Prompt`: with the conversation that comes out differently.
    """
    processor = split.processor
    if not isinstance(processor, MobileMMProcessor) and not getattr(processor, "chat_template", None):
        raise MobileMMError(f"{split.family}: its processor has no chat template, which a bundle needs")
    tokenizer = getattr(processor.tokenizer, "backend_tokenizer", None)
    if tokenizer is None:
        raise MobileMMError(f"{split.family}: {type(processor.tokenizer).__name__} has no tokenizer.json")
    try:
        prompt = _probe(_renderer(processor), split)
    except _InexpressibleError as error:
        raise _cannot(split, str(error)) from None

    def encoder(prompt: Prompt) -> PromptTokenizer:
        return PromptTokenizer(tokenizer, prompt, split.image_token_id, split.num_image_tokens)

    begin = [_message("user", "What is this?")]
    if encoder(prompt).encode(begin) != _ids(processor, begin):
        prompt = prompt.model_copy(update={"add_bos": True})
    return prompt.model_copy(update={"examples": _prove(prompt, split, encoder(prompt))})


def _message(role: str, text: str, images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


# --- what the processor writes ---------------------------------------------------------------------------


def _renderer(processor: Any) -> Render:
    def rendered(messages: Sequence[Any], generate: bool = False) -> str:
        try:
            return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except (ValueError, TypeError, LookupError, TemplateError, MobileMMError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise _InexpressibleError(f"a conversation of {roles} is refused: {one_line(error)}") from error

    return rendered


def _ids(processor: Any, messages: Sequence[Any]) -> list[int]:
    picture = PIL.new("RGB", (40, 30), "white")
    shown = [
        {
            "role": message["role"],
            "content": [
                {"type": "image", "image": picture} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]
    encoded = processor.apply_chat_template(
        shown, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    return encoded["input_ids"][0].tolist()


# --- probing ---------------------------------------------------------------------------------------------


class _InexpressibleError(Exception):
    """Why a template cannot be said in a `Prompt`."""


def _cut(rendered: str, *marks: str) -> list[str]:
    """What stands before, between and behind the marks."""
    pieces = []
    for mark in marks:
        before, found, rendered = rendered.partition(mark)
        if not found:
            raise _InexpressibleError(f"{mark!r} is not to be found in what the template writes")
        pieces.append(before)
    return [*pieces, rendered]


def _without(text: str, beginning: str) -> str:
    if not text.startswith(beginning):
        raise _InexpressibleError(f"{text!r} does not begin with {beginning!r}, as it does elsewhere")
    return text[len(beginning) :]


def _before(text: str, end: str) -> str:
    if not text.endswith(end):
        raise _InexpressibleError(f"{text!r} does not end with {end!r}, as it does elsewhere")
    return text[: len(text) - len(end)]


def _probe(rendered: Render, split: SplitModel) -> Prompt:
    question, answer = _message("user", QUESTION), _message("assistant", ANSWER)
    pictures = split.num_image_tokens > 0
    mark = split.processor.image_token
    image: dict[str, Any] = {"image_prefix": split.image_prefix, "image_suffix": split.image_suffix}
    pre = post = ""
    stop = (
        list(split.processor.conversation_template.stop)
        if isinstance(split.processor, MobileMMProcessor)
        else []
    )
    if QUESTION not in rendered([question]):  # a template for captions
        before, after = _cut(rendered([question, answer]), ANSWER)
        return Prompt(
            begin="",
            system=None,
            user=Turn(prefix="", suffix="", text=False),
            assistant=Turn(prefix=before, suffix=after),
            generation=rendered([question], True),
            stop=stop,
            **image,
        )

    head, ending = _cut(rendered([question], True), QUESTION)
    _, suffix = _cut(rendered([question]), QUESTION)
    _, between, after = _cut(rendered([question, answer]), QUESTION, ANSWER)
    if not (ending.startswith(suffix) and between.startswith(suffix)):
        suffix = ""
    later = [question, answer, _message("user", LATER)]
    _, _, to_later, _ = _cut(rendered(later), QUESTION, ANSWER, LATER)
    if not to_later.startswith(after):
        after = ""
    assistant = Turn(prefix=_without(between, suffix), suffix=after)

    if pictures:
        two, middle, post, _ = _cut(rendered([_message("user", QUESTION, 2)]), mark, mark, QUESTION)
        pre = _without(middle, post)
        head_before_image = _before(two, pre)

    def turn(prefix: str, before_image: Callable[[], str]) -> Turn:
        with_image = before_image() if pictures else prefix
        return Turn(
            prefix=prefix, suffix=suffix, prefix_before_image=None if with_image == prefix else with_image
        )

    def later_before_image() -> str:
        messages = [question, answer, _message("user", LATER, 1)]
        _, _, found, _, _ = _cut(rendered(messages), QUESTION, ANSWER, mark, LATER)
        return _before(_without(found, after), pre)

    later_user = turn(_without(to_later, after), later_before_image)

    system, behind_system = _system(rendered, mark, pre, turn)
    begin, prefix = "", head
    for candidate in (behind_system, later_user):
        if candidate is not None and head.endswith(candidate.prefix):
            begin, prefix = _before(head, candidate.prefix), candidate.prefix
            break
    user = turn(prefix, lambda: _without(head_before_image, begin))

    return Prompt(
        begin=begin,
        system=system,
        user=user,
        assistant=assistant,
        generation=_without(ending, suffix),
        later_user=None if later_user == user else later_user,
        user_after_system=None if behind_system in (None, user) else behind_system,
        image_prefix=pre + split.image_prefix,
        image_suffix=split.image_suffix + post,
        strip=_stripping(rendered, pictures),
        stop=stop,
    )


def _system(
    rendered: Render, mark: str, pre: str, turn: Callable[[str, Callable[[], str]], Turn]
) -> tuple[Turn | None, Turn | None]:
    """The system message's turn and the user's behind it; None, None when the template takes none."""
    instruction, question = _message("system", SYSTEM), _message("user", QUESTION)
    try:
        before, between, _ = _cut(rendered([instruction, question]), SYSTEM, QUESTION)
    except _InexpressibleError:
        return None, None
    try:
        _, suffix = _cut(rendered([instruction]), SYSTEM)
    except _InexpressibleError:  # it may be a part of the user's first turn
        suffix = ""
    if not between.startswith(suffix):
        suffix = ""

    def before_image() -> str:
        messages = [instruction, _message("user", QUESTION, 1)]
        _, found, _, _ = _cut(rendered(messages), SYSTEM, mark, QUESTION)
        return _before(_without(found, suffix), pre)

    return Turn(prefix=before, suffix=suffix), turn(_without(between, suffix), before_image)


def _stripping(rendered: Render, pictures: bool) -> Any:
    spaced = f"  {QUESTION}  "
    if spaced in rendered([_message("user", spaced)]):
        return "none"
    if pictures and f"  {QUESTION}" in rendered([_message("user", spaced, 1)]):
        return "content"
    return "text"


# --- proving ---------------------------------------------------------------------------------------------


def conversations(system: bool, pictures: bool) -> dict[str, list[dict[str, Any]]]:
    """Conversations by what is particular of them, with a system message and with pictures where allowed."""
    hello, answer = _message("user", "What is this?"), _message("assistant", "A house, I think.")
    found = {
        "one question": [hello],
        "two turns": [hello, answer, _message("user", "And why?")],
        "three turns": [
            hello,
            answer,
            hello,
            _message("assistant", "Ünsinn… 😀"),
            _message("user", "日本語?"),
        ],
        "other scripts": [_message("user", "Qu'est-ce que c'est? Ça, là: 你好, мир 👩‍🚀\nнет")],
        "spaces around a question": [_message("user", "  What is this?  ")],
        "spaces around an answer": [hello, _message("assistant", " A house. "), hello],
    }
    if pictures:
        one, two = _message("user", "What is this?", 1), _message("user", "What differs?", 2)
        found |= {
            "a picture": [one],
            "two pictures": [two],
            "a picture, then a second question": [one, answer, _message("user", "And why?")],
            "a picture later": [hello, answer, one],
            "pictures in two turns": [one, answer, two],
            "spaces around a question about a picture": [_message("user", "  What is this?  ", 1)],
        }
    if system:
        instruction = _message("system", "Answer in one word, bitte.")
        found |= {
            f"a system message, {name}": [instruction, *found[name]]
            for name in ("one question", "two turns", "a picture", "pictures in two turns")
            if name in found
        }
    return found


def _prove(prompt: Prompt, split: SplitModel, tokenizer: PromptTokenizer) -> list[RenderedExample]:
    rendered = _renderer(split.processor)
    image = f"{split.image_prefix}{IMAGE_MARK}{split.image_suffix}"
    examples = []
    for name, messages in conversations(prompt.system is not None, split.num_image_tokens > 0).items():
        try:
            wanted = rendered(messages, True).replace(split.processor.image_token, image)
        except _InexpressibleError as error:
            raise _cannot(split, f"{name}: {error}") from None
        pieces = render(prompt, messages)
        if with_marks(pieces) != wanted:
            raise _cannot(split, f"{name}: it writes {wanted!r}, a prompt by parts {with_marks(pieces)!r}")
        ids, wanted_ids = tokenizer.encode_pieces(pieces), _ids(split.processor, messages)
        if ids != wanted_ids:
            place = next(
                (index for index, pair in enumerate(zip(ids, wanted_ids, strict=False)) if len({*pair}) > 1),
                min(len(ids), len(wanted_ids)),
            )
            raise _cannot(
                split,
                f"{name}: from place {place} its ids are {wanted_ids[place : place + 5]}, those of a prompt"
                f" by parts {ids[place : place + 5]}",
            )
        if name in ("one question", "three turns", "pictures in two turns", "other scripts"):
            examples.append(RenderedExample(messages=messages, rendered=with_marks(pieces), input_ids=ids))
    return examples


def _cannot(split: SplitModel, why: str) -> MobileMMError:
    return MobileMMError(
        f"{split.family}: the chat template cannot be written into a bundle, which knows no Jinja ({why});"
        " give the processor a plainer chat template"
    )
