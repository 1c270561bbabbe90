"""What is measured: a bundle on its runtime, or a checkpoint on PyTorch, asked for the same things."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mobilemm.bench.limits import Decoding
from mobilemm.bench.result import BundleFacts
from mobilemm.runtime.backends import Array, Backend, Decoder, open_backend
from mobilemm.runtime.bundle import MANIFEST, Bundle, open_bundle
from mobilemm.runtime.conversation import Conversation
from mobilemm.runtime.image import to_pixels
from mobilemm.runtime.manifest import Manifest
from mobilemm.runtime.picture_generator import StepwiseGenerator, open_generator
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.session import Session

CACHE_BYTES = {"float32": 4, "float16": 2, "int8": 1}


class Subject(Protocol):
    """Arrays are the subject's own: what one method gives is for another method of the same subject.

    Attributes:
        context_length: of the language model, in tokens.
        words: tokens that may stand in a prompt: no end of an answer, no picture.
        takes_pictures, draws: what can be measured; `draws` is the number of denoising steps, 0 without.
        absent: what cannot be measured, and why.
    """

    context_length: int
    words: list[int]
    takes_pictures: bool
    draws: int
    absent: dict[str, str]

    @property
    def runtime(self) -> str:
        """A name and a version."""

    def load(self) -> None:
        """All parts."""

    def facts(self) -> tuple[BundleFacts, Decoding]:
        """Of what was loaded."""

    def to_pixels(self, photo: bytes) -> Any:
        """Decoded, resized, as the encoder takes it."""

    def look(self, pixels: Any) -> None:
        """Encoder and projector."""

    def ask(self, photos: Sequence[bytes], question: str) -> None:
        """From the photos' bytes to the answer's first token; nothing is kept from the question before."""

    def embed(self, ids: list[int]) -> Any:
        """What `decode` takes for them: embeddings (1, ids, hidden) where those are a part."""

    def decode(self, embeds: Any) -> int:
        """Appends to the cache; the most likely token behind."""

    def truncate(self, length: int) -> None:
        """Forgets all positions from `length` on."""

    def draw(self, seed: int) -> list[float]:
        """A picture from a condition that is there; seconds of each step where they can be told apart."""


def is_bundle(folder: Path) -> bool:
    """Or else a checkpoint."""
    return (folder / MANIFEST).is_file() or not (folder / "config.json").is_file()


def open_subject(folder: Path, threads: int | None, steps: int | None) -> Subject:
    """Raises MobileMMError for what can be measured neither as a bundle nor as a checkpoint."""
    if is_bundle(folder):
        return BundleSubject(open_bundle(folder, verify=False), threads, steps)
    from mobilemm.bench.pytorch import CheckpointSubject

    return CheckpointSubject(folder, threads, steps)


class BundleSubject:
    """A bundle on the runtime that `mobilemm run` has."""

    def __init__(
        self, bundle: Bundle, threads: int | None, steps: int | None, backend: Backend | None = None
    ) -> None:
        self.bundle, self.manifest = bundle, bundle.manifest
        self.backend: Backend = open_backend(bundle, threads) if backend is None else backend
        self.decoder: Decoder | None = None
        self.session = Session(bundle, self.backend, Sampling(max_new_tokens=1))
        self.generator = open_generator(bundle, self.backend, steps)
        model = self.manifest.model
        self.context_length = model.context_length
        self.words = words(model.vocab_size, {model.image_token_id, *model.eos_token_ids})
        self.takes_pictures = self.manifest.image is not None
        self.draws = self.generator.steps if self.generator is not None else 0
        self.absent = {"projector": "it is part of the vision program"} if self.takes_pictures else {}

    @property
    def runtime(self) -> str:
        return self.backend.runtime

    def load(self) -> None:
        for part in self.manifest.parts:
            if part != "decoder":
                self.backend.load(part)
        self.decoder = self.backend.decoder()

    def facts(self) -> tuple[BundleFacts, Decoding]:
        manifest = self.manifest
        facts = BundleFacts(
            name=manifest.model.name,
            target=manifest.target,
            digest=hashlib.sha256((self.bundle.folder / MANIFEST).read_bytes()).hexdigest(),
            bytes=sum(file.bytes for file in manifest.files),
            parts=part_sizes(manifest),
            bits={name: part.quantization.bits for name, part in manifest.parts.items()},
        )
        return facts, decoding_of(manifest)

    def to_pixels(self, photo: bytes) -> Any:
        assert self.manifest.image is not None
        return to_pixels(photo, self.manifest.image)[None]

    def look(self, pixels: Any) -> None:
        self.backend.run("vision", {"pixels": pixels})

    def ask(self, photos: Sequence[bytes], question: str) -> None:
        ask_anew(self.session, photos, question)

    def embed(self, ids: list[int]) -> Any:
        empty = np.zeros((0, self.manifest.model.hidden_size), np.float32)
        inputs: dict[str, Array] = {"input_ids": np.array([ids], np.int64), "image_features": empty}
        return self.backend.run("embed", inputs)["inputs_embeds"]

    def decode(self, embeds: Any) -> int:
        assert self.decoder is not None
        return int(self.decoder.decode(embeds)[0, -1].argmax())

    def truncate(self, length: int) -> None:
        assert self.decoder is not None
        self.decoder.truncate(length)

    def draw(self, seed: int) -> list[float]:
        assert self.generator is not None
        assert self.manifest.generation is not None
        shape = (1, len(self.manifest.generation.signal_token_ids), self.generator.words)
        logits = np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)
        condition = self.generator.condition(logits)
        if not isinstance(self.generator, StepwiseGenerator):
            list(self.generator.draw(condition, seed))
            return []  # the steps are one program
        ends = [time.perf_counter()]
        for latents in self.generator.latents(condition, seed):
            ends.append(time.perf_counter())
            last = latents
        self.generator.decode(last)
        return [end - begun for begun, end in pairwise(ends)]


def ask_anew(session: Conversation, photos: Sequence[bytes], question: str) -> None:
    """A question about photos, as the first of its conversation."""
    session.reset()
    for photo in photos:
        session.look_at(photo)
    session.reply(question)


def decoding_of(manifest: Manifest) -> Decoding:
    """What a bundle's language model has to move and to compute."""
    model, part = manifest.model, manifest.parts["decoder"]
    kinds = {one.dtype for one in part.inputs if one.name.startswith("past_key_values.")}
    default = "float16" if manifest.target == "coreml" else "float32"
    owned = {one.file for one in manifest.parts.values()}
    # A table that two parts share is one file.
    files = {file for one in manifest.parts.values() for file in one.files}
    return Decoding(
        files=sum(file.bytes for file in manifest.files if file.path in files),
        # Where all parts are one file, by the size that the part had alone.
        bytes=part.bytes if len(owned) > 1 else part.peak_memory // 2,
        parameters=part.parameters,
        head=model.vocab_size * model.hidden_size,
        layers=model.num_layers,
        attention_heads=model.num_attention_heads,
        key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        cache_bytes=CACHE_BYTES[next(iter(kinds), default)],
    )


def part_sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes of the parts' files. Parts that share one are told together, as "decoder and embed".

    In a program with all parts in it, shares are those of the memory that each takes.
    """
    parts = manifest.parts
    groups: list[tuple[list[str], set[str]]] = []
    for name, part in parts.items():
        names, files = [name], set(part.files)
        for group in [group for group in groups if group[1] & files]:
            groups.remove(group)
            names, files = group[0] + names, group[1] | files
        groups.append((names, files))
    bytes_of = {file.path: file.bytes for file in manifest.files}
    sizes = {" and ".join(names): sum(bytes_of[file] for file in files) for names, files in groups}
    if len(sizes) > 1 or len(parts) == 1:
        return sizes
    (size,) = sizes.values()
    memory = sum(part.peak_memory for part in parts.values()) or 1
    return {name: round(size * part.peak_memory / memory) for name, part in parts.items()}


def words(vocab_size: int, special: set[int]) -> list[int]:
    """A row of tokens, always the same."""
    drawn = np.random.default_rng(0).integers(0, vocab_size, 2**14)
    return [int(token) for token in drawn if int(token) not in special]
