"""Predictions about Core ML programs, from the tiny bundle and from programs that have each oddity."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mobilemm.cli import app
from mobilemm.runtime import coreml_advice
from mobilemm.runtime.bundle import Bundle
from mobilemm.runtime.coreml_advice import predict
from tests.export.mil_interpreter.programs import ct, mb, save_program


def test_inspect_tells_what_is_predicted(coreml_bundle: Bundle) -> None:
    found = CliRunner().invoke(app, ["inspect", str(coreml_bundle.folder)])
    assert found.exit_code == 0, found.output
    lines = [line for line in found.output.splitlines() if line.startswith("predicted: ")]
    assert "predicted: embed: the Neural Engine is not known to take 1 gather" in lines
    assert any("embed: input input_ids has a range of lengths" in line for line in lines)
    assert any("state k_cache ends in 512 × 16, not in multiples of 32" in line for line in lines)
    assert not any("share" in line or "GB" in line for line in lines)


@pytest.fixture
def odd(coreml_bundle: Bundle, tmp_path: Path) -> Bundle:
    """The tiny bundle with another vision part."""
    folder = Path(shutil.copytree(coreml_bundle.folder, tmp_path / "copy"))
    shutil.rmtree(folder / "parts" / "vision.mlpackage")
    return Bundle(folder, coreml_bundle.manifest)


def texts(bundle: Bundle) -> list[str]:
    return [advice.text for advice in predict(bundle) if advice.part == "vision"]


def test_odd_shapes_and_types(odd: Bundle) -> None:
    def build(x):  # type: ignore[no-untyped-def]
        wide = mb.tile(x=x, reps=np.array([1, 6000], np.int32))
        return mb.cast(x=wide, dtype="fp32"), mb.relu(x=x)

    save_program(odd.folder / "parts" / "vision.mlpackage", build, {"x": np.zeros((1, 3), np.float16)})
    assert texts(odd) == [
        "1 of 3 results are float32, which the Neural Engine does not compute in",
        "cast gives a dimension of 18,000; the Neural Engine takes 16,384 at most",
        "tile gives a dimension of 18,000; the Neural Engine takes 16,384 at most",
        "the last dimension of 2 of 3 results is no multiple of 64 bytes: the Neural Engine pads it",
    ]


def test_functions_that_share_nothing_and_large_parts(
    odd: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor = ct.utils.MultiFunctionDescriptor()
    for name in ("one", "two"):
        weight = np.random.default_rng(len(name) + ord(name[0])).standard_normal((32, 32)).astype(np.float16)
        path = save_program(
            tmp_path / f"{name}.mlpackage",
            lambda x, memory, weight=weight: mb.matmul(
                x=mb.add(x=x, y=mb.read_state(input=memory)), y=weight
            ),
            {"x": np.zeros((32, 32), np.float16)},
            {"memory": (32, 32)},
        )
        descriptor.add_function(str(path), "main", name)
    descriptor.default_function_name = "one"
    ct.utils.save_multifunction(descriptor, str(odd.folder / "parts" / "vision.mlpackage"))
    monkeypatch.setattr(coreml_advice, "LARGE_STATES", 1000)
    monkeypatch.setattr(coreml_advice, "LARGE_PART", 1000)
    assert texts(odd) == [
        "its states take 0 MB of memory; a shorter context helps (--max-seq-len)",
        "functions one and two share 0% of their weights only",
        "has 0.0 GB, more than phones with less than 8 GB of memory can be expected to load: fewer bits help"
        " (--q-llm int4)",
    ]
