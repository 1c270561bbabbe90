"""`mobilemm verify`: exit codes, what it prints, and that a changed weight shows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilemm.export.assemble import export_bundle
from mobilemm.export.options import ExportOptions
from mobilemm.export.quantization import make_plan
from mobilemm.export.targets import find_target
from mobilemm.runtime.bundle import open_bundle
from tests.runtime.tiny_bundle import rehash

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def int4(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the other commands' tests, its language model and embedding in 4 bits, vision in 8."""
    folder = tmp_path_factory.mktemp("verify") / "int4"
    options = ExportOptions(plan=make_plan("int4", method="rtn", block_size=32))
    return export_bundle(str(pristine), find_target("onnx"), folder, options).bundle.folder


@pytest.fixture
def bundle(int4: Path, tmp_path: Path) -> Path:
    """A copy, free to be changed."""
    return Path(shutil.copytree(int4, tmp_path / "bundle"))


def test_a_good_bundle(run: Run, int4: Path) -> None:
    ended = run("verify", int4, "--threads", 1)
    assert (ended.code, ended.stderr) == (0, "")
    files, *checks = ended.stdout.splitlines()
    count = len(open_bundle(int4).manifest.files)
    assert files == f"files: {count} as the manifest says, hashes included"
    assert [line.split(",")[0] for line in checks] == [
        "decoder: ok",
        "embed: ok",
        "vision: ok",
        "conversation: ok",
    ]


@pytest.mark.parametrize("name", ["none", "empty"])
def test_what_is_no_bundle(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / name) in run("verify", tmp_path / name).error


@pytest.mark.parametrize("part", ["decoder", "vision", "embed"])
def test_a_damaged_file_is_named(run: Run, bundle: Path, part: str) -> None:
    path = bundle / "parts" / f"{part}.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(bytes(data))
    assert f"{path}: damaged or changed" in run("verify", bundle).error


# --- one weight ---------------------------------------------------------------------------------------------


class Codes:
    """A part's quantized weights where they lie on the disk."""

    def __init__(self, folder: Path, part: str) -> None:
        self.graph = onnx.load(folder / "parts" / f"{part}.onnx", load_external_data=False).graph
        self.folder = folder
        kinds = (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
        self.tensors = [
            one
            for one in self.graph.initializer
            if one.data_type in kinds and one.external_data and "zero_points" not in one.name
        ]
        self.sizes = np.array([np.prod(one.dims) for one in self.tensors], float)

    def change_one(self, chance: np.random.Generator, by: int) -> None:
        """One byte of a tensor drawn by size; `by` are the bits that are turned."""
        tensor = self.tensors[chance.choice(len(self.tensors), p=self.sizes / self.sizes.sum())]
        where = {entry.key: entry.value for entry in tensor.external_data}
        row = int(chance.integers(tensor.dims[0]))
        length = int(np.prod(tensor.dims[1:]))
        place = int(where.get("offset", 0)) + row * length + int(chance.integers(length))
        with (self.folder / "parts" / where["location"]).open("r+b") as file:
            file.seek(place)
            old = file.read(1)[0]
            file.seek(place)
            file.write(bytes([old ^ by]))
        rehash(self.folder)


def failed_parts(run: Run, folder: Path) -> list[str]:
    """What `verify` says is no longer what it was; hashes hold."""
    ended = run("verify", folder, "--threads", 1)
    if ended.code == 0:
        return []
    assert ended.code == 1
    named = [line.split(":")[0] for line in ended.stdout.splitlines() if ": FAILED" in line]
    assert ended.stderr == f"error: {folder}: {', '.join(named)} failed: export it anew\n"
    return named


@pytest.mark.parametrize("part", ["decoder", "embed", "vision"])
def test_one_changed_weight_shows(run: Run, int4: Path, part: str, tmp_path: Path) -> None:
    """4-bit codes move by 8 of 16, 8-bit ones by 128 of 256.

    A weight whose input is nothing in the golden vectors cannot show: one of twelve is allowed for.
    """
    chance = np.random.default_rng(0)
    named = []
    for trial in range(12):
        folder = tmp_path / str(trial)
        shutil.copytree(int4, folder)
        Codes(folder, part).change_one(chance, 0x80 if part == "vision" else 0x08)
        named.append(failed_parts(run, folder))
    assert sum(part in names for names in named) >= 11, named
    others = {"decoder", "embed", "vision"} - {part}
    assert not any(others & set(names) for names in named)
