"""A condition and a seed → a picture, by the parts of a bundle that draw: in one graph, or step by step."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mobilemm.errors import MobileMMError
from mobilemm.runtime.backends import Array, Backend
from mobilemm.runtime.drawing import Sketch, to_uint8
from mobilemm.runtime.manifest import Generation
from mobilemm.runtime.noise import normal

if TYPE_CHECKING:
    from mobilemm.runtime.bundle import Bundle


def open_generator(bundle: Bundle, backend: Backend, steps: int | None = None) -> PictureGenerator | None:
    """What a bundle draws with, in so many steps (None: those it was made for); None if it does not draw.

    Raises MobileMMError for steps that it does not draw in.
    """
    generation = bundle.manifest.generation
    wrong = f"{bundle.folder}: --steps {steps}, but this bundle"
    if generation is None:
        if steps is not None:
            raise MobileMMError(f"{wrong} does not draw")
        return None
    (logits,) = bundle.manifest.parts["output_projector"].inputs
    words = logits.shape[-1]
    assert isinstance(words, int)
    wanted = generation.steps if steps is None else steps
    if generation.schedules is None:
        if wanted != generation.steps:
            raise MobileMMError(
                f"{wrong} draws in {generation.steps}: export it with --stepwise, or with --steps {steps}"
            )
        return PictureGenerator(generation, words, backend)
    for rows in generation.schedules:
        if len(rows) == wanted:
            return StepwiseGenerator(generation, words, backend, rows)
    known = ", ".join(str(len(rows)) for rows in generation.schedules)
    raise MobileMMError(f"{wrong} draws in {known}: export it with --stepwise --steps {steps}")


class PictureGenerator:
    """Draws by the part `generator`, all steps at once.

    Attributes:
        steps: of a drawing.
        words: of the vocabulary, the first, whose logits at the signal tokens tell the condition.
    """

    parts: tuple[str, ...] = ("output_projector", "generator")

    def __init__(self, generation: Generation, words: int, backend: Backend) -> None:
        self.words, self.backend = words, backend
        self.steps = generation.steps
        self.noise_shape = tuple(generation.noise.shape)

    def condition(self, logits: Array) -> Array:
        """Logits (1, signal tokens, vocabulary) → (1, tokens, width)."""
        inputs = {"signal_logits": np.ascontiguousarray(logits[..., : self.words])}
        return self.backend.run("output_projector", inputs)["condition"]

    def draw(
        self, condition: Array, seed: int, sketches: bool = False
    ) -> Generator[Sketch, None, NDArray[np.uint8]]:
        """Returns the picture, uint8 (height, width, 3); yields, if wanted, what earlier steps have made."""
        inputs = {"condition": condition, "noise": normal(seed, self.noise_shape)}
        yield from ()
        return to_uint8(self.backend.run("generator", inputs)["picture"])

    def release(self) -> None:
        """Gives the parts' memory back."""
        for part in self.parts:
            self.backend.release(part)


class StepwiseGenerator(PictureGenerator):
    """Draws by the part `denoiser`, a call a step, and `image_decoder`.

    Args:
        rows: of each step what `scales` is.
    """

    parts = ("output_projector", "denoiser", "image_decoder")

    def __init__(self, generation: Generation, words: int, backend: Backend, rows: list[list[float]]) -> None:
        super().__init__(generation, words, backend)
        self.steps, self.rows = len(rows), np.array(rows, np.float32)
        # One for the beginning, and one for each step that renews.
        self.noise_shape = (1, 1 + int((self.rows[:, 4] != 0).sum()), *generation.noise.shape[2:])

    def draw(
        self, condition: Array, seed: int, sketches: bool = False
    ) -> Generator[Sketch, None, NDArray[np.uint8]]:
        for step, latents in enumerate(self.latents(condition, seed), 1):
            if sketches and step < self.steps:
                yield Sketch(self.decode(latents), step, self.steps)
        return self.decode(latents)

    def latents(self, condition: Array, seed: int) -> Iterator[Array]:
        """Behind each step, (1, channels, height, width)."""
        noise = normal(seed, self.noise_shape)
        latents, used = noise[:, 0], 0
        for row in self.rows:
            used += int(row[4] != 0)
            fresh = noise[:, used] if row[4] else np.zeros_like(noise[:, 0])
            inputs = {"latents": latents, "condition": condition, "noise": fresh, "scales": row}
            latents = self.backend.run("denoiser", inputs)["next_latents"]
            yield latents

    def decode(self, latents: Array) -> NDArray[np.uint8]:
        """The picture of latents, uint8 (height, width, 3)."""
        return to_uint8(self.backend.run("image_decoder", {"latents": latents})["picture"])
