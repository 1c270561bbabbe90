"""Conversation templates: a template owns the prompt and, with it, what is supervised in training.

A template turns messages into segments: pieces of text, each supervised or not, and image slots. The
processor tokenizes them; the loss mask follows from the segments, never from counting tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mobilemm.errors import MobileMMError

IMAGE_MARK = "<image>"
# Stands for an image while a Jinja template renders; private-use characters that no text holds.
_SENTINEL = "\ue00f\ue0a1\ue00f"

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation: text, or one image slot where `is_image` is set."""

    text: str = ""
    is_image: bool = False
    supervised: bool = False


class Template(Protocol):
    """Messages → segments."""

    name: str
    stop: tuple[str, ...]
    add_special_tokens: bool

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Segment]:
        """The conversation as segments, ending with the cue for the assistant when asked to."""


IMAGE = Segment(is_image=True)


def split_content(message: Message) -> tuple[int, str]:
    """A message's number of images, and its text. Content is a string or a list of typed parts."""
    content = message.get("content")
    if isinstance(content, str):
        return 0, content
    if not isinstance(content, Sequence):
        raise MobileMMError(f"a message's content must be text or a list of parts, not {content!r}")
    images, texts = 0, []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            images += 1
        elif kind == "text":
            if not isinstance(part.get("text"), str):
                raise MobileMMError(f"a message's text part needs the key 'text': a string, not {part!r}")
            texts.append(part["text"])
        else:
            raise MobileMMError(f"a part of a message must have the type 'text' or 'image', not {kind!r}")
    return images, "".join(texts)


def _check_roles(messages: Sequence[Message]) -> None:
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise MobileMMError(f"message {index}: a table of role and content is expected, not {message!r}")
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise MobileMMError(f"message {index}: unknown role {role!r}; known: system, user, assistant")
        if role == "system" and index:
            raise MobileMMError(f"message {index}: a system message can only stand first")
        if role != "user" and split_content(message)[0]:
            raise MobileMMError(f"message {index}: an image can only stand in a user's message")


class VicunaTemplate:
    """`v1` of Vicuna, LLaVA-1.5 and MobileVLM: `{system} USER: {question} ASSISTANT: {answer}</s>`.

    A turn's images stand in front of its text, each followed by a line break.
    """

    name = "v1"
    stop: tuple[str, ...] = ("</s>",)
    add_special_tokens = True
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Segment]:
        _check_roles(messages)
        segments = [Segment(self.system)]
        if messages and messages[0]["role"] == "system":
            segments = [Segment(split_content(messages[0])[1])]
            messages = messages[1:]
        for index, message in enumerate(messages):
            images, text = split_content(message)
            if message["role"] == "user":
                closed = index and messages[index - 1]["role"] == "assistant"
                segments.append(Segment("USER: " if closed else " USER: "))
                for _ in range(images):
                    segments += [IMAGE, Segment("\n")]
                segments.append(Segment(text))
            else:
                segments += [Segment(" ASSISTANT:"), Segment(f" {text}</s>", supervised=True)]
        if add_generation_prompt:
            segments.append(Segment(" ASSISTANT:"))
        return segments


class PlainTemplate:
    """`plain`, for captions: the image, the caption, a line break; the user's words are dropped."""

    name = "plain"
    stop: tuple[str, ...] = ("\n",)
    add_special_tokens = True

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Segment]:
        _check_roles(messages)
        segments: list[Segment] = []
        for message in messages:
            images, text = split_content(message)
            segments += [IMAGE] * images
            if message["role"] == "assistant":
                segments.append(Segment(f"{text}\n", supervised=True))
        return segments


class ChatMLTemplate:
    """`chatml` (Qwen and others): `<|im_start|>{role}`, the content, `<|im_end|>`; no default system."""

    name = "chatml"
    stop: tuple[str, ...] = ("<|im_end|>",)
    add_special_tokens = False

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Segment]:
        _check_roles(messages)
        segments: list[Segment] = []
        for message in messages:
            images, text = split_content(message)
            segments.append(Segment(f"<|im_start|>{message['role']}\n"))
            for _ in range(images):
                segments += [IMAGE, Segment("\n")]
            segments.append(Segment(f"{text}<|im_end|>", supervised=message["role"] == "assistant"))
            segments.append(Segment("\n"))
        if add_generation_prompt:
            segments.append(Segment("<|im_start|>assistant\n"))
        return segments


class TokenizerTemplate:
    """`tokenizer`: whatever the tokenizer's own Jinja chat template says.

    What an assistant's message adds behind its generation prompt is supervised. A template whose rendering
    of the beginning changes when more follows is an error, since no mask would be true.
    """

    name = "tokenizer"
    stop: tuple[str, ...] = ()
    add_special_tokens = False

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise MobileMMError("template 'tokenizer': this tokenizer has no chat template; use v1 or chatml")
        self.tokenizer = tokenizer
        self.stop = (tokenizer.eos_token,) if tokenizer.eos_token else ()
        self.takes_parts = self._takes_parts()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[Segment]:
        _check_roles(messages)
        plain = [self._plain(message) for message in messages]
        segments: list[Segment] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._apply(plain[:index], True)
            full = self._apply(plain[: index + 1], False)
            if not (prompt.startswith(done) and full.startswith(prompt)):
                raise MobileMMError(
                    f"the tokenizer's chat template renders message {index} so that the text before it"
                    " changes: use the template v1, plain or chatml for training"
                )
            segments += self._segments(prompt[len(done) :], False)
            answer = full[len(prompt) :]
            # Nothing is generated behind the end token, so nothing is learned there.
            end = (
                answer.rfind(self.stop[0]) + len(self.stop[0])
                if self.stop and self.stop[0] in answer
                else None
            )
            segments += self._segments(answer[:end], True)
            segments += self._segments(answer[len(answer[:end]) :], False)
            done = full
        full = self._apply(plain, add_generation_prompt)
        if not full.startswith(done):
            raise MobileMMError("the tokenizer's chat template renders a finished answer anew; use another")
        return segments + self._segments(full[len(done) :], False)

    def _apply(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        if not messages:
            return ""
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError) as error:
            raise MobileMMError(
                f"the tokenizer's chat template refuses this conversation: {error}"
            ) from error

    def _plain(self, message: Message) -> dict[str, Any]:
        images, text = split_content(message)
        text = f"{_SENTINEL}\n" * images + text
        content = [{"type": "text", "text": text}] if self.takes_parts else text
        return {"role": message["role"], "content": content}

    def _takes_parts(self) -> bool:
        try:
            probe = [{"role": "user", "content": [{"type": "text", "text": _SENTINEL}]}]
            rendered = self._apply(probe, False)
        except MobileMMError:
            return False
        return _SENTINEL in rendered and "{'" not in rendered

    @staticmethod
    def _segments(text: str, supervised: bool) -> list[Segment]:
        segments: list[Segment] = []
        for index, piece in enumerate(text.split(_SENTINEL)):
            if index:
                segments.append(IMAGE)
            if piece:
                segments.append(Segment(piece, supervised=supervised))
        return segments


TEMPLATES: dict[str, Callable[[], Template]] = {
    template.name: template for template in (VicunaTemplate, PlainTemplate, ChatMLTemplate)
}


def find_template(name: str, tokenizer: Any = None) -> Template:
    """The template of that name; `tokenizer` stands for the tokenizer's own."""
    if name == TokenizerTemplate.name:
        return TokenizerTemplate(tokenizer)
    if name not in TEMPLATES:
        known = ", ".join([*TEMPLATES, TokenizerTemplate.name])
        raise MobileMMError(f"unknown template {name!r}; known: {known}")
    return TEMPLATES[name]()
