"""The one door by which pictures come in: upright 8-bit RGB, or one clear line that says why not."""

from __future__ import annotations

import io
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import BinaryIO, TypeAlias, cast

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from mobilemm.errors import MobileMMError, one_line

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image.Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is read. Left out on purpose: formats that start another program (EPS, WMF) or that nobody fuzzes."""

MAX_PIXELS = 64 * 2**20
"""Width × height, as the header declares it; a 64-megapixel phone camera (9248×6936) still fits."""

MAX_SIDE = 16_384
"""Pictures are padded to a square later on: a strip of 1×20000 would become 400 megapixels."""

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_NOT_READ = {
    b"ftyphei": "HEIC",
    b"ftyphev": "HEIC",
    b"ftypmif": "HEIC",
    b"ftypmsf": "HEIC",
    b"ftypavi": "AVIF",
}

# PIL logs some of what it also raises; without a handler, logging would print that to stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def open_image(source: ImageSource) -> Image.Image:
    """Read a picture as a person would see it in a viewer: upright, 8-bit RGB, its first frame.

    `source` is a path, the encoded bytes, a binary file object (read from its start, left open) or a
    PIL image (left as it is; an animation gives the frame it stands at).

    - Without transparency the pixels are those of `PIL.Image.open(path).convert("RGB")`, bit for bit,
      which is what the official image processors take; embedded colour profiles are left alone, as there.
    - Transparency is laid on white. EXIF orientation is applied, and the metadata then dropped, so that
      nothing downstream turns the picture a second time.
    - 16-bit greys keep their high byte, as PIL does for 16-bit colour; floats run from 0 to 1 or to 255.
    - 1×1 is a valid picture. More than MAX_PIXELS, or a side over MAX_SIDE, is refused before decoding.

    Raises MobileMMError, in one line, for whatever cannot be read: missing, empty, truncated, damaged,
    of another format, or too large.
    """
    name = _name(source)
    try:
        with _quiet():
            if isinstance(source, Image.Image):
                return _read(source, name)
            with _stream(source, name) as stream, _open_header(stream, name) as image:
                return _read(image, name)
    except MobileMMError:
        raise
    except OSError as error:
        if error.strerror is None:  # PIL's word for damaged data
            raise _damaged(name, error) from error
        raise MobileMMError(f"{name}: cannot be read ({error.strerror})") from error
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise _damaged(name, error) from error


def _read(image: Image.Image, name: str) -> Image.Image:
    _check_size(image.size, name)
    with _libtiff_silenced() if isinstance(image, TiffImageFile) else nullcontext():
        image.load()
    upright = _UPRIGHT.get(_orientation(image))
    rgb = _to_rgb(image, name)
    if upright is not None:
        rgb = rgb.transpose(upright)
    rgb.info = {}
    return rgb


# --- from a source to a header ---------------------------------------------------------------------------


def _name(source: object) -> str:
    if isinstance(source, (str, os.PathLike)):
        return one_line(os.fspath(source)) or "''"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"image of {len(source)} bytes"
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return one_line(name) if isinstance(name, str) and name else f"image ({type(source).__name__})"


@contextmanager
def _stream(source: object, name: str) -> Iterator[BinaryIO]:
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as stream:
            yield _seekable(stream)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        yield io.BytesIO(source)
    elif isinstance(source, io.TextIOBase):
        raise MobileMMError(f"{name}: is open as text; open it in binary mode ('rb')")
    elif hasattr(source, "read"):
        yield _seekable(cast(BinaryIO, source))
    else:
        raise MobileMMError(
            f"{name}: cannot be read as a picture; give a path, bytes, a binary file or a PIL image"
        )


def _seekable(stream: BinaryIO) -> BinaryIO:
    try:
        stream.seek(0)
    except (AttributeError, OSError):  # a pipe
        return io.BytesIO(stream.read())
    return stream


def _open_header(stream: BinaryIO, name: str) -> Image.Image:
    start = stream.read(12)
    if not start:
        raise MobileMMError(f"{name}: the file is empty")
    stream.seek(0)
    try:
        return Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        if (other := _NOT_READ.get(start[4:11])) is not None:
            raise MobileMMError(f"{name}: {other} is not read; convert it to one of {known}") from None
        raise MobileMMError(
            f"{name}: not a picture that can be read ({known}), or it is damaged or cut short"
        ) from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise _too_large(name, f"{int(pixels.group()):,} pixels" if pixels else "its size") from None


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise _too_large(name, f"{width}×{height} ({width * height:,} pixels)")
    if max(size) > MAX_SIDE:
        raise MobileMMError(
            f"{name}: {width}×{height} is too long: a side may have {MAX_SIDE:,} pixels, because pictures "
            "are padded to a square; crop it or scale it down"
        )


def _too_large(name: str, size: str) -> MobileMMError:
    return MobileMMError(
        f"{name}: {size} is more than the limit of {MAX_PIXELS:,} pixels; scale it down first"
    )


# --- from a header to pixels -----------------------------------------------------------------------------


def _orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8. Damaged metadata is no reason to refuse the picture."""
    with suppress(Exception):
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _scaled_to_8_bits(image, name).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _scaled_to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Greys of 16 or 32 bits and floats, which PIL's own convert would clip at 255."""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16"):
        values = values >> (4 if tags.get(BITSPERSAMPLE) == (12,) else 8)
    elif image.mode == "I":
        # PIL has already stretched a PPM to 16 bits; a TIFF's 32 bits have no agreed white.
        if low < 0 or high > 65535:
            raise MobileMMError(
                f"{name}: its values run from {low} to {high}; scale them to 8 or 16 bits first"
            )
        if image.format == "PPM" or high > 255:
            values = values >> 8
    elif low >= 0 and high <= 1:
        values = np.rint(values * 255)
    elif low >= 0 and 16 < high <= 255:
        values = np.rint(values)
    else:  # also NaN, and a maximum of 1 to 16, which is light beyond white or a measurement
        raise MobileMMError(
            f"{name}: its values run from {low:g} to {high:g}; scale them to 0–1 or 0–255 first"
        )
    grey = values.astype(np.uint8)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero; PIL inverts only up to 8 bits
        grey = 255 - grey
    return Image.fromarray(grey)


# --- words and warnings ----------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps PIL's warnings (large pictures, odd metadata) from the user: what matters is raised instead.

    Python's warning filters belong to the whole process: only its main thread may swap them safely.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _libtiff_silenced() -> Iterator[None]:
    """libtiff tells the process's stderr about damaged data, and PIL offers no way to stop it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        stderr = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _damaged(name: str, error: Exception) -> MobileMMError:
    return MobileMMError(f"{name}: the picture is damaged or incomplete ({one_line(error)})")
