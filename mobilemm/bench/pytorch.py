"""A checkpoint on PyTorch, measured as a bundle is."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from mobilemm.bench.limits import Decoding
from mobilemm.bench.result import BundleFacts
from mobilemm.bench.subject import ask_anew, words
from mobilemm.data.images import open_image
from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints import load
from mobilemm.models.checkpoints.reading import generator_folder
from mobilemm.runtime.noise import normal
from mobilemm.runtime.pytorch import ChatSession, context_length, quiet
from mobilemm.runtime.sampling import Sampling

CHUNK = 2**24


class CheckpointSubject:
    """A `Subject` in float32 on the CPU, run eagerly."""

    def __init__(self, folder: Path, threads: int | None, steps: int | None) -> None:
        quiet()
        self.folder, self.steps = folder, steps
        if threads is not None:
            torch.set_num_threads(threads)
        self.generator = generator_folder(folder)
        self.absent: dict[str, str] = {}
        self.cache: Any = None
        self.model: Any = None

    @property
    def runtime(self) -> str:
        return f"PyTorch {torch.__version__}, transformers {transformers.__version__}, eager, float32"

    def load(self) -> None:
        self.model, self.processor = load(self.folder, dtype=torch.float32)
        self.model.eval()
        config, text = self.model.config, self.model.config.get_text_config()
        ends = self.model.generation_config.eos_token_id
        special = {
            getattr(config, "image_token_id", None),
            *([ends] if isinstance(ends, int) else ends or []),
        }
        self.words = words(text.vocab_size, special)
        self.context_length = context_length(self.model) or 2048
        self.takes_pictures = getattr(self.processor, "image_processor", None) is not None
        self.session = ChatSession(self.model, self.processor, Sampling(max_new_tokens=1))
        self.unrolled: Any = None
        if self.generator is not None and getattr(config, "signal_token_ids", None):
            from mobilemm.generation.generator import load_generator
            from mobilemm.generation.sampling import UnrolledGenerator

            self.unrolled = UnrolledGenerator(load_generator(self.generator), self.steps).eval()
        elif self.steps is not None:
            raise MobileMMError(f"{self.folder}: --steps {self.steps}, but this model does not draw")
        self.draws = self.unrolled.table.steps if self.unrolled is not None else 0
        self.truncate(0)

    def facts(self) -> tuple[BundleFacts, Decoding]:
        parts: dict[str, int] = {}
        bits: dict[str, int] = {}
        decoder = 0
        for name, parameter in self.model.named_parameters():
            part = name.removeprefix("model.").split(".")[0]
            parts[part] = parts.get(part, 0) + parameter.numel() * parameter.element_size()
            bits[part] = 8 * parameter.element_size()
            if not any(word in part for word in ("vision", "visual", "projector", "connector")):
                decoder += parameter.numel()
        text = self.model.config.get_text_config()
        table = self.model.get_input_embeddings().weight
        if self.model.get_output_embeddings().weight is not table:
            decoder -= table.numel()  # one row of it is read
        files = [path for path in checkpoint_files(self.folder) if path.suffix != ".json"]
        facts = BundleFacts(
            name=self.folder.resolve().name,
            target="pytorch",
            digest=_digest(self.folder),
            bytes=sum(path.stat().st_size for path in checkpoint_files(self.folder)),
            parts=parts,
            bits=bits,
        )
        return facts, Decoding(
            files=sum(path.stat().st_size for path in files),
            bytes=decoder * table.element_size(),
            parameters=decoder,
            head=text.vocab_size * text.hidden_size,
            layers=text.num_hidden_layers,
            attention_heads=text.num_attention_heads,
            key_value_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            cache_bytes=table.element_size(),
        )

    def to_pixels(self, photo: bytes) -> Any:
        return self.processor.image_processor(images=[open_image(photo)], return_tensors="pt")

    @torch.no_grad()
    def look(self, pixels: Any) -> None:
        known = inspect.signature(self.model.get_image_features).parameters
        self.model.get_image_features(**{name: value for name, value in pixels.items() if name in known})

    def ask(self, photos: Sequence[bytes], question: str) -> None:
        ask_anew(self.session, photos, question)

    def embed(self, ids: list[int]) -> Any:
        return torch.tensor([ids])  # embedding is part of the model's forward

    @torch.no_grad()
    def decode(self, embeds: Any) -> int:
        found = self.model(input_ids=embeds, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return int(found.logits[0, -1].argmax())

    def truncate(self, length: int) -> None:
        if length == 0:
            self.cache = transformers.DynamicCache(config=self.model.config.get_text_config())
        else:
            self.cache.crop(length - self.cache.get_seq_length())  # so many from the end

    @torch.no_grad()
    def draw(self, seed: int) -> list[float]:
        table = self.unrolled.table
        hidden = torch.zeros(
            1, len(self.model.config.signal_token_ids), self.model.config.get_text_config().hidden_size
        )
        condition = self.model.output_projector(hidden).float()
        noise = torch.from_numpy(normal(seed, (1, table.noises, *self.unrolled.latent_shape)))
        latents, seconds = noise[:, 0], []
        for index in range(table.steps):
            begun = time.perf_counter()
            fresh = noise[:, index + 1] if table.noise[index] else None
            latents = self.unrolled.step(latents, condition, fresh, self.unrolled.rows[index])
            seconds.append(time.perf_counter() - begun)
        self.unrolled.decoder(latents)
        return seconds


def checkpoint_files(folder: Path) -> list[Path]:
    """What loading reads: config, weights, the generator's too."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in (".json", ".safetensors", ".bin", ".gguf") and path.is_file()
    )


def _digest(folder: Path) -> str:
    """SHA-256 over all those files, their names among them."""
    whole = hashlib.sha256()
    for path in checkpoint_files(folder):
        whole.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        with path.open("rb") as file:
            while piece := file.read(CHUNK):
                whole.update(piece)
    return whole.hexdigest()
