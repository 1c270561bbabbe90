"""Pictures → `pixels` of the vision part, by the manifest's rule. Needs Pillow and numpy alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from mobilemm.data.images import MAX_PIXELS, ImageSource, open_image
from mobilemm.errors import MobileMMError
from mobilemm.runtime.manifest import Image

FILTERS = {
    "nearest": Pillow.Resampling.NEAREST,
    "bilinear": Pillow.Resampling.BILINEAR,
    "bicubic": Pillow.Resampling.BICUBIC,
    "lanczos": Pillow.Resampling.LANCZOS,
}


def to_pixels(source: ImageSource, rule: Image) -> NDArray[np.uint8]:
    """A picture (path, encoded bytes, PIL image) → uint8 (3, height, width), as the manifest's `Image` says.

    Raises MobileMMError for what cannot be read.
    """
    picture = open_image(source)
    filter = FILTERS[rule.filter]
    if rule.strategy == "pad":
        picture = _padded(picture, rule.pad_color)
    if rule.strategy == "crop":
        size = _shortest_edge(picture.size, rule.shortest_edge or min(rule.height, rule.width))
        if size[0] * size[1] > MAX_PIXELS:
            raise MobileMMError(f"a picture of {picture.width}×{picture.height} is too narrow; crop it first")
        picture = picture.resize(size, filter)
        picture = _cropped(picture, rule.width, rule.height)
    else:
        picture = picture.resize((rule.width, rule.height), filter)
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def _padded(picture: Pillow.Image, color: tuple[int, int, int]) -> Pillow.Image:
    """In the middle of a square; where the margins cannot be equal, the first is the smaller."""
    width, height = picture.size
    side = max(width, height)
    square = Pillow.new("RGB", (side, side), color)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


def _shortest_edge(size: tuple[int, int], edge: int) -> tuple[int, int]:
    short, long = min(size), max(size)
    other = int(edge * long / short)
    return (edge, other) if size[0] <= size[1] else (other, edge)


def _cropped(picture: Pillow.Image, width: int, height: int) -> Pillow.Image:
    """The middle, black where the picture does not reach."""
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
