"""open_image: what a viewer would show, or one line that says why not."""

import io
import os
import random
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mobilemm.data.images import MAX_PIXELS, MAX_SIDE, open_image
from mobilemm.errors import MobileMMError

NOISE = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
RGB = Image.fromarray(NOISE)
GRADIENT_16 = (np.arange(24 * 36).reshape(24, 36) * 75).astype(np.uint16)  # 0 … 64725
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, colour: int, raw: bytes) -> bytes:
    """A PNG by hand, for what PIL cannot write: 16-bit colour, or a header that promises too much."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def refusal(source: object) -> str:
    with pytest.raises(MobileMMError) as caught:
        open_image(source)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# --- ordinary pictures -----------------------------------------------------------------------------------

ORDINARY = {
    "jpeg": encode(RGB, "JPEG"),
    "progressive jpeg": encode(RGB, "JPEG", progressive=True),
    "grey jpeg": encode(RGB.convert("L"), "JPEG"),
    "cmyk jpeg": encode(RGB.convert("CMYK"), "JPEG"),
    "png": encode(RGB, "PNG"),
    "palette png": encode(RGB.quantize(16), "PNG"),
    "1-bit png": encode(RGB.convert("1"), "PNG"),
    "webp": encode(RGB, "WEBP"),
    "lossless webp": encode(RGB, "WEBP", lossless=True),
    "gif": encode(RGB, "GIF"),
    "bmp": encode(RGB, "BMP"),
    "palette bmp": encode(RGB.quantize(16), "BMP"),
    "tiff": encode(RGB, "TIFF"),
    "lzw tiff": encode(RGB, "TIFF", compression="tiff_lzw"),
    "jpeg tiff": encode(RGB, "TIFF", compression="jpeg"),
    "cmyk tiff": encode(RGB.convert("CMYK"), "TIFF"),
    "ppm": encode(RGB, "PPM"),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_pixels_are_those_of_pil(kind: str) -> None:
    expected = Image.open(io.BytesIO(ORDINARY[kind])).convert("RGB")
    image = open_image(ORDINARY[kind])
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_every_source_gives_the_same_picture(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(ORDINARY["png"])
    for source in (path, str(path), ORDINARY["png"], io.BytesIO(ORDINARY["png"]), RGB):
        np.testing.assert_array_equal(np.asarray(open_image(source)), NOISE)
    with path.open("rb") as file:
        file.seek(7)  # read from its start wherever it stands, and left open
        np.testing.assert_array_equal(np.asarray(open_image(file)), NOISE)
        assert not file.closed


def test_a_pipe_is_read_like_a_file() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as into:
        into.write(ORDINARY["png"])
    with os.fdopen(reader, "rb") as out:
        np.testing.assert_array_equal(np.asarray(open_image(out)), NOISE)


def test_a_pil_image_is_left_as_it_is() -> None:
    source = Image.open(io.BytesIO(encode(RGB, "JPEG", exif=exif(6))))
    image = open_image(source)
    assert (source.size, image.size) == ((36, 24), (24, 36))
    image.putpixel((0, 0), RED)
    assert open_image(source).getpixel((0, 0)) != RED


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "CMYK"])
def test_one_pixel_is_a_picture(mode: str) -> None:
    image = open_image(encode(Image.new(mode, (1, 1)), "TIFF"))
    assert (image.mode, image.size) == ("RGB", (1, 1))


# --- transparency ----------------------------------------------------------------------------------------


def test_transparency_is_laid_on_white() -> None:
    colours = [(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 255, 51)]
    source = Image.new("RGBA", (3, 1))
    source.putdata(colours)
    image = open_image(encode(source, "PNG"))
    assert [image.getpixel((x, 0)) for x in range(3)] == [RED, WHITE, (204, 204, 255)]

    grey = Image.new("LA", (2, 1))
    grey.putdata([(0, 0), (0, 255)])
    image = open_image(encode(grey, "PNG"))
    assert [image.getpixel((x, 0)) for x in range(2)] == [WHITE, (0, 0, 0)]


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(format: str) -> None:
    source = Image.new("P", (2, 1))
    source.putpalette([255, 0, 0, 0, 0, 255])
    source.putdata([0, 1])
    image = open_image(encode(source, format, transparency=1))
    assert [image.getpixel((x, 0)) for x in range(2)] == [RED, WHITE]


def test_a_transparent_colour_key_is_white() -> None:
    source = Image.new("RGB", (2, 1))
    source.putdata([RED, BLUE])
    image = open_image(encode(source, "PNG", transparency=BLUE))
    assert [image.getpixel((x, 0)) for x in range(2)] == [RED, WHITE]


# --- more than 8 bits ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("TIFF", {}), ("PPM", {})])
def test_16_bit_greys_are_scaled_not_clipped(format: str, options: dict) -> None:
    image = np.asarray(open_image(encode(Image.fromarray(GRADIENT_16), format, **options)))
    for channel in range(3):
        np.testing.assert_array_equal(image[..., channel], GRADIENT_16 >> 8)


def test_a_16_bit_tiff_whose_white_is_zero() -> None:
    data = encode(Image.fromarray(GRADIENT_16), "TIFF", tiffinfo={262: 0})
    np.testing.assert_array_equal(np.asarray(open_image(data))[..., 0], (65535 - GRADIENT_16) >> 8)


def test_16_bit_colour_keeps_the_high_byte() -> None:
    samples = np.random.default_rng(1).integers(0, 65536, (5, 7, 3)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in samples)
    np.testing.assert_array_equal(np.asarray(open_image(png(7, 5, 16, 2, raw))), samples >> 8)


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_floats_run_to_1_or_to_255(white: float) -> None:
    steps = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    image = np.asarray(open_image(encode(Image.fromarray(steps * np.float32(white)), "TIFF")))
    np.testing.assert_array_equal(image[..., 1], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("values", [[0, 7.5], [-1, 1], [0, 1e6], [0, np.nan], [0, np.inf]])
def test_floats_on_no_known_scale_are_refused(values: list[float]) -> None:
    data = encode(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert "0–255" in refusal(data)


def test_32_bit_integers() -> None:
    def first_row(values: list[int]) -> list[int]:
        data = encode(Image.fromarray(np.array([values], np.int32)), "TIFF")
        return np.asarray(open_image(data))[0, :, 0].tolist()

    assert first_row([0, 7, 255]) == [0, 7, 255]
    assert first_row([0, 256, 65535]) == [0, 1, 255]
    for values in ([-1, 5], [0, 70000]):
        with pytest.raises(MobileMMError, match="scale them to 8 or 16 bits"):
            first_row(values)


# --- rotation and animation ------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation: int, format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    plain = np.asarray(Image.open(io.BytesIO(encode(RGB, format, **options))))
    turned = {
        1: plain,
        2: plain[:, ::-1],
        3: plain[::-1, ::-1],
        4: plain[::-1],
        5: plain.transpose(1, 0, 2),
        6: np.rot90(plain, -1),
        7: np.rot90(plain, -1)[::-1],
        8: np.rot90(plain),
    }[orientation]
    image = open_image(encode(RGB, format, exif=exif(orientation), **options))
    np.testing.assert_array_equal(np.asarray(image), turned)
    np.testing.assert_array_equal(np.asarray(open_image(image)), turned)


def test_damaged_exif_does_not_hide_the_picture() -> None:
    data = encode(RGB, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    np.testing.assert_array_equal(np.asarray(open_image(data)), NOISE)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert open_image(data).getpixel((4, 4)) == RED


# --- refused ---------------------------------------------------------------------------------------------


def test_what_is_no_picture(tmp_path: Path) -> None:
    empty, text, folder = tmp_path / "empty.jpg", tmp_path / "text.jpg", tmp_path / "folder.jpg"
    empty.touch()
    text.write_text("not a picture at all")
    folder.mkdir()
    assert refusal(empty) == f"{empty}: the file is empty"
    assert refusal(text).startswith(f"{text}: not a picture that can be read (JPEG, PNG, ")
    assert refusal(folder) == f"{folder}: cannot be read (Is a directory)"
    missing = tmp_path / "missing.jpg"
    assert refusal(missing) == f"{missing}: cannot be read (No such file or directory)"
    assert "No such file" in refusal(str(tmp_path / "two\nlines.jpg"))
    assert "cannot be read" in refusal("x" * 5000)
    assert "null byte" in refusal("a\0b")
    assert "the file is empty" in refusal(b"")
    with text.open() as opened:
        assert "binary mode" in refusal(opened)
    for nonsense in (None, 3, [1, 2], NOISE):
        assert "give a path" in refusal(nonsense)


@pytest.mark.parametrize(("brand", "known"), [(b"heic", "HEIC"), (b"avif", "AVIF")])
def test_phone_formats_are_named(brand: bytes, known: str) -> None:
    assert f"{known} is not read; convert it" in refusal(b"\0\0\0\x18ftyp" + brand + b"\0" * 40)


def test_other_formats_start_no_program(tmp_path: Path) -> None:
    path = tmp_path / "drawing.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(path) as drawing:
        assert drawing.format == "EPS"
    assert "not a picture" in refusal(path)


@pytest.mark.parametrize("kind", ORDINARY)
@pytest.mark.parametrize("kept", [0.05, 0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(kind: str, kept: float) -> None:
    data = ORDINARY[kind]
    assert refusal(data[: int(len(data) * kept)]).startswith("image of ")


def test_libtiff_adds_no_lines_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    data = bytearray(encode(RGB, "TIFF", compression="tiff_deflate"))
    start = data.index(b"\x78")  # the zlib stream
    data[start + 40 : start + 60] = bytes(20)
    assert "damaged" in refusal(bytes(data))
    os.write(2, b"stderr is back")
    assert capfd.readouterr().err == "stderr is back"


def test_pil_logs_nothing_to_stderr() -> None:
    samples_per_pixel = struct.pack("<HHI", 277, 3, 1)
    data = ORDINARY["tiff"].replace(samples_per_pixel + b"\x03", samples_per_pixel + b"\x30")
    code = "import sys; from mobilemm.data.images import open_image; open_image(sys.stdin.buffer)"
    result = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=False)
    lines = result.stderr.decode().splitlines()
    assert lines[0].startswith("Traceback")  # nothing before it: the command line prints only its last line
    assert "damaged or cut short" in lines[-1]


def test_a_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(self):
        raise AssertionError("the bomb was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for side in (9000, 12000, 60000):  # past our limit, past PIL's warning, past PIL's error
            message = refusal(png(side, side, 8, 2, b"\0"))
            assert f"{side * side:,} pixels" in message
            assert f"{MAX_PIXELS:,}" in message
    assert limit == Image.MAX_IMAGE_PIXELS


def test_a_bomb_is_refused_as_a_pil_image_too() -> None:
    assert "9000×9000" in refusal(Image.open(io.BytesIO(png(9000, 9000, 8, 2, b"\0"))))


def test_a_strip_is_refused_when_its_square_would_be_too_large() -> None:
    assert open_image(Image.new("L", (1, MAX_SIDE))).size == (1, MAX_SIDE)
    assert f"1×{MAX_SIDE + 1} is too long" in refusal(Image.new("L", (1, MAX_SIDE + 1)))


def test_warning_filters_are_left_alone() -> None:
    before = list(warnings.filters)
    open_image(ORDINARY["jpeg"])
    threads = [threading.Thread(target=open_image, args=(ORDINARY["png"],)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


# --- anything at all -------------------------------------------------------------------------------------

FRAMES = [Image.new("P", (12, 9), index) for index in range(3)]
ANYTHING = [
    *ORDINARY.values(),
    encode(RGB, "JPEG", exif=exif(6)),
    encode(RGB.convert("RGBA"), "PNG"),
    encode(RGB.quantize(16), "PNG", transparency=3),
    encode(Image.fromarray(GRADIENT_16), "PNG"),
    encode(Image.fromarray(GRADIENT_16), "PPM"),
    encode(Image.fromarray(GRADIENT_16), "TIFF", compression="tiff_deflate"),
    encode(Image.fromarray(GRADIENT_16.astype(np.float32) / 65535), "TIFF"),
    encode(RGB, "TIFF", exif=exif(8)),
    encode(RGB.convert("1"), "TIFF", compression="group4"),
    encode(RGB, "PNG", exif=exif(3), icc_profile=b"\0" * 200),
    encode(RGB.convert("RGBA"), "WEBP", exif=exif(5)),
    png(3, 2, 16, 6, bytes(range(1 + 24)) * 2),
    *(
        encode(FRAMES[0], format, save_all=True, append_images=FRAMES[1:])
        for format in ("GIF", "WEBP", "PNG")
    ),
]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(ANYTHING), st.integers(0, 12), st.booleans(), st.randoms(use_true_random=False))
def test_damage_gives_a_picture_or_one_line(
    data: bytes, flips: int, truncated: bool, rng: random.Random
) -> None:
    damaged = bytearray(data)
    for _ in range(flips):
        # Half of the flips hit the header, where sizes, offsets and types stand.
        end = len(damaged) if rng.random() < 0.5 else min(len(damaged), 96)
        damaged[rng.randrange(end)] = rng.randrange(256)
    if truncated:
        del damaged[rng.randrange(len(damaged)) :]
    try:
        image = open_image(bytes(damaged))
    except MobileMMError as error:
        message: str | None = str(error)
    else:
        message = None
        assert image.mode == "RGB"
        assert min(image.size) >= 1
        assert image.width * image.height <= MAX_PIXELS
    assert message is None or (message and "\n" not in message)
