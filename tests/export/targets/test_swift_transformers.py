"""A text model as swift-transformers asks for it, fed as its Swift code does, against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from mobilemm.cli import app
from mobilemm.errors import MobileMMError
from mobilemm.export.options import ExportOptions
from mobilemm.export.quantization import make_plan
from mobilemm.export.targets.coreml import CoreMLTarget
from mobilemm.export.targets.swift_transformers import TextModel, export_text_model
from mobilemm.runtime.self_check import snr_db
from tests.export.test_text_models import write_text_checkpoint

ct = pytest.importorskip("coremltools")


@pytest.fixture(scope="module")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tinytext", tied=True)


@pytest.fixture(scope="module")
def package(text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swift") / "out"
    options = ExportOptions(plan=make_plan("fp16"))
    parity = export_text_model(str(text_checkpoint), folder, options, CoreMLTarget())
    assert parity is not None
    assert parity.conversion_db > 35
    return folder / "tinytext.mlpackage"


def test_names_shapes_and_metadata_are_the_librarys(package: Path) -> None:
    model = ct.models.MLModel(str(package), skip_model_load=True)
    description = model.get_spec().description
    inputs = {one.name: one.type.multiArrayType for one in description.input}
    assert set(inputs) == {"inputIds", "causalMask"}
    (_, length) = inputs["inputIds"].shapeRange.sizeRanges
    assert (length.lowerBound, length.upperBound) == (1, 512)
    assert inputs["inputIds"].dataType == ct.proto.FeatureTypes_pb2.ArrayFeatureType.INT32
    assert inputs["causalMask"].dataType == ct.proto.FeatureTypes_pb2.ArrayFeatureType.FLOAT16
    *ones, width = inputs["causalMask"].shapeRange.sizeRanges
    assert all((one.lowerBound, one.upperBound) == (1, 1) for one in ones)
    assert width.upperBound == 513
    assert sorted(one.name for one in description.state) == ["keyCache", "valueCache"]
    assert list(description.state[0].type.stateType.arrayType.shape) == [2, 2, 512, 16]
    assert [one.name for one in description.output] == ["logits"]
    assert model.user_defined_metadata["co.huggingface.exporters.name"] == "tinytext"
    assert model.user_defined_metadata["co.huggingface.exporters.architecture"] == "LlamaForCausalLM"
    assert (package.parent / "tokenizer.json").is_file()
    assert (package.parent / "tokenizer_config.json").is_file()


@torch.no_grad()
def test_a_conversation_is_transformers_own(text_checkpoint: Path, package: Path) -> None:
    """A prompt at once, tokens one by one, and a second prompt behind them."""
    reference: Any = LlamaForCausalLM.from_pretrained(text_checkpoint)
    ids = torch.randint(3, 250, (1, 90), generator=torch.Generator().manual_seed(0))
    wanted = reference(ids).logits[0].numpy()
    model, given = TextModel(package), ids[0].tolist()
    pieces = [given[:37], *([token] for token in given[37:60]), given[60:]]
    found = np.concatenate([model(piece)[0] for piece in pieces])
    assert found.shape == wanted.shape
    assert snr_db(found, wanted) > 35
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() > 0.98


def test_the_command_writes_it_in_codes(text_checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["export", str(text_checkpoint), "--target", "coreml", "--coreml-names", "swift-transformers"]
    arguments += ["--q-llm", "int8", "--q-method", "rtn", "-o", str(tmp_path / "out")]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "cosine" in found.stdout
    weights = tmp_path / "out/tinytext.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    parameters = sum(one.numel() for one in LlamaForCausalLM.from_pretrained(text_checkpoint).parameters())
    tables = 2 * 512 * 8 * 2  # cosines and sines
    assert weights.stat().st_size < 1.25 * parameters + tables + 8192  # and the tied table is stored once
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "is there already" in str(again.output) + str(again.exception)

    forced = CliRunner().invoke(app, [*arguments, "--force"])
    assert forced.exit_code == 0, forced.output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("found", ["a letter.txt", "other.mlpackage"])
def test_force_leaves_folders_of_other_things_alone(
    text_checkpoint: Path, tmp_path: Path, found: str
) -> None:
    place = tmp_path / "mine"
    for name in ("tinytext.mlpackage", found):
        (place / name).mkdir(parents=True)
    with pytest.raises(MobileMMError, match="is left alone"):
        export_text_model(str(text_checkpoint), place, ExportOptions(), CoreMLTarget(), overwrite=True)
    assert sorted(path.name for path in place.iterdir()) == sorted(["tinytext.mlpackage", found])


def test_models_with_eyes_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(MobileMMError, match="takes pictures, and it knows text alone"):
        export_text_model(str(checkpoint), tmp_path / "out", ExportOptions(), CoreMLTarget())
    assert list(tmp_path.iterdir()) == []


def test_flags_that_do_not_go_with_it(text_checkpoint: Path) -> None:
    for flags, message in (
        (["--coreml-names", "swift"], "choose mobilemm or swift-transformers"),
        (["--coreml-names", "swift-transformers"], "needs a text model and --target coreml alone"),
    ):
        found = CliRunner().invoke(app, ["export", str(text_checkpoint), *flags])
        assert found.exit_code != 0
        assert message in " ".join((found.output + str(found.exception)).split())
