"""A whole checkpoint → a bundle that answers as the checkpoint does."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import mobilemm
from mobilemm.errors import MobileMMError
from mobilemm.export import plan_sizes
from mobilemm.export.assemble import export_bundle
from mobilemm.export.model import open_model
from mobilemm.export.options import ExportOptions
from mobilemm.export.plan_sizes import estimate, memory_warning
from mobilemm.export.quantization import make_plan
from mobilemm.export.targets import find_target
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import Bundle, open_bundle
from mobilemm.runtime.pytorch import ChatSession
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.self_check import self_check
from mobilemm.runtime.session import Session
from tests.export.conftest import Exported
from tests.export.tiny_checkpoint import LICENSE

pytest.importorskip("onnxruntime")

SHOWN = Sampling(max_new_tokens=12)
PICTURES = [
    Image.radial_gradient("L").resize((60, 40)).convert("RGB"),
    Image.linear_gradient("L").resize((20, 50)).convert("RGB"),
    Image.effect_noise((33, 33), 90).convert("RGB"),
    Image.new("RGB", (32, 32), "orange"),
]


def session_of(bundle: Bundle) -> Session:
    return Session(bundle, open_backend(bundle, 1), SHOWN)


def test_it_answers_as_the_checkpoint_does(in_full: Exported, checkpoint: Path) -> None:
    """Greedy, two turns each, on several pictures, on none, and on two at once."""
    ours, theirs = session_of(in_full.result.bundle), ChatSession(*mobilemm.load(checkpoint), SHOWN)
    seen = set()
    for pictures in (*([picture] for picture in PICTURES), [], PICTURES[:2]):
        answers: list[list[str]] = []
        for session in (ours, theirs):
            session.reset()
            for picture in pictures:
                session.look_at(picture)
            answers.append([session.reply("What is this?"), session.reply("And in this picture?")])
        assert answers[0] == answers[1]
        seen.add(tuple(answers[0]))
    assert len(seen) == 6  # the pictures matter


def test_the_answer_of_pytorch_stands_beside_the_bundles(in_full: Exported) -> None:
    (conversation,) = in_full.result.bundle.manifest.conversations
    assert in_full.result.pytorch_answer == conversation.answer != ""
    assert len(conversation.answer_ids) > 5
    assert conversation.input_ids.count(in_full.result.bundle.manifest.model.image_token_id) == 4


@pytest.mark.parametrize("kind", ["in_full", "in_int4"])
def test_it_passes_its_own_check(kind: str, request: pytest.FixtureRequest) -> None:
    bundle = open_bundle(request.getfixturevalue(kind).folder)
    checks = list(self_check(bundle, open_backend(bundle, 1)))
    assert [check.part for check in checks] == ["decoder", "embed", "vision", "conversation"]
    assert all(check.passed for check in checks), checks


def test_what_is_in_the_folder(in_int4: Exported, checkpoint: Path) -> None:
    names = {path.relative_to(in_int4.folder).as_posix() for path in in_int4.folder.rglob("*.*")}
    assert names == {
        *(f"parts/{part}.onnx" for part in ("decoder", "embed", "vision")),
        *(f"parts/{part}.onnx.data" for part in ("decoder", "embed", "vision")),
        *(f"golden/{part}.safetensors" for part in ("decoder", "embed", "vision")),
        *("golden/picture.png", "genai_config.json", "README.md", "tokenizer.json", "tokenizer_config.json"),
        *("manifest.json", "manifest.json.sha256"),
    }
    assert (in_int4.folder / "LICENSE").read_text() == LICENSE
    assert in_int4.result.bundle.manifest.model.license == "apache-2.0"
    # Nothing is left beside it, and nothing inside tells where it was made.
    assert os.listdir(in_int4.folder.parent) == ["int4"]
    for path in in_int4.folder.rglob("*"):
        if path.is_file():
            assert str(checkpoint.parent).encode() not in path.read_bytes(), path


def test_golden_vectors_are_small_and_finite(in_int4: Exported) -> None:
    bundle = in_int4.result.bundle
    assert [golden.part for golden in bundle.manifest.golden] == list(bundle.manifest.parts)
    for golden in bundle.manifest.golden:
        tensors = load_file(bundle.path(golden.file))
        part = bundle.manifest.parts[golden.part]
        assert f"outputs.{part.outputs[0].name}" in tensors
        assert {name for name in tensors if name.startswith("inputs.")} <= {
            f"inputs.{one.name}" for one in part.inputs
        }
        for name, value in tensors.items():
            assert np.isfinite(value).all(), name
            assert np.ptp(value) > 0, name
        assert bundle.path(golden.file).stat().st_size < 300_000
        assert golden.floor_db >= 15


def test_a_broken_export_leaves_its_finished_parts(in_int4: Exported) -> None:
    done = [line for line in in_int4.told if "(" not in line or line.startswith("error")]
    failed = next(index for index, line in enumerate(done) if line.startswith("error"))
    assert done[failed].startswith("error: part 'vision' (8 bits) is not what PyTorch says: conversion error")
    assert "Try --q-vision int8 or fp32" in done[failed]
    assert done[failed + 2 :] == [
        "decoder: unchanged",
        "embed: unchanged",
        "vision: quantizing",
        "vision: converting",
        "vision: verifying",
        "assembling",
    ]


def test_another_export_over_it_makes_only_what_changed(
    in_int4: Exported, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "b"
    shutil.copytree(in_int4.folder, folder)
    target, before = find_target("onnx"), open_bundle(folder).manifest
    plan = make_plan("int4", method="rtn", block_size=32, vision="fp32")
    told: list[str] = []
    options = replace(in_int4.options, plan=plan)
    with pytest.raises(MobileMMError, match="is there already; choose another place, or ask for overwriting"):
        export_bundle(str(checkpoint), target, folder, options)
    export_bundle(str(checkpoint), target, folder, options, overwrite=True, report=told.append)
    made = [line.split(":")[0] for line in told if line.endswith("converting")]
    assert made == ["vision"]
    assert [line for line in told if line.endswith("unchanged")] == [
        "decoder: unchanged",
        "embed: unchanged",
    ]
    after = open_bundle(folder).manifest
    assert after.parts["vision"].bytes > 1.5 * before.parts["vision"].bytes
    assert after.parts["decoder"] == before.parts["decoder"]
    told.clear()
    export_bundle(str(checkpoint), target, folder, options, overwrite=True, report=told.append)
    assert [line for line in told if line.endswith(("unchanged", "converting"))] == [
        f"{part}: unchanged" for part in ("decoder", "embed", "vision")
    ]
    assert os.listdir(tmp_path) == ["b"]


def test_an_occupied_place_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    place = tmp_path / "thesis"
    place.mkdir()
    (place / "thesis.tex").write_text("precious")
    with pytest.raises(MobileMMError, match=r"thesis: is there already and is no bundle"):
        export_bundle("no/such/model", find_target("onnx"), place, ExportOptions(), overwrite=True)
    assert os.listdir(place) == ["thesis.tex"]


@pytest.mark.parametrize("kind", ["in_full", "in_int4"])
def test_the_estimate_is_near_what_is_written(
    kind: str, checkpoint: Path, request: pytest.FixtureRequest
) -> None:
    exported = request.getfixturevalue(kind)
    expected = estimate(str(checkpoint), find_target("onnx"), exported.options)
    assert [part.name for part in expected.parts] == ["vision", "embed", "decoder"]
    for part in expected.parts:
        # The graph itself, tens of kilobytes, is not reckoned: it is nothing beside a real model's weights.
        written = (exported.folder / "parts" / f"{part.name}.onnx.data").stat().st_size
        assert 0.8 * written <= part.bytes <= 1.25 * written, part
        found = exported.result.bundle.manifest.parts[part.name].parameters
        assert part.parameters == pytest.approx(found, rel=0.05)
    assert expected.seconds > 0


def test_a_small_machine_is_told_early(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ExportOptions(plan=make_plan("int4"))
    model = open_model(str(checkpoint), options)
    monkeypatch.setattr(plan_sizes, "available_memory", lambda: 300_000_000)
    warning = memory_warning(model, find_target("onnx"), options)
    assert warning is not None
    assert re.search(r"--target onnx will take about 0\.\d GB of memory here, and 0\.3 GB are free", warning)
    monkeypatch.setattr(plan_sizes, "available_memory", lambda: 64_000_000_000)
    assert memory_warning(model, find_target("onnx"), options) is None
