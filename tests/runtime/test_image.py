"""Pictures → pixels by the manifest's rule, bit for bit what the families' own image processors make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PIL
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import mobilemm
from mobilemm.errors import MobileMMError
from mobilemm.export.families import split_model
from mobilemm.runtime.image import to_pixels
from mobilemm.runtime.manifest import Image
from tests.families import conftest as tiny

SIZES = [(40, 30), (30, 40), (64, 64), (56, 56), (7, 5), (1, 1), (333, 201), (200, 777), (640, 480)]


def picture(size: tuple[int, int]) -> PIL.Image:
    """Noise over a gradient, so that every step of a filter shows."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3))
    gradient = np.asarray(PIL.radial_gradient("L").resize(size))[..., None]
    return PIL.fromarray(((noise + gradient) // 2).astype(np.uint8))


def unnormalized(values: Any, mean: Any, std: Any) -> np.ndarray[Any, Any]:
    """Normalized pixels (3, height, width) → levels 0…255, not rounded."""
    values = np.asarray(values, np.float64)
    return (values * np.reshape(std, (3, 1, 1)) + np.reshape(mean, (3, 1, 1))) * 255


def difference(rule: Image, processor: Any, size: tuple[int, int], **settings: Any) -> float:
    """The largest, in levels."""
    values = np.asarray(processor(picture(size), return_tensors="np", **settings)["pixel_values"])
    values = values.reshape(-1, *values.shape[-3:])[0]
    mean, std = processor.image_mean, processor.image_std
    found = to_pixels(picture(size), rule)
    assert found.dtype == np.uint8
    assert found.shape == (3, rule.height, rule.width)
    assert found.flags["C_CONTIGUOUS"]
    return float(np.abs(unnormalized(values, mean, std) - found).max())


BIT_EQUAL = 1e-3  # of a level: what normalizing in float32 costs


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pad(size: tuple[int, int]) -> None:
    """LLaVA-1.5's, and MobileVLM's."""
    processor = LlavaImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, do_pad=True
    )
    color = tuple(int(channel * 255) for channel in processor.image_mean)
    rule = Image(height=56, width=56, strategy="pad", filter="bicubic", pad_color=color)  # type: ignore[arg-type]
    assert difference(rule, processor, size) < BIT_EQUAL


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("crop", [(56, 56), (40, 51)], ids=str)
def test_crop(size: tuple[int, int], crop: tuple[int, int]) -> None:
    """CLIP's."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": crop[0], "width": crop[1]}
    )
    rule = Image(height=crop[0], width=crop[1], strategy="crop", filter="bicubic", shortest_edge=56)
    assert difference(rule, processor, size) < BIT_EQUAL


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("code", "filter"), [(2, "bilinear"), (3, "bicubic"), (1, "lanczos"), (0, "nearest")]
)
def test_stretch(size: tuple[int, int], code: int, filter: Any) -> None:
    """SigLIP's."""
    processor = SiglipImageProcessorPil(size={"height": 48, "width": 56}, resample=code)
    rule = Image(height=48, width=56, strategy="stretch", filter=filter)
    assert difference(rule, processor, size) < BIT_EQUAL


# What transformers does by default, on torchvision: its resampling rounds otherwise, and SmolVLM's takes two
# steps. The largest difference in levels over SIZES, as measured on noise.
TORCHVISION = {"fast_vlm": 2, "internvl": 1, "smolvlm": 17}


@pytest.mark.parametrize(
    "build",
    [tiny.smolvlm, tiny.fast_vlm, tiny.internvl],
    ids=lambda build: build.__name__,
)
def test_families(build: Any, tmp_path: Path) -> None:
    build(tmp_path)
    model, processor = mobilemm.load(tmp_path)
    split = split_model(model, processor)
    images = split.processor.image_processor
    for size in SIZES:
        assert difference(split.image, images, size) < BIT_EQUAL, size
    settings: dict[str, Any] = {"crop_to_patches": False} if build is tiny.internvl else {}
    if build is tiny.smolvlm:
        settings = {"do_image_splitting": False}
    worst = max(difference(split.image, processor.image_processor, size, **settings) for size in SIZES)
    assert worst < TORCHVISION[build.__name__] + BIT_EQUAL


def test_qwen_patches_are_the_same_pixels(tmp_path: Path) -> None:
    """Its processor cuts the picture into patches; put together again they are our pixels."""
    tiny.qwen2_5_vl(tmp_path)
    split = split_model(*mobilemm.load(tmp_path))
    images = split.processor.image_processor
    for size in SIZES:
        made = images(picture(size), return_tensors="np")
        _, rows, columns = made["image_grid_thw"][0]
        # (rows/2, columns/2, 2, 2, channels, time, 14, 14), as in Qwen2-VL's own patchify
        patches = made["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)[..., 0, :, :]
        values = patches.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * 14, columns * 14)
        found = to_pixels(picture(size), split.image)
        assert np.abs(unnormalized(values, split.mean, split.std) - found).max() < BIT_EQUAL


def test_sources_are_the_same_picture(tmp_path: Path) -> None:
    rule = Image(height=8, width=8, strategy="stretch", filter="bicubic")
    path = tmp_path / "a.png"
    picture((40, 30)).save(path)
    wanted = to_pixels(picture((40, 30)), rule)
    for source in (path, str(path), path.read_bytes()):
        assert np.array_equal(to_pixels(source, rule), wanted)
    with pytest.raises(MobileMMError, match="No such file"):
        to_pixels(tmp_path / "none.png", rule)


def test_a_picture_too_narrow_to_crop() -> None:
    rule = Image(height=224, width=224, strategy="crop", filter="bicubic", shortest_edge=224)
    with pytest.raises(MobileMMError, match="1×16000 is too narrow"):
        to_pixels(PIL.new("RGB", (1, 16000)), rule)
