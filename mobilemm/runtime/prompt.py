"""Conversations → text and token ids, by what the manifest says of the model's template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mobilemm.data.templates import IMAGE_MARK, split_content
from mobilemm.errors import MobileMMError, one_line
from mobilemm.runtime.manifest import Prompt, Turn

Message = Mapping[str, Any]


def render(prompt: Prompt, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[str]:
    """The conversation as text, cut where pictures stand: one piece more than there are pictures.

    A message is `{"role": "system" | "user" | "assistant", "content": text or parts}`, a part
    `{"type": "text", "text": …}` or `{"type": "image", …}`; a user's pictures come in front of the text,
    wherever they stand in the list.

    Raises MobileMMError for a system message where the model takes none, and for a role or part that is
    unknown or out of place.
    """
    before = None
    pieces = [prompt.begin]
    for index, message in enumerate(messages):
        role = message.get("role")
        images, text = split_content(message)
        if role not in ("system", "user", "assistant"):
            raise MobileMMError(f"message {index}: unknown role {role!r}; known: system, user, assistant")
        if images and role != "user":
            raise MobileMMError(f"message {index}: an image can only stand in a user's message")
        if role == "system" and index:
            raise MobileMMError(f"message {index}: a system message can only stand first")
        if role == "system":
            if prompt.system is None:
                raise MobileMMError("this model's template takes no system prompt")
            pieces = [""]
        turn = _turn(prompt, role, before)
        before = role
        prefix = turn.prefix
        if images and turn.prefix_before_image is not None:
            prefix = turn.prefix_before_image
        pieces[-1] += prefix
        first, *rest = _content(prompt, images, text if turn.text else "")
        pieces[-1] += first
        pieces += rest
        pieces[-1] += turn.suffix
    if add_generation_prompt:
        pieces[-1] += prompt.generation
    return pieces


def _turn(prompt: Prompt, role: str, before: str | None) -> Turn:
    if role == "system" and prompt.system is not None:
        return prompt.system
    if role == "assistant":
        return prompt.assistant
    behind = {"assistant": prompt.later_user, "system": prompt.user_after_system}
    return behind.get(before or "") or prompt.user


def _content(prompt: Prompt, images: int, text: str) -> list[str]:
    if prompt.strip == "text":
        text = text.strip()
    if not images:
        return [text.strip() if prompt.strip == "content" else text]
    between = prompt.image_suffix + prompt.image_prefix
    pieces = [prompt.image_prefix, *[between] * (images - 1), prompt.image_suffix + text]
    if prompt.strip == "content":
        pieces[0], pieces[-1] = pieces[0].lstrip(), pieces[-1].rstrip()
    return pieces


def with_marks(pieces: Sequence[str]) -> str:
    """The pieces as one text, with `<image>` for each picture's placeholders."""
    return IMAGE_MARK.join(pieces)


class PromptTokenizer:
    """A bundle's tokenizer, for conversations with pictures.

    Args:
        tokenizer: its `tokenizer.json`, or what was read from one.
        prompt: how conversations are written.
        image_token_id, num_image_tokens: the placeholder, and how many of them a picture takes.
    """

    def __init__(
        self, tokenizer: Path | Tokenizer, prompt: Prompt, image_token_id: int, num_image_tokens: int
    ) -> None:
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else _read(tokenizer)
        self.prompt = prompt
        self.image_token_id, self.num_image_tokens = image_token_id, num_image_tokens
        self._plain: Tokenizer | None = None
        # Models often have a few rows more, which stand for nothing: no answer may hold them.
        self.size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=0)

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation, each picture as its placeholders.

        Raises MobileMMError as `render` does.
        """
        return self.encode_pieces(render(self.prompt, messages, add_generation_prompt))

    def encode_pieces(self, pieces: Sequence[str]) -> list[int]:
        """The ids of rendered pieces, with a picture between each two of them."""
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if index:
                ids += [self.image_token_id] * self.num_image_tokens
            special = self.prompt.add_bos and index == 0
            if piece or special:
                ids += self._encode(piece, special)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _encode(self, text: str, special: bool) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=special).ids
        if self.image_token_id not in ids:
            return ids
        # Somebody's words hold the placeholder itself: they are text, and no picture.
        if self._plain is None:
            state = json.loads(self.tokenizer.to_str())
            state["added_tokens"] = [
                token for token in state["added_tokens"] if token["id"] != self.image_token_id
            ]
            self._plain = Tokenizer.from_str(json.dumps(state))
        return self._plain.encode(text, add_special_tokens=special).ids


def _read(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise MobileMMError(f"{path}: not a tokenizer that can be read ({one_line(error)})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
