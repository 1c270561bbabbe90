"""A bundle's own proof: what passes here, what passes elsewhere, and what is told of the rest."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.backends.onnx import OnnxBackend
from mobilemm.runtime.bundle import Bundle, open_bundle
from mobilemm.runtime.manifest import Golden, GoldenConversation, Manifest
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.self_check import (
    MAX_DB,
    Check,
    machine,
    peak_db,
    runtime_version,
    self_check,
    snr_db,
)
from mobilemm.runtime.session import Session
from tests.runtime.tiny_bundle import rehash, write_manifest

QUESTION = "What is this?"


@pytest.fixture
def proven(shared_folder: Path, tmp_path: Path) -> Path:
    """The tiny bundle with golden vectors of each part and a conversation, made on this machine."""
    folder = Path(shutil.copytree(shared_folder, tmp_path / "proven"))
    bundle = open_bundle(folder)
    backend = open_backend(bundle, 1)
    (folder / "golden").mkdir()
    noise = np.random.default_rng(0)
    image = bundle.manifest.image
    assert image is not None
    pixels = noise.integers(0, 256, (1, 3, image.height, image.width), np.uint8)
    features = backend.run("vision", {"pixels": pixels})["image_features"]
    ids = np.array([[5, bundle.manifest.model.image_token_id, 7, 9]])
    embedding = {"input_ids": ids, "image_features": features[:1]}
    embeds = backend.run("embed", embedding)["inputs_embeds"]
    vectors: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "vision": ({"pixels": pixels}, {"image_features": features}),
        "embed": (embedding, {"inputs_embeds": embeds}),
        "decoder": ({"inputs_embeds": embeds}, {"logits": backend.decoder().decode(embeds)}),
    }
    for part, (inputs, outputs) in vectors.items():
        named = {f"inputs.{name}": value for name, value in inputs.items()}
        named |= {f"outputs.{name}": value for name, value in outputs.items()}
        save_file(named, folder / "golden" / f"{part}.safetensors")
    Image.linear_gradient("L").convert("RGB").save(folder / "golden" / "picture.png")
    change(
        folder,
        created_by={"mobilemm": "test", **runtime_version("onnx"), "machine": machine()},
        golden=[Golden(file=f"golden/{part}.safetensors", part=part, floor_db=30) for part in vectors],
        conversations=[],
    )
    session = Session(open_bundle(folder), OnnxBackend(open_bundle(folder), 1), Sampling(max_new_tokens=8))
    session.look_at(folder / "golden" / "picture.png")
    answer = session.reply(QUESTION)
    change(
        folder,
        conversations=[
            GoldenConversation(
                image="golden/picture.png",
                prompt=QUESTION,
                input_ids=[1],
                answer_ids=session.answer_ids,
                answer=answer,
            )
        ],
    )
    return folder


def change(folder: Path, **fields: Any) -> None:
    """Other fields in the manifest, all files listed, hashes made to fit."""
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_text())
    listed = {file.path for file in manifest.files}
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    new = [path for path in paths if path not in listed and not path.startswith("manifest.json")]
    files = [*manifest.files, *(manifest.files[0].model_copy(update={"path": path}) for path in new)]
    manifest = manifest.model_copy(update={**fields, "files": files})
    write_manifest(folder, manifest.model_dump_json().encode())
    rehash(folder)


def vectors_of(folder: Path, part: str) -> dict[str, np.ndarray]:
    return load_file(folder / "golden" / f"{part}.safetensors")


def put_vectors(folder: Path, part: str, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, folder / "golden" / f"{part}.safetensors")
    rehash(folder)


def checks_of(folder: Path, threads: int = 1) -> dict[str, Check]:
    bundle = open_bundle(folder)
    return {check.part: check for check in self_check(bundle, open_backend(bundle, threads))}


@pytest.mark.parametrize("threads", [1, 2])
def test_where_it_was_made_all_is_the_same(proven: Path, threads: int) -> None:
    checks = checks_of(proven, threads)
    assert list(checks) == ["vision", "embed", "decoder", "conversation"]
    assert all(check.passed for check in checks.values()), checks
    assert checks["decoder"].text.endswith("dB to its golden vectors, as when it was made")
    assert "answers as when it was made: " in checks["conversation"].text


def test_one_number_of_many_shows_where_it_was_made(proven: Path) -> None:
    """A thousandth of the mean in one logit: beyond what the order of additions does, far above the floor."""
    tensors = vectors_of(proven, "decoder")
    logits = tensors["outputs.logits"]
    logits.flat[17] += 1e-3 * np.sqrt(np.square(logits).mean())
    put_vectors(proven, "decoder", tensors)
    checks = checks_of(proven)
    assert [part for part, check in checks.items() if not check.passed] == ["decoder"]
    assert "one number is only within 60." in checks["decoder"].text.replace("59.9", "60.0")
    # Another processor, or another version of the runtime, may round otherwise: there the floor holds.
    for created_by in ({"machine": "riscv64"}, {"onnxruntime": "1.0"}, {}):
        here = {**runtime_version("onnx"), "machine": machine()}
        change(proven, created_by={**here, **created_by} if created_by else {"mobilemm": "test"})
        assert checks_of(proven)["decoder"].passed


def test_below_the_floor_a_part_fails_everywhere(proven: Path) -> None:
    change(proven, created_by={"mobilemm": "test"})
    tensors = vectors_of(proven, "vision")
    noise = np.random.default_rng(1).normal(size=tensors["outputs.image_features"].shape)
    scale = np.sqrt(np.square(tensors["outputs.image_features"]).mean())
    tensors["outputs.image_features"] += (0.1 * scale * noise).astype(np.float32)
    put_vectors(proven, "vision", tensors)
    checks = checks_of(proven)
    assert [part for part, check in checks.items() if not check.passed] == ["vision"]
    assert checks["vision"].text.startswith(("20.", "19."))
    assert checks["vision"].text.endswith("dB to its golden vectors, at least 30 dB is wanted")


@pytest.mark.parametrize("damage", ["shape", "missing", "other name", "input"])
def test_vectors_that_do_not_fit_fail_by_their_part(proven: Path, damage: str) -> None:
    tensors = vectors_of(proven, "embed")
    if damage == "shape":
        tensors["outputs.inputs_embeds"] = tensors["outputs.inputs_embeds"][:, :-1].copy()
    elif damage == "missing":
        del tensors["outputs.inputs_embeds"]
    elif damage == "other name":
        tensors["outputs.more"] = tensors["outputs.inputs_embeds"]
    else:
        tensors["inputs.input_ids"] = tensors["inputs.input_ids"].astype(np.float32)
    put_vectors(proven, "embed", tensors)
    checks = checks_of(proven)
    assert [part for part, check in checks.items() if not check.passed] == ["embed"]
    assert "\n" not in checks["embed"].text


def test_another_answer_fails_only_where_it_was_made(proven: Path) -> None:
    (conversation,) = open_bundle(proven).manifest.conversations
    change(proven, conversations=[conversation.model_copy(update={"answer": "42"})])
    check = checks_of(proven)["conversation"]
    assert not check.passed
    assert check.text == f"answers {conversation.answer!r}; when it was made it was '42'"
    change(proven, created_by={"mobilemm": "test"})
    assert checks_of(proven)["conversation"].passed


def test_a_bundle_without_proof_has_nothing_to_check(bundle: Bundle) -> None:
    assert list(self_check(bundle, open_backend(bundle, 1))) == []


# --- the measures -------------------------------------------------------------------------------------------


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_noise_and_peak() -> None:
    wanted = floats(3, 4, 0, 0)
    # Errors 0.3 and 0.4 under 3 and 4: a tenth. Root mean square 2.5 over the largest, 0.4.
    found = floats(3.3, 4.4, 0, 0)
    assert snr_db(found, wanted) == pytest.approx(20, abs=1e-4)
    assert peak_db(found, wanted) == pytest.approx(20 * math.log10(2.5 / 0.4), abs=1e-4)


@pytest.mark.parametrize("measure", [snr_db, peak_db])
def test_measures_at_their_ends(measure: Any) -> None:
    assert measure(floats(1, 2), floats(1, 2)) == MAX_DB
    assert measure(floats(0, 0), floats(0, 0)) == MAX_DB
    assert measure(floats(1, 0), floats(0, 0)) == -MAX_DB
    assert measure(floats(1, np.nan), floats(1, 2)) == -MAX_DB
    assert measure(floats(1, np.inf), floats(1, 2)) == -MAX_DB
    assert measure(floats(1), floats(1, 1)) == -MAX_DB
    assert measure(floats(1e30), floats(1e-30)) == -MAX_DB


def test_the_kind_of_processor_is_told() -> None:
    words = machine().split()
    assert words[0]
    assert len(words) == len(set(words))
    assert words[0] != "x86_64" or "avx2" in words  # what onnxruntime needs to be fast on a PC
