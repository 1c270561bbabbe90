"""What every conversation does, with a bundle or on PyTorch: its turns, also those that break off."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

from mobilemm.errors import MobileMMError
from mobilemm.runtime.drawing import Drawn, Sketch
from mobilemm.runtime.sampling import Sampling


class Conversation(ABC):
    """Pictures, questions and answers.

    Args:
        sampling: how answers are drawn.
        system: a system prompt, where the model's template takes one.
    """

    def __init__(self, sampling: Sampling | None = None, system: str | None = None) -> None:
        self.sampling = sampling or Sampling()
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.pending: list[Any] = []
        self.reset()

    def reset(self) -> None:
        """Forgets all that was said and shown."""
        self.pending = []
        self.messages = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": [{"type": "text", "text": self.system}]})

    @abstractmethod
    def look_at(self, picture: Any) -> None:
        """Shows a picture (a path, encoded bytes or a PIL image); it goes with what is said next.

        Raises MobileMMError for what cannot be read, and when there is nothing that takes pictures.
        """

    def reply(self, text: str) -> str:
        """The answer to `text` in one piece."""
        return "".join(self.stream(text))

    def stream(self, text: str) -> Iterator[str]:
        """The answer to `text` as it comes, in pieces of whole characters that join to the answer.

        A picture that the model draws is a piece of its own, a `Drawn`, whose text is empty; so is each
        `Sketch` that comes before it.

        A stream that is closed early, or interrupted with Ctrl-C, stops the model; what it had said by then
        is remembered as its answer, or, when it had said nothing, the turn is forgotten.

        Raises MobileMMError when the conversation no longer fits into the model's context, its template
        refuses it, or a part fails; and whatever generating raises. After an error the conversation is what
        it was before, with the pictures still waiting.
        """
        content = [{"type": "image", "image": picture} for picture in self.pending]
        turn = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        pieces: list[str] = []
        finished = False
        try:
            with closing(self._answer([*self.messages, turn])) as answer:
                for piece in answer:
                    if not isinstance(piece, Sketch):
                        pieces.append(piece)
                    yield piece
            finished = True
        except (GeneratorExit, KeyboardInterrupt):
            finished = bool(pieces)
            raise
        finally:
            if finished:
                self.pending = []
                words = "".join(piece.signal if isinstance(piece, Drawn) else piece for piece in pieces)
                said = {"role": "assistant", "content": [{"type": "text", "text": words}]}
                self.messages += [turn, said]

    @abstractmethod
    def _answer(self, messages: list[dict[str, Any]]) -> Generator[str]:
        """The answer to the last of these messages, piece by piece."""


def refuse_full_context(length: int, context: int) -> None:
    """Raises MobileMMError when a prompt leaves no room for an answer."""
    if length >= context:
        raise MobileMMError(
            f"the prompt is {length} tokens long, pictures included; this model's context is {context}:"
            " shorten it, or start anew"
        )
