"""The stand-in for ExecuTorch's Android library declares what the library was seen to declare."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "android_demo"))

import executorch_names

BACKEND = executorch_names.HERE / "executorch" / "src" / "main" / "kotlin"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A library that has what the stand-in has."""
    target = tmp_path / "v1" / executorch_names.PUBLISHED
    target.mkdir(parents=True)
    for file in executorch_names.files():
        shutil.copy(file, target)
    return tmp_path / "v1"


def test_the_list_is_of_this_stand_in() -> None:
    text = executorch_names.NAMES.read_text(encoding="utf-8")
    versions = re.search(r"pytorch/executorch at\n(.*),\n", text)
    assert versions is not None
    assert text == executorch_names.page(versions[1].split(", "))


def test_what_the_backend_imports_is_in_the_list() -> None:
    known = {file.stem for file in executorch_names.files()}
    used = set()
    for file in BACKEND.rglob("*.kt"):
        used |= set(re.findall(r"import org\.pytorch\.executorch\.(\w+)", file.read_text(encoding="utf-8")))
    assert {"Module", "EValue", "Tensor", "DType"} <= used <= known


@pytest.mark.parametrize(
    ("old", "new", "file", "lost"),
    [
        ("LOAD_MODE_MMAP = 1", "LOAD_MODE_MMAP = 2", "Module.kt", "Module: const val LOAD_MODE_MMAP = 1"),
        ("numThreads: Int = 0", "numThreads: Int", "Module.kt", "Module: @JvmStatic @JvmOverloads fun load("),
        ("open fun getMethods", "internal fun getMethods", "Module.kt", "Module: open fun getMethods()"),
        ("FLOAT(6)", "FLOAT(7)", "DType.kt", "DType: FLOAT(6)"),
        ("FloatBuffer, shape", "FloatArray, shape", "Tensor.kt", "Tensor: @JvmStatic fun fromBlob("),
        ("fun toTensor", "fun asTensor", "EValue.kt", "EValue: fun toTensor(): Tensor"),
    ],
)
def test_what_a_library_lacks_is_named(checkout: Path, old: str, new: str, file: str, lost: str) -> None:
    assert list(executorch_names.lacking(checkout)) == []
    path = checkout / executorch_names.PUBLISHED / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    (found,) = executorch_names.lacking(checkout)
    assert found.startswith(lost)
