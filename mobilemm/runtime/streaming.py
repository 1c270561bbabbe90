"""Tokens → text, piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"


class TextStream:
    """Takes one token after another and gives the text that is safe to show.

    New tokens are decoded behind the ones that gave the last piece, so that the pieces join to what decoding
    the whole answer gives (but for the number of replacement characters where a model's bytes are no UTF-8);
    tokenizers of the SentencePiece kind would lose a space at each piece otherwise. What might be the
    beginning of a stop string is held back until it is known not to be one.

    Args:
        decode: ids → text, without special tokens.
        stop: strings that end the answer, themselves not part of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode = decode
        self.stop = tuple(string for string in stop if string)
        self.stopped = False
        self._ids: list[int] = []
        self._before, self._sent = 0, 0  # tokens of the last piece are ids[before:sent]
        self._held = ""

    def put(self, token: int) -> str:
        """The text that this token completes, often empty. Sets `stopped` when a stop string is complete."""
        if self.stopped:
            return ""
        self._ids.append(token)
        fresh = self._fresh()
        # The bytes of an unfinished character decode to replacement characters.
        if not fresh or fresh.endswith(REPLACEMENT):
            return ""
        self._before, self._sent = self._sent, len(self._ids)
        return self._release(fresh)

    def end(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        text = self._release(self._fresh())
        self._before = self._sent = len(self._ids)
        text, self._held = text + self._held, ""
        return text

    def _fresh(self) -> str:
        known = self.decode(self._ids[self._before : self._sent])
        return self.decode(self._ids[self._before :])[len(known) :]

    def _release(self, fresh: str) -> str:
        text = self._held + fresh
        ends = [index for string in self.stop if (index := text.find(string)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        kept = max((_overlap(text, string) for string in self.stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of `text` with which `string` begins."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
