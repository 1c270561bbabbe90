"""Pictures that a conversation draws: where they stand in an answer, and from which seed."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from mobilemm.errors import MobileMMError

if TYPE_CHECKING:  # the command line's help needs none of it
    import numpy as np
    from numpy.typing import NDArray

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Drawn(str):
    """A piece of an answer that is a picture; as text it is empty.

    Attributes:
        picture: uint8 (height, width, 3), RGB.
        seed: of the noise that it was drawn from.
        signal: the signal tokens as text, for the conversation's memory.
        seconds: that output projector and generator took.
    """

    picture: NDArray[np.uint8]
    seed: int
    signal: str
    seconds: float

    def __new__(cls, picture: NDArray[np.uint8], seed: int, signal: str, seconds: float = 0.0) -> Drawn:
        made = super().__new__(cls, "")
        made.picture, made.seed, made.signal, made.seconds = picture, seed, signal, seconds
        return made

    def save(self, path: Path) -> Path:
        """Writes the picture, by the path's ending; a file that is there is kept, and a number added."""
        from PIL import Image

        if path.suffix.lower() not in SUFFIXES:
            raise MobileMMError(f"{path}: a picture's name ends in {', '.join(SUFFIXES)}")
        free, number = path, 2
        while free.exists():
            free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
        writing = free.with_name(f".{free.name}.{os.getpid()}{free.suffix}")
        try:
            Image.fromarray(self.picture).save(writing)
            writing.replace(free)
        except OSError as error:
            writing.unlink(missing_ok=True)
            raise MobileMMError(f"{free}: cannot be written: {error}") from error
        return free


class Sketch(str):
    """A piece of an answer that shows a picture on its way, behind one of its steps; as text it is empty.

    Attributes:
        picture: uint8 (height, width, 3), RGB.
        step, steps: behind which of how many.
    """

    picture: NDArray[np.uint8]
    step: int
    steps: int

    def __new__(cls, picture: NDArray[np.uint8], step: int, steps: int) -> Sketch:
        made = super().__new__(cls, "")
        made.picture, made.step, made.steps = picture, step, steps
        return made


def choose_seed(seed: int | None) -> int:
    """The seed given, or a new one, short enough to be typed again."""
    return secrets.randbits(32) if seed is None else seed


def to_uint8(picture: NDArray[np.floating]) -> NDArray[np.uint8]:
    """(1, 3, height, width) in [0, 1], float16 too → uint8 (height, width, 3), rounded once."""
    import numpy as np

    return (
        np.rint(np.clip(picture[0].astype(np.float32), 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0).copy()
    )
