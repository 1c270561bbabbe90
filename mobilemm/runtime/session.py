"""A conversation with a bundle: pictures, streaming, sampling, several turns over one cache. No torch."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mobilemm.data.images import ImageSource
from mobilemm.errors import MobileMMError
from mobilemm.runtime.backends import Array, Backend, Decoder
from mobilemm.runtime.conversation import Conversation, refuse_full_context
from mobilemm.runtime.drawing import Drawn, choose_seed
from mobilemm.runtime.image import to_pixels
from mobilemm.runtime.picture_generator import open_generator
from mobilemm.runtime.prompt import PromptTokenizer
from mobilemm.runtime.sampling import Sampler, Sampling
from mobilemm.runtime.streaming import TextStream

if TYPE_CHECKING:
    from mobilemm.runtime.bundle import Bundle

MAX_FEATURES = 16
"""Pictures whose features are kept, those used last."""


@dataclass(frozen=True)
class Picture:
    """A picture as the vision part takes it: uint8 (3, height, width), and the hash of these pixels."""

    pixels: NDArray[np.uint8]
    key: str


@dataclass
class Stats:
    """What one answer took. Times in seconds; loading of parts is not part of the others.

    `ttft` is from the question to the first token, pictures included. The first token comes from the prefill,
    so `decode_seconds` is that of `new_tokens` − 1 steps.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    new_tokens: int = 0
    load_seconds: float = 0.0
    image_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    ttft: float = 0.0
    drawing_seconds: float = 0.0
    decode_steps: int = 0

    @property
    def prefill_rate(self) -> float:
        """Tokens a second that were read."""
        read = self.prompt_tokens - self.cached_tokens
        return read / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second that were written."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0

    def __str__(self) -> str:
        return (
            f"ttft {self.ttft:.2f} s · prefill {self.prefill_rate:.0f} tok/s"
            f" ({self.prompt_tokens - self.cached_tokens} of {self.prompt_tokens} tokens,"
            f" {self.cached_tokens} cached) · decode {self.decode_rate:.1f} tok/s ({self.new_tokens} tokens)"
            f" · pictures {self.image_seconds:.2f} s · load {self.load_seconds:.2f} s"
            + (f" · drawing {self.drawing_seconds:.2f} s" if self.drawing_seconds else "")
        )


class Session(Conversation):
    """One conversation with a bundle, over whatever runs it.

    Each turn renders and tokenizes the whole conversation, and prefills only what the cache does not hold
    already: so what is said never depends on how the cache came about.

    Args:
        bundle: an opened bundle.
        backend: what runs its parts; several sessions may share one.
        sampling: how answers are drawn.
        system: a system prompt, where the model's template takes one.
        keep_vision: False gives the vision part's memory back behind each question about a new picture, and
            that of the parts that draw behind each drawing.
        steps: of a drawing; None: those that the bundle was made for.
        sketches: whether a drawing that is made step by step comes as `Sketch` pieces first, one behind each
            step but the last. Each takes a run of the part that decodes latents.

    Raises MobileMMError for steps that the bundle does not draw in.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        sampling: Sampling | None = None,
        system: str | None = None,
        keep_vision: bool = True,
        steps: int | None = None,
        sketches: bool = False,
    ) -> None:
        self.bundle, self.backend = bundle, backend
        self.manifest = bundle.manifest
        self.keep_vision, self.sketches = keep_vision, sketches
        self._generator = open_generator(bundle, backend, steps)
        model, prompt = self.manifest.model, self.manifest.prompt
        self.tokenizer = PromptTokenizer(
            bundle.path(prompt.tokenizer), prompt, model.image_token_id, model.num_image_tokens
        )
        self.stats: Stats | None = None
        self.answer_ids: list[int] = []  # of the last answer, its end token apart
        self._decoder: Decoder | None = None
        self._features: OrderedDict[str, Array] = OrderedDict()
        generation = self.manifest.generation
        self._signals = generation.signal_token_ids if generation is not None else []
        # What the cache holds: ids, perhaps more of them than the decoder has taken in; and pictures.
        self._cached: list[int] = []
        self._shown: list[str] = []
        self._next_position = 0
        super().__init__(sampling, system)

    def look_at(self, picture: ImageSource) -> None:
        """Shows a picture (a path, encoded bytes or a PIL image); it goes with what is said next.

        Raises MobileMMError for what cannot be read, and when the bundle takes no pictures.
        """
        if self.manifest.image is None:
            raise MobileMMError(f"{self.bundle.folder}: this bundle takes no pictures")
        pixels = to_pixels(picture, self.manifest.image)
        self.pending.append(Picture(pixels, hashlib.sha256(pixels.tobytes()).hexdigest()))

    def _answer(self, messages: list[dict[str, Any]]) -> Generator[str]:
        """As told; `stats` says what it took."""
        ids = self.tokenizer.encode(messages)
        context = self.manifest.model.context_length
        refuse_full_context(len(ids), context)
        return self._generate(ids, _pictures(messages), context - len(ids))

    def _generate(self, ids: list[int], pictures: list[Picture], room: int) -> Generator[str]:
        stats = self.stats = Stats(prompt_tokens=len(ids))
        features = self._see(pictures, stats)
        self._load(stats)
        begun = time.perf_counter()
        logits = self._prefill(ids, pictures, features, stats)
        sampler = Sampler(self.sampling)
        text = TextStream(self.tokenizer.decode, self.manifest.prompt.stop)
        seen = list(ids)
        self.answer_ids = []
        token = sampler(logits[: self.tokenizer.size], seen)
        stats.ttft = stats.image_seconds + time.perf_counter() - begun
        most = min(self.sampling.max_new_tokens, room)
        while token not in self.manifest.model.eos_token_ids:
            if self._signals and token == self._signals[0]:
                if piece := text.end():
                    yield piece
                drawn, logits = yield from self._draw()
                seen += self._signals
                self.answer_ids += self._signals
                stats.new_tokens += len(self._signals)
                stats.drawing_seconds += drawn.seconds
                yield drawn
                if stats.new_tokens >= most:
                    break
                text = TextStream(self.tokenizer.decode, self.manifest.prompt.stop)
                token = sampler(logits[: self.tokenizer.size], seen)
                continue
            seen.append(token)
            self.answer_ids.append(token)
            stats.new_tokens += 1
            if piece := text.put(token):
                yield piece
            if text.stopped or stats.new_tokens == most:
                break
            begun = time.perf_counter()
            logits = self._feed([token], None, self._text_position())
            token = sampler(logits[: self.tokenizer.size], seen)
            stats.decode_seconds += time.perf_counter() - begun
            stats.decode_steps += 1
        if piece := text.end():
            yield piece

    def _draw(self) -> Generator[str, None, tuple[Drawn, Array]]:
        """Sketches, if wanted; then the drawing, and the logits (vocabulary,) behind the signal tokens."""
        generator = self._generator
        assert generator is not None
        # One by one, as every runtime does: int4 sums are rounded otherwise when words go through together.
        logits = np.stack([self._feed([signal], None, self._text_position()) for signal in self._signals])
        begun = time.perf_counter()
        seed = choose_seed(self.sampling.seed)
        picture = yield from generator.draw(generator.condition(logits[None]), seed, self.sketches)
        if not self.keep_vision:
            generator.release()
        written = self.tokenizer.tokenizer.decode(self._signals, skip_special_tokens=False)
        return Drawn(picture, seed, written, time.perf_counter() - begun), logits[-1]

    def _see(self, pictures: list[Picture], stats: Stats) -> list[Array]:
        """Each picture's features. Before the decoder is loaded, so that memory need not hold both."""
        begun = time.perf_counter()
        if any(picture.key not in self._features for picture in pictures):
            self.backend.load("vision")
        loaded = time.perf_counter()
        features = [self._look(picture) for picture in pictures]
        if not self.keep_vision:
            self.backend.release("vision")
        stats.load_seconds, stats.image_seconds = loaded - begun, time.perf_counter() - loaded
        return features

    def _load(self, stats: Stats) -> None:
        begun = time.perf_counter()
        self.backend.load("embed")
        if self._decoder is None:
            self._decoder = self.backend.decoder()
        stats.load_seconds += time.perf_counter() - begun

    def _prefill(self, ids: list[int], pictures: list[Picture], features: list[Array], stats: Stats) -> Array:
        """Logits (vocabulary,) behind the prompt, of which only what the cache lacks is run."""
        decoder = self._decoder
        assert decoder is not None
        begun = time.perf_counter()
        del self._cached[decoder.length :]
        keys = [picture.key for picture in pictures]
        start = min(self._common(ids, keys), len(ids) - 1)
        decoder.truncate(start)
        del self._cached[start:]
        self._shown = keys
        stats.cached_tokens = start
        rows = np.concatenate(features) if features else None
        if rows is not None:
            rows = rows[sum(token == self.manifest.model.image_token_id for token in ids[:start]) :]
        grid = self.manifest.image.position_grid if self.manifest.image else None
        positions = None
        if grid is not None:
            every = rope_positions(ids, self.manifest.model.image_token_id, grid)
            positions = every[:, None, start:]
            self._next_position = int(every.max()) + 1
        logits = self._feed(ids[start:], rows, positions)
        stats.prefill_seconds = time.perf_counter() - begun
        return logits

    def _common(self, ids: list[int], keys: list[str]) -> int:
        """How many ids, and the pictures among them, are those that the cache holds."""
        length = min(len(ids), len(self._cached))
        old, new = np.array(self._cached[:length], np.int64), np.array(ids[:length], np.int64)
        differing = np.flatnonzero(old != new)
        common = int(differing[0]) if len(differing) else length
        places = np.flatnonzero(new == self.manifest.model.image_token_id)
        places = places[:: max(self.manifest.model.num_image_tokens, 1)]
        for place, before, now in zip(places, self._shown, keys, strict=False):
            if before != now:
                return min(common, int(place))
        return common

    def _feed(self, ids: list[int], features: Array | None, positions: Array | None) -> Array:
        """Appends to the cache; logits (vocabulary,) behind the last id."""
        decoder = self._decoder
        assert decoder is not None
        embeds = self._embed(ids, features)
        for piece in self._pieces(ids, 0 if features is None else len(features)):
            places = None if positions is None else positions[..., piece]
            logits = decoder.decode(embeds[:, piece], places)
        return logits[0, -1]

    def _embed(self, ids: list[int], features: Array | None) -> Array:
        """Embeddings (1, ids, hidden) of what the cache is about to hold."""
        if features is None:
            features = np.zeros((0, self.manifest.model.hidden_size), np.float32)
        inputs = {"input_ids": np.array([ids], np.int64), "image_features": features}
        embeds = self.backend.run("embed", inputs)["inputs_embeds"]
        # Before the decoder has them: what is interrupted leaves too many here, never too few.
        self._cached += ids
        return embeds

    def _pieces(self, ids: list[int], rows: int) -> Iterator[slice]:
        """What the decoder is fed at once: all ids, or each text and each picture that has features."""
        model = self.manifest.model
        start = 0
        if self.backend.prefills_in_pieces:
            places = np.flatnonzero(np.array(ids) == model.image_token_id)[:rows]
            for place in places[:: max(model.num_image_tokens, 1)].tolist():
                if place > start:
                    yield slice(start, place)
                start = place + model.num_image_tokens
                yield slice(place, start)
        if start < len(ids):
            yield slice(start, len(ids))

    def _text_position(self) -> Array | None:
        """The next token's position, where positions have three dimensions."""
        if self.manifest.image is None or self.manifest.image.position_grid is None:
            return None
        self._next_position += 1
        return np.full((3, 1, 1), self._next_position - 1, np.int64)

    def _look(self, picture: Picture) -> Array:
        """The picture's features (tokens, hidden), computed once for the same pixels."""
        if picture.key not in self._features:
            pixels = picture.pixels[None]
            self._features[picture.key] = self.backend.run("vision", {"pixels": pixels})["image_features"]
        self._features.move_to_end(picture.key)
        while len(self._features) > MAX_FEATURES:
            self._features.popitem(last=False)
        return self._features[picture.key]


def rope_positions(ids: Sequence[int], image_token_id: int, grid: tuple[int, int]) -> NDArray[np.int64]:
    """Positions (3, length) of time, row and column, where pictures take rows × columns positions.

    All tokens of a picture that begins at p have the time p, and p plus their place in the grid; the text
    behind it goes on at p + max(rows, columns). Source: M-RoPE of Qwen2-VL, arXiv 2409.12191, section 2.1.
    """
    rows, columns = grid
    positions = np.empty((3, len(ids)), np.int64)
    index = position = 0
    starts = np.flatnonzero(np.asarray(ids) == image_token_id)[:: rows * columns]
    for start in [*starts.tolist(), len(ids)]:
        positions[:, index:start] = np.arange(position, position + start - index)
        position += start - index
        if start == len(ids):
            break
        index = start + rows * columns
        row, column = np.divmod(np.arange(rows * columns), columns)
        positions[:, start:index] = position + np.stack([np.zeros_like(row), row, column])
        position += max(rows, columns)
    return positions


def _pictures(messages: Sequence[dict[str, Any]]) -> list[Picture]:
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
