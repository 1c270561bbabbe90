"""Manifests of bundles that draw, and pictures of what their parts give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilemm.errors import MobileMMError
from mobilemm.export.bundle import BundleWriter
from mobilemm.runtime.drawing import to_uint8
from mobilemm.runtime.manifest import Manifest
from mobilemm.runtime.manifest_check import parse_manifest
from tests.phone_drawing_manifests import (
    LAST,
    RENEWS,
    changed,
    drawing_manifest,
    stepwise_manifest,
    tensor,
    write_drawing_manifests,
)
from tests.runtime.tiny_bundle import tiny_manifest, write_parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    with BundleWriter(folder / "tiny-onnx") as writer:
        write_parts(writer.folder)
        writer.finish(tiny_manifest())
    return folder


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Any:
    return json.loads((folder / "tiny-onnx" / "manifest.json").read_text(encoding="utf-8"))


def parsed(manifest: dict[str, Any]) -> Manifest:
    return parse_manifest(json.dumps(manifest).encode(), Path("manifest.json"))


def test_the_phones_cases_are_read_or_refused_in_one_line_each(folder: Path) -> None:
    write_drawing_manifests(folder)


@pytest.mark.parametrize(
    ("schedules", "told"),
    [
        ([[LAST]], "key 'generation.schedules': must be one for each number of steps, 2 among them"),
        ([[RENEWS, LAST]] * 2, "must be one for each number of steps"),
        ([[RENEWS, LAST], [LAST] * 51], "key 'generation.schedules.1': has 51 elements, where at most 50"),
        ([[RENEWS, LAST[:4]]], "key 'generation.schedules.0.1': has 4 elements, where at least 5"),
        ([[RENEWS, RENEWS]], "key 'generation.noise.shape': is '(1, 2, 4, 8, 8)', where (1, 3, "),
        ([[RENEWS, [*LAST[:4], float("nan")]]], "'NaN' is no finite number"),
        (None, "the part 'generator' is missing"),
    ],
)
def test_schedules_that_do_not_hold_together_are_refused(tiny: Any, schedules: Any, told: str) -> None:
    change = (("generation", "schedules"), schedules)
    with pytest.raises(MobileMMError) as refused:
        parsed(changed(stepwise_manifest(tiny), change))
    assert told in str(refused.value)


def test_noise_is_counted_as_sessions_count_it(tiny: Any) -> None:
    """In float32: this number is 0 there."""
    change = (("generation", "schedules"), [[RENEWS, [*LAST[:4], 1e-50]]])
    assert parsed(changed(stepwise_manifest(tiny), change)).generation is not None


@pytest.mark.parametrize("target", ["onnx", "coreml", "executorch"])
@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ([tensor("more", "words"), tensor("signal_logits", 1, 2, 16)], "'more' is none that a session knows"),
        ([tensor("signal_logits", 1, 2, "words"), tensor("signal_logits", 1, 2, 16)], "two have one name"),
    ],
)
def test_parts_that_draw_have_no_other_tensors(tiny: Any, inputs: Any, told: str, target: str) -> None:
    good = {**drawing_manifest(tiny), "target": target}
    with pytest.raises(MobileMMError, match=r"parts\.output_projector\.inputs.*" + told):
        parsed(changed(good, (("parts", "output_projector", "inputs"), inputs)))


def test_a_picture_in_half_precision_is_rounded_once() -> None:
    picture = np.linspace(0, 1, 3 * 8 * 8, dtype=np.float16).reshape(1, 3, 8, 8)
    wanted = np.rint(picture[0].astype(np.float64) * 255).astype(np.uint8).transpose(1, 2, 0)
    np.testing.assert_array_equal(to_uint8(picture), wanted)
