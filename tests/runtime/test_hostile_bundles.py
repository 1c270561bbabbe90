"""2,000 damaged and hostile bundles, made of one that runs: each refused in one line, before it is loaded."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from mobilemm.errors import MobileMMError
from mobilemm.export.bundle import BundleWriter
from mobilemm.runtime.bundle import open_bundle
from tests.runtime.damages import (
    Damage,
    add,
    add_a_key,
    change_a_number,
    change_a_path,
    change_a_type,
    cut,
    delete,
    disagree,
    drop_a_key,
    flip_a_bit,
    garble,
    lengthen,
    lie_about_a_file,
    list_twice,
    make_special,
    swap,
)
from tests.runtime.onnx_damages import (
    change_interface,
    change_operators,
    lead_outside,
    misfit_quantized,
    misplace,
    misshape,
    retype,
    rewrite,
    shorten_external_data,
    spoil_hidden_values,
    spoil_protobuf,
    spoil_values,
)
from tests.runtime.tiny_bundle import rehash, tiny_manifest, write_parts

ALL = ("vision", "embed", "decoder")
DAMAGES: list[tuple[Damage, int]] = [
    (flip_a_bit, 400),
    (cut, 150),
    (lengthen, 50),
    (swap, 60),
    (delete, 30),
    (make_special, 80),
    (add, 50),
    (change_a_type, 150),
    (drop_a_key, 100),
    (add_a_key, 60),
    (change_a_number, 120),
    (change_a_path, 120),
    (list_twice, 30),
    (lie_about_a_file, 60),
    (disagree, 110),
    (garble, 110),
    (rewrite(spoil_values, ALL), 80),
    (rewrite(spoil_hidden_values, ALL), 20),
    (rewrite(lead_outside, ("decoder",)), 40),
    (rewrite(misplace, ("decoder",)), 40),
    (rewrite(misshape, ALL), 40),
    (rewrite(retype, ALL), 20),
    (rewrite(misfit_quantized, ("decoder",)), 20),
    (rewrite(change_operators, ALL), 20),
    (rewrite(change_interface, ALL), 30),
    (spoil_protobuf, 20),
    (shorten_external_data, 10),
]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with BundleWriter(tmp_path_factory.mktemp("pristine") / "tiny-onnx") as writer:
        write_parts(writer.folder)
        return writer.finish(tiny_manifest()).folder


def test_there_are_two_thousand() -> None:
    assert sum(count for _, count in DAMAGES) >= 2000


@pytest.mark.parametrize(
    ("damage", "count"), DAMAGES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_damaged_bundles_are_refused_in_one_line(
    damage: Damage, count: int, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    rng = random.Random(damage.__name__)
    for number in range(count):
        folder = tmp_path / str(number) / "tiny-onnx"
        shutil.copytree(pristine, folder)
        told = damage(rng, folder)
        try:
            open_bundle(folder)
        except MobileMMError as error:
            line = str(error)
            assert line.isprintable(), (told, line)
            assert str(folder) in line, (told, line)
            assert len(line) - len(str(folder)) < 400, (told, line)
        else:
            pytest.fail(f"{damage.__name__} {number} was not refused: {told}")
        shutil.rmtree(tmp_path / str(number))


def test_what_damages_start_from_is_whole(pristine: Path) -> None:
    """Rehashing alone, which the hostile ones do last, changes nothing."""
    open_bundle(pristine)
    before = (pristine / "manifest.json").read_text()
    rehash(pristine)
    open_bundle(pristine)
    assert json.loads(before) == json.loads((pristine / "manifest.json").read_text())
