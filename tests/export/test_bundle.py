from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import yaml

from mobilemm.errors import MobileMMError
from mobilemm.export import bundle as writing
from mobilemm.export.bundle import BundleWriter, lock_folder, recover
from mobilemm.export.model import open_model
from mobilemm.export.model_card import model_card
from mobilemm.export.options import ExportOptions
from mobilemm.runtime.bundle import open_bundle
from mobilemm.runtime.manifest import Manifest
from tests.runtime.tiny_bundle import tiny_manifest, write_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts") / "parts"
    write_parts(folder)
    return folder


def write(parts: Path, destination: Path, name: str = "tiny", overwrite: bool = False) -> Path:
    manifest = tiny_manifest()
    manifest = manifest.model_copy(update={"model": manifest.model.model_copy(update={"name": name})})
    with BundleWriter(destination, overwrite=overwrite) as writer:
        shutil.copytree(parts, writer.folder, dirs_exist_ok=True)
        return writer.finish(manifest, license_text="Do as you like.\n").folder


def test_what_is_written_opens_and_describes_itself(parts: Path, tmp_path: Path) -> None:
    folder = write(parts, tmp_path / "new" / "tiny-onnx")
    assert os.listdir(tmp_path / "new") == ["tiny-onnx"]
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((folder / "parts").stat().st_mode)
    bundle = open_bundle(folder)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {file.path for file in bundle.manifest.files} == names - {"manifest.json", "manifest.json.sha256"}
    assert {"README.md", "LICENSE"} <= names
    decoder = bundle.manifest.parts["decoder"]
    assert decoder.bytes == sum((folder / file).stat().st_size for file in decoder.files)


def test_the_model_card_has_the_manifests_figures() -> None:
    manifest = tiny_manifest()
    card = model_card(manifest)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "library_name": "mobilemm",
        "pipeline_tag": "image-text-to-text",
    }
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines() if line.startswith("|")
    ]
    assert rows[2:] == [
        ["vision", "32", "0.0", "1,000", "61.5 dB, cosine 0.99999"],
        ["embed", "32", "0.0", "1,000", "not measured"],
        [
            "decoder",
            "4, block 16, some 32",
            "0.0",
            "1,000",
            "30.2 dB, cosine 0.99900, top-1 98.0%, KL 0.0020",
        ],
    ]
    assert "onnxruntime 1.24.0" in body


def test_a_licence_of_ones_own_is_in_its_file() -> None:
    manifest = tiny_manifest()
    own = manifest.model_copy(update={"model": manifest.model.model_copy(update={"license": "other"})})
    file = manifest.files[0].model_copy(update={"path": "LICENSE"})
    assert "See the file `LICENSE`." in model_card(own.model_copy(update={"files": [file]}))
    assert model_card(own.model_copy(update={"files": []})).endswith("## Licence\n\nother\n")


def test_the_default_models_licences_go_with_it() -> None:
    """Where the default model is named, as none given, its parts' licences are."""
    model = open_model(None, ExportOptions())
    assert model.license == "other"
    assert model.license_text is not None
    for name in ("SmolLM2", "EfficientNet", "OpenMoji", "CC BY-SA 4.0", "WordNet"):
        assert name in model.license_text


@pytest.mark.parametrize(
    "text", ["a: b\n---\nx", "[x](y)", '"', "Licence of ours, see LICENSE", "", "*", "a" * 999]
)
def test_no_name_or_licence_breaks_the_model_card(text: str) -> None:
    manifest = tiny_manifest()
    model = manifest.model.model_copy(update={"license": text, "name": text or "x", "family": f"|{text}|"})
    card = model_card(manifest.model_copy(update={"model": model}))
    front = yaml.safe_load(card.split("---\n", 2)[1])
    assert front["license"] == "other"
    headings = [line for line in card.splitlines() if line.startswith("# ")]
    assert len(headings) == 1


def test_an_error_leaves_nothing(parts: Path, tmp_path: Path) -> None:
    def fail() -> None:
        with BundleWriter(tmp_path / "b") as writer:
            shutil.copytree(parts, writer.folder, dirs_exist_ok=True)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(tmp_path) == []


def test_a_bundle_that_would_not_open_gets_no_name(parts: Path, tmp_path: Path) -> None:
    manifest = tiny_manifest()
    wrong = manifest.model_copy(update={"model": manifest.model.model_copy(update={"num_layers": 3})})
    with BundleWriter(tmp_path / "b") as writer:
        shutil.copytree(parts, writer.folder, dirs_exist_ok=True)
        with pytest.raises(MobileMMError, match="keys and values of 2 layers, where the model has 3"):
            writer.finish(wrong)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a b", "é", ".hidden", "x/..y"])
def test_names_that_bundles_cannot_have(parts: Path, tmp_path: Path, name: str) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        shutil.copytree(parts, writer.folder, dirs_exist_ok=True)
        (writer.folder / name).parent.mkdir(exist_ok=True)
        (writer.folder / name).write_text("x")
        with pytest.raises(MobileMMError, match="plain files with names of letters"):
            writer.finish(tiny_manifest())


def test_only_a_bundle_is_replaced_and_only_when_asked(parts: Path, tmp_path: Path) -> None:
    folder = write(parts, tmp_path / "b", "old")
    with pytest.raises(MobileMMError, match=r"b: is there already; .* overwriting"):
        write(parts, folder, "new")
    assert open_bundle(folder).manifest.model.name == "old"
    write(parts, folder, "new", overwrite=True)
    assert open_bundle(folder).manifest.model.name == "new"
    (folder / "my notes.txt").write_text("precious")
    with pytest.raises(MobileMMError, match="is no bundle that could be replaced"):
        write(parts, folder, "newer", overwrite=True)
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("precious")
    with pytest.raises(MobileMMError, match="is no bundle that could be replaced"):
        write(parts, home, overwrite=True)
    (tmp_path / "empty").mkdir()
    write(parts, tmp_path / "empty")
    assert sorted(os.listdir(tmp_path)) == ["b", "empty", "home"]


def test_what_dead_processes_left_is_removed_and_living_ones_keep_theirs(parts: Path, tmp_path: Path) -> None:
    dead = tmp_path / ".b.partial-1-0"
    dead.mkdir()
    (dead / "x").write_text("x")
    other = tmp_path / ".bb.partial-1-0"
    other.mkdir()
    with BundleWriter(tmp_path / "b") as first:
        assert not dead.exists()
        with BundleWriter(tmp_path / "b") as second:
            assert first.folder != second.folder
            assert first.folder.is_dir()
    assert os.listdir(tmp_path) == [other.name]


def test_a_replacement_that_died_between_its_renames_is_undone(parts: Path, tmp_path: Path) -> None:
    folder = write(parts, tmp_path / "b", "old")
    folder.rename(tmp_path / ".b.replaced-1-0")
    recover(folder)
    assert open_bundle(folder).manifest.model.name == "old"
    # One that died while it deleted the old bundle leaves no manifest there.
    half = tmp_path / ".b.replaced-1-0"
    shutil.move(folder, half)
    (half / "manifest.json").unlink()
    recover(folder)
    assert os.listdir(tmp_path) == []


def test_a_folder_is_locked_once(tmp_path: Path) -> None:
    lock = lock_folder(tmp_path)
    assert lock is not None
    assert lock_folder(tmp_path) is None
    os.close(lock)
    again = lock_folder(tmp_path)
    assert again is not None
    os.close(again)


@pytest.mark.slow
def test_a_kill_leaves_the_old_bundle_the_new_one_or_nothing(parts: Path, tmp_path: Path) -> None:
    """Processes that write and overwrite without end are killed, each at another moment."""
    rng = random.Random(0)
    destination = tmp_path / "b"
    there = 0
    for number in range(25):
        child = os.fork()
        if child == 0:
            try:
                while True:
                    write(parts, destination, f"run {number}", overwrite=True)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.02, 0.5))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        if destination.exists():
            open_bundle(destination)
            there += 1
    assert there > 3
    write(parts, destination, "last", overwrite=True)
    assert open_bundle(destination).manifest.model.name == "last"
    assert os.listdir(tmp_path) == ["b"]


def die_before(steps: int) -> None:
    """Lets this process die before its n-th rename, sync, removal or check."""
    left = count(steps, -1)

    def mortal(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            if next(left) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return step

    os.rename, os.fsync, shutil.rmtree = mortal(os.rename), mortal(os.fsync), mortal(shutil.rmtree)
    writing.open_bundle = mortal(writing.open_bundle)


def test_a_kill_at_each_step_of_a_replacement(parts: Path, tmp_path: Path) -> None:
    destination = tmp_path / "b"
    write(parts, destination, "old")
    outcomes = set()
    for steps in range(1, 60):
        child = os.fork()
        if child == 0:
            die_before(steps)
            try:
                write(parts, destination, "new", overwrite=True)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        recover(destination)
        name = open_bundle(destination).manifest.model.name
        outcomes.add((name, os.WIFSIGNALED(status)))
        assert os.listdir(tmp_path) == ["b"]
        if not os.WIFSIGNALED(status):
            break
        if name == "new":
            write(parts, destination, "old", overwrite=True)
    assert outcomes == {("old", True), ("new", True), ("new", False)}


def test_a_manifest_is_stored_as_its_classes_read_it(parts: Path, tmp_path: Path) -> None:
    folder = write(parts, tmp_path / "b")
    data = (folder / "manifest.json").read_bytes()
    assert Manifest.model_validate_json(data).model_dump(mode="json") == json.loads(data)
