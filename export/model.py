"""A checkpoint opened for export: its parts over mapped weights, its prompt, its tokenizer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mobilemm.export import verify
from mobilemm.export.calibration import CalibrationSample
from mobilemm.export.decoder import Decoder
from mobilemm.export.families import split_model
from mobilemm.export.options import ExportOptions
from mobilemm.export.parts import Part, parts_of
from mobilemm.export.prompts import derive_prompt
from mobilemm.export.split import SplitModel
from mobilemm.runtime import manifest
from mobilemm.runtime.image import to_pixels
from mobilemm.runtime.prompt import PromptTokenizer

Report = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint, taken apart. `steps` are the generator's where others than its own are wanted."""

    name: str
    split: SplitModel
    parts: dict[str, Part]
    prompt: manifest.Prompt
    tokenizer: PromptTokenizer
    digest: str
    torch_model: Any
    license: str = ""
    license_text: str | None = None
    steps: int | None = None

    @property
    def decoder(self) -> Decoder:
        """The decoder, on the meta device."""
        module = self.parts["decoder"].module
        assert isinstance(module, Decoder)
        return module

    def card(self) -> manifest.ModelCard:
        """Dimensions and special tokens."""
        split, spec = self.split, self.decoder.spec
        text = split.text_config
        eos = text.eos_token_id
        eos_ids = list(eos) if isinstance(eos, (list, tuple)) else [eos] if eos is not None else []
        tokenizer_eos = getattr(split.processor.tokenizer, "eos_token_id", None)
        if tokenizer_eos is not None and tokenizer_eos not in eos_ids:
            eos_ids.append(tokenizer_eos)
        pad = text.pad_token_id
        return manifest.ModelCard(
            name=self.name,
            family=split.family,
            license=self.license,
            context_length=spec.context_length,
            hidden_size=spec.hidden_size,
            vocab_size=spec.vocab_size,
            num_layers=spec.num_layers,
            num_attention_heads=spec.num_attention_heads,
            num_key_value_heads=spec.num_key_value_heads,
            head_dim=spec.head_dim,
            num_image_tokens=split.num_image_tokens,
            image_token_id=split.image_token_id,
            bos_token_id=text.bos_token_id,
            eos_token_ids=eos_ids,
            pad_token_id=pad if pad is not None and pad >= 0 else (eos_ids or [0])[0],
        )

    def with_options(self, options: ExportOptions, longest: int | None = None) -> Model:
        """The same model as wanted; `longest` is its context where the options leave it open.

        It is never longer than the model knows.
        """
        known = int(self.split.text_config.max_position_embeddings)
        context = min(options.context_length or longest or known, known)
        parts = parts_of(self.split, context, options.steps, options.stepwise)
        return replace(self, parts=parts, steps=options.steps)

    def encode(self, sample: CalibrationSample) -> tuple[list[int], list[Any]]:
        """Ids and pixels, uint8 (3, height, width) each, of a conversation."""
        ids = self.tokenizer.encode(sample.messages, add_generation_prompt=False)
        return ids, [self.pixels(path) for path in sample.files]

    def pixels(self, picture: Path) -> NDArray[np.uint8]:
        """A picture as the vision part takes it, (3, height, width)."""
        assert self.split.image is not None
        return to_pixels(picture, self.split.image)

    @torch.no_grad()
    def embed(self, ids: Sequence[int], pictures: Sequence[Any]) -> Tensor:
        """(1, length, width) in fp32 PyTorch. Only the rows that are needed leave the table."""
        embed = self.parts["embed"]
        table = embed.weights["table.weight"]
        tensor = torch.tensor([list(ids)])
        is_image = tensor == self.split.image_token_id
        rows = table[tensor.masked_fill(is_image, 0)].float() * getattr(embed.module, "scale", 1.0)
        if pictures:
            pixels = torch.from_numpy(np.stack(pictures))
            features = verify.reference(self.parts["vision"], {"pixels": pixels})
            rows = rows.masked_scatter(is_image[..., None], features)
        return rows


def open_model(source: str | None, options: ExportOptions, report: Report = lambda _: None) -> Model:
    """Loads a checkpoint, its weights mapped from disk, and takes it apart. Raises MobileMMError."""
    from mobilemm.models.checkpoints import load
    from mobilemm.models.checkpoints.default import default_model_folder, shipped_files
    from mobilemm.models.checkpoints.reading import generator_folder, resolve_folder
    from mobilemm.models.checkpoints.text_model import is_text_model, load_text_model

    folder = default_model_folder() if source is None else resolve_folder(source)
    report(f"reading {folder}")
    model, processor = load_text_model(folder) if is_text_model(folder) else load(str(folder))
    split = split_model(model, processor, options.image_size)
    drawer = generator_folder(folder)
    if split.output_projector is not None and drawer is not None:
        from mobilemm.generation.generator import load_generator

        report(f"reading {drawer}")
        split = replace(split, generator=load_generator(drawer))
    prompt = derive_prompt(split)
    tokenizer = PromptTokenizer(
        split.processor.tokenizer.backend_tokenizer, prompt, split.image_token_id, split.num_image_tokens
    )
    name = options.name or ("mobilemm-default" if source is None else Path(source).name)
    cards = shipped_files() if source is None else folder
    opened = Model(
        *(name, split, {}, prompt, tokenizer, folder_digest(folder), model),
        license=_license(cards),
        license_text=_license_text(cards),
    )
    return opened.with_options(options)


def _license_text(folder: Path) -> str | None:
    path = next((path for path in sorted(folder.glob("LICEN[SC]E*")) if path.is_file()), None)
    return path.read_text(encoding="utf-8", errors="replace") if path is not None else None


def _license(folder: Path) -> str:
    """What the model card's front matter names as licence, if anything."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    found = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return found[1] if found else ""


def folder_digest(folder: Path) -> str:
    """Hash of a checkpoint's files, its generator's with them: names and contents."""
    digest = hashlib.sha256()
    from mobilemm.models.checkpoints.reading import GENERATOR

    drawer = folder / GENERATOR
    files = [*folder.iterdir(), *drawer.rglob("*")]
    for path in sorted(path for path in files if path.is_file()):
        with path.open("rb") as file:
            digest.update(
                f"{path.relative_to(folder)}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
            )
    return digest.hexdigest()
