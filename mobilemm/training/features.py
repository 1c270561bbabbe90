"""What a frozen vision encoder says of each picture, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mobilemm.data.images import open_image
from mobilemm.errors import MobileMMError
from mobilemm.models.modeling import MobileMMForConditionalGeneration

BATCH = 16
BATCHES_BETWEEN_MARKS = 8


class FeatureCache:
    """Features of many pictures in one file, float16: (pictures, tokens, vision width).

    The file belongs to the encoder's weights and to these pictures, as they are now; other ones make another
    file. Interrupted, it goes on where it was.

    Args:
        folder: where the file is, or will be.
        images: paths, or encoded bytes.
        report: called with how many are done, and of how many.
    Raises MobileMMError when the disk is full.
    """

    def __init__(
        self,
        folder: Path,
        model: MobileMMForConditionalGeneration,
        processor: Any,
        images: Sequence[Path | bytes],
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._places = {image: place for place, image in enumerate(dict.fromkeys(images))}
        self.unreadable: dict[Path | bytes, str] = {}
        shape = model.vision_encoder.shape
        tokens = shape.grid[0] * shape.grid[1] + model.vision_encoder.num_prefix_tokens
        name = f"features-{_identity(model, processor, list(self._places))}"
        self.path, broken = folder / f"{name}.npy", folder / f"{name}.unreadable.json"
        if not self.path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._write(
                    model,
                    processor,
                    (len(self._places), tokens, shape.width),
                    broken,
                    report,
                )
            except OSError as error:
                raise MobileMMError(f"{self.path}: features could not be kept: {error.strerror}") from error
        every = list(self._places)
        unreadable = json.loads(broken.read_text(encoding="utf-8"))
        self.unreadable = {every[int(place)]: reason for place, reason in unreadable.items()}
        self._features = np.load(self.path, mmap_mode="r")

    def __getitem__(self, images: Sequence[Path | bytes]) -> np.ndarray:
        """Features (images, tokens, width) of some of the pictures, float32."""
        return np.stack([self._features[self._places[image]] for image in images]).astype(np.float32)

    def _write(
        self,
        model: MobileMMForConditionalGeneration,
        processor: Any,
        shape: tuple[int, int, int],
        broken: Path,
        report: Callable[[int, int], None],
    ) -> None:
        writing, mark = self.path.with_suffix(".part"), self.path.with_suffix(".mark")
        done = json.loads(mark.read_text()) if mark.is_file() and writing.is_file() else None
        features = np.lib.format.open_memmap(
            writing, mode="w+" if done is None else "r+", dtype=np.float16, shape=None if done else shape
        )
        start, unreadable = (done["next"], done["unreadable"]) if done else (0, {})
        images = list(self._places)
        model.vision_encoder.eval()
        for number, first in enumerate(range(start, len(images), BATCH), 1):
            pictures, places = [], []
            for place in range(first, min(first + BATCH, len(images))):
                try:
                    pictures.append(open_image(images[place]))
                    places.append(place)
                except MobileMMError as error:
                    unreadable[str(place)] = str(error)
            if pictures:
                pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
                with torch.inference_mode():
                    found = model.vision_encoder(pixels.to(model.device, model.dtype))
                features[places] = found.to(torch.float16).cpu().numpy()
            report(min(first + BATCH, len(images)), len(images))
            if number % BATCHES_BETWEEN_MARKS == 0:
                features.flush()
                _put(mark, {"next": first + BATCH, "unreadable": unreadable})
        features.flush()
        _put(broken, unreadable)
        os.replace(writing, self.path)
        mark.unlink(missing_ok=True)


def _put(path: Path, value: Any) -> None:
    part = path.with_name(path.name + ".new")
    part.write_text(json.dumps(value), encoding="utf-8")
    os.replace(part, path)


def _identity(model: MobileMMForConditionalGeneration, processor: Any, images: Sequence[Path | bytes]) -> str:
    """Of the encoder's weights, the image processor's settings, and the pictures as they are on disk."""
    digest = hashlib.sha256(repr(processor.image_processor.to_dict()).encode())
    digest.update(str(model.config.image_size).encode())
    for name, tensor in model.vision_encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    for image in images:
        if isinstance(image, bytes):
            digest.update(image)
        else:
            status = image.stat()
            digest.update(f"{image.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
