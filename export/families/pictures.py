"""What an image processor of transformers does to a picture, and what a processor writes in its place."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import transformers
from PIL import Image as PIL
from transformers import LlavaImageProcessorPil

from mobilemm.errors import MobileMMError, one_line
from mobilemm.runtime.manifest import Image

FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


class Tile(NamedTuple):
    """How a picture becomes the pixels of one tile, and the normalization of pixels scaled to 0…1."""

    image: Image
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Expansion(NamedTuple):
    """What stands in the prompt for one picture: `prefix`, `num_tokens` placeholders, `suffix`."""

    prefix: str
    num_tokens: int
    suffix: str


def with_pillow(processor: Any, family: str, known: tuple[str, ...], **settings: Any) -> Any:
    """A copy of the processor whose image processor resizes with Pillow, under changed settings.

    transformers' other implementation, on torchvision, rounds differently; a bundle follows Pillow.

    Raises MobileMMError for an image processor that is not one of `known`.
    """
    given: Any = getattr(processor, "image_processor", None)
    name = type(given).__name__.removesuffix("Fast").removesuffix("Pil")
    if name not in known:
        raise MobileMMError(
            f"{family}: image processor {type(given).__name__} is unknown to export; known:"
            f" {', '.join(known)}"
        )
    made = copy.copy(processor)
    made.image_processor = getattr(transformers, f"{name}Pil").from_dict({**given.to_dict(), **settings})
    return made


def tile(image_processor: Any, family: str, **settings: Any) -> Tile:
    """The tile of an image processor; `settings` are `Image`'s: height, width, strategy …

    Raises MobileMMError for a filter or scale that export does not know.
    """
    resample = FILTERS.get(int(image_processor.resample))
    if resample is None:
        raise MobileMMError(
            f"{family}: resample {image_processor.resample!r} of the image processor is unknown to export;"
            f" known: {', '.join(f'{key} ({name})' for key, name in FILTERS.items())}"
        )
    if not image_processor.do_rescale or not math.isclose(image_processor.rescale_factor, 1 / 255):
        raise MobileMMError(f"{family}: the image processor must scale pixels to 0…1 (rescale_factor 1/255)")
    mean, std = image_processor.image_mean, image_processor.image_std
    if not image_processor.do_normalize:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return Tile(Image(filter=resample, **settings), tuple(mean), tuple(std))  # type: ignore[arg-type]


def clip_tile(image_processor: Any, family: str) -> Tile:
    """The tile of CLIP's image processor, or of LLaVA's, which may pad to a square first.

    Raises MobileMMError for settings that are no plain stretch, pad or crop.
    """
    size, crop = dict(image_processor.size), dict(image_processor.crop_size or {})
    if not image_processor.do_center_crop:
        crop = {}
    if not image_processor.do_resize:
        raise MobileMMError(f"{family}: the image processor must resize pictures (do_resize)")
    settings: dict[str, Any]
    shortest, height, width = size.get("shortest_edge"), size.get("height"), size.get("width")
    cut: tuple[Any, Any] = (crop.get("height", height or shortest), crop.get("width", width or shortest))
    side = shortest or (height if height == width else None)
    pads = image_processor.do_pad and isinstance(image_processor, LlavaImageProcessorPil)
    if pads and side and cut == (side, side):
        color = tuple(int(channel * 255) for channel in image_processor.image_mean)
        settings = {"strategy": "pad", "height": side, "width": side, "pad_color": color}
    elif shortest is not None and not image_processor.do_pad and crop and max(cut) <= shortest:
        settings = {"strategy": "crop", "height": cut[0], "width": cut[1], "shortest_edge": shortest}
    elif height and width and not image_processor.do_pad and cut == (height, width):
        settings = {"strategy": "stretch", "height": height, "width": width}
    else:
        raise MobileMMError(
            f"{family}: the image processor's settings (do_pad {image_processor.do_pad}, size {size},"
            f" crop_size {crop or None}) are unknown to export; known: plain stretch, pad or crop to one size"
        )
    return tile(image_processor, family, **settings)


def require_size(image_size: int | None, image: Image, family: str) -> None:
    """Raises MobileMMError when an image size is asked for that is not the family's own."""
    if image_size is not None and (image_size, image_size) != (image.height, image.width):
        raise MobileMMError(
            f"image size {image_size}: this {family} model takes pictures of {image.height}×{image.width};"
            " leave the size out"
        )


def expansion(processor: Any, image_token_id: int, family: str) -> Expansion:
    """What the processor writes for one picture, by letting it write one.

    Raises MobileMMError when it cannot, or when the placeholders are not in one piece.
    """
    picture = PIL.new("RGB", (40, 30), "white")
    try:
        text = {"text": [processor.image_token], "add_special_tokens": False}
        ids = processor(images=[picture], **text)["input_ids"][0]
    except Exception as error:
        # transformers' processors raise as many types as they have settings.
        raise MobileMMError(f"{family}: its processor cannot place a picture: {one_line(error)}") from error
    row = [int(index) for index in ids]
    count = row.count(image_token_id)
    first = row.index(image_token_id) if count else 0
    if not count or set(row[first : first + count]) != {image_token_id}:
        raise MobileMMError(
            f"{family}: its processor writes the {count} placeholders of one picture in several pieces or not"
            f" at all; image_token_id {image_token_id} of config.json may be wrong"
        )
    prefix, suffix = (processor.tokenizer.decode(part) for part in (row[:first], row[first + count :]))
    return Expansion(prefix, count, suffix)
