"""A checkpoint as a Core ML bundle, end to end, beside an ONNX one of the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mobilemm.errors import MobileMMError
from mobilemm.export.assemble import Result, export_bundles
from mobilemm.export.options import ExportOptions
from mobilemm.export.quantization import make_plan
from mobilemm.export.targets import find_target
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import open_bundle
from mobilemm.runtime.self_check import self_check
from tests.export.targets.test_coreml_weights import stored, value_of

ct = pytest.importorskip("coremltools")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def both(checkpoint: Path, told: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The tiny checkpoint for both targets, in one command."""
    options = ExportOptions(plan=make_plan("int4", method="rtn", block_size=32))
    folder = tmp_path_factory.mktemp("bundles")
    places = [(find_target(name), folder / name) for name in ("onnx", "coreml")]
    results = export_bundles(str(checkpoint), places, options, report=told.append)
    return {result.bundle.manifest.target: result for result in results}


def test_the_bundle_is_whole_and_says_what_it_computes(both: dict[str, Result]) -> None:
    bundle = open_bundle(both["coreml"].bundle.folder)
    manifest = bundle.manifest
    assert manifest.model.context_length == 512
    assert (manifest.runtime.name, manifest.runtime.min_version) == ("coreml", "18")
    shapes = {name: part.inputs[0].shape for name, part in manifest.parts.items()}
    assert shapes == {"decoder": [1, "length", 64], "embed": [1, "length"], "vision": [1, 3, 32, 32]}
    assert manifest.parts["vision"].inputs[0].dtype == "uint8"
    assert {part.quantization.activations for part in manifest.parts.values()} == {"float16"}
    for check in self_check(bundle, open_backend(bundle)):
        assert check.passed, check.text


def test_both_targets_carry_the_same_codes(both: dict[str, Result], told: list[str]) -> None:
    """Quantized once; what coremltools reads in one file is what onnx reads in the other."""
    assert told.count("decoder: quantized already") == 1
    graph = onnx.load(both["onnx"].bundle.folder / "parts/decoder.onnx").graph
    arrays = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    constants = stored(both["coreml"].bundle.folder / "parts/decoder.mlpackage", "decode")
    for name in ("layers.0.qkv", "layers.1.o", "layers.0.down", "lm_head"):
        packed, scales = arrays[f"module.{name}.packed"], arrays[f"module.{name}.scales"]
        codes = np.stack((packed & 15, packed >> 4), -1).reshape(len(packed), -1).astype(np.float32) - 8
        values = codes * np.repeat(scales.astype(np.float16).astype(np.float32), 32, 1)
        np.testing.assert_array_equal(value_of(constants[name.replace(".", "_")]), values)


def test_coremltools_loads_every_package_with_its_metadata(both: dict[str, Result]) -> None:
    folder = both["coreml"].bundle.folder
    for name, part in both["coreml"].bundle.manifest.parts.items():
        model = ct.models.MLModel(str(folder / part.file), skip_model_load=True)
        assert model.author.startswith("tiny")
        assert model.license == "apache-2.0"
        assert model.short_description
        assert model.user_defined_metadata["mobilemm.part"] == name
        description = model.get_spec().description
        assert model.get_spec().specificationVersion == ct.target.iOS18
        for owner in description.functions or [description]:
            for value in (*owner.input, *owner.output, *owner.state):
                assert value.shortDescription, value.name
    assert [function.name for function in description.functions] == []
    decoder = ct.models.MLModel(str(folder / "parts/decoder.mlpackage"), skip_model_load=True)
    functions = {each.name: each for each in decoder.get_spec().description.functions}
    assert set(functions) == {"prefill", "decode"}
    assert decoder.get_spec().description.defaultFunctionName == "decode"
    assert [state.name for state in functions["decode"].state] == ["k_cache", "v_cache"]
    assert list(functions["decode"].state[0].type.stateType.arrayType.shape) == [2, 2, 512, 16]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "npu"}, "--coreml-layout 'npu': choose from gpu, ane"),
        ({"minimum_deployment_target": "iOS17"}, "'iOS17': states need iOS 18; choose from iOS18, iOS26"),
        ({"prefill": 1}, "--prefill-length 1: choose 2 to 2048"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(MobileMMError, match=message):
        find_target("coreml", **options)


def test_what_core_ml_cannot_store_is_refused_before_anything_is_computed(
    checkpoint: Path, tmp_path: Path
) -> None:
    target, told = find_target("coreml"), []
    options = ExportOptions(plan=make_plan("int4", vision="int6"))
    with pytest.raises(MobileMMError, match="'vision' in int6 is not possible; choose pal6, int4 or int8"):
        list(export_bundles(str(checkpoint), [(target, tmp_path / "x")], options, report=told.append))
    assert told == []


def test_float32_becomes_float16() -> None:
    plan = find_target("coreml").stores(make_plan("fp32", vision="int8", keep=["layers.0.*=fp32"]))
    assert plan.part("decoder").default.bits == 16
    assert plan.part("decoder").exceptions[0][1].bits == 16
    assert (plan.part("vision").default.bits, plan.part("vision").activations) == (8, "float16")
