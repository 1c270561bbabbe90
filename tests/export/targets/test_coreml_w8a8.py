"""A vision encoder in int8 throughout, as a Core ML package on the reference interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mobilemm.export.assemble import export_bundles
from mobilemm.export.options import ExportOptions
from mobilemm.export.parts import Part
from mobilemm.export.quantization import make_plan
from mobilemm.export.static_quantization import QuantizedConv2d, StaticallyQuantized
from mobilemm.export.targets import find_target
from mobilemm.export.targets.coreml import CoreMLTarget
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import open_bundle
from mobilemm.runtime.self_check import self_check, snr_db
from tests.export.targets.test_coreml_weights import stored, value_of
from tests.export.test_static_quantization import made, pictures

ct = pytest.importorskip("coremltools")


def zero_point(operation: Any) -> int:
    """In int8: coremltools makes uint8 without a zero point of what has -128, and leaves out 0."""
    from coremltools.converters.mil.mil import types

    codes = operation.outputs[0] if operation.op_type == "quantize" else operation.input
    found = 0 if operation.zero_point is None else int(operation.zero_point.val)
    return found - 128 if codes.dtype == types.uint8 else found


@torch.no_grad()
def test_codes_and_steps_are_the_plans_own(tmp_path: Path) -> None:
    module, x = made(pictures()), pictures()[:1]
    part = Part("vision", module, {"pixels": x}, ("y",))
    target = CoreMLTarget()
    exported = target.write(part, module, tmp_path)
    package = tmp_path / exported.file
    layers = {name: one for name, one in module.named_modules() if isinstance(one, StaticallyQuantized)}
    codes = stored(package)
    assert codes.keys() == {f"{name}_layer" for name in layers}
    for name, one in layers.items():
        operation, layer = codes[f"{name}_layer"], one.layer
        assert operation.data.val.dtype == np.int8
        wanted = layer.quantized.dequantize()
        found = value_of(operation)
        if isinstance(layer, QuantizedConv2d):
            assert found.shape == layer.kernel
        np.testing.assert_allclose(found.reshape(wanted.shape), wanted.numpy(), rtol=2**-10)
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = ct.models.MLModel(str(package), skip_model_load=True).get_spec()
    program = load(spec, spec.specificationVersion, str(package / "Data/com.apple.CoreML/weights"))
    for kind in ("quantize", "dequantize"):
        operations = program.functions["main"].find_ops(op_type=kind)
        steps = {(float(op.scale.val), zero_point(op)) for op in operations}
        assert steps == {(one.quantizer.step, one.quantizer.zero_point) for one in layers.values()}, kind
        assert len(operations) == len(layers)
    found = target.run(part, exported, tmp_path, {"pixels": x.numpy()})
    assert snr_db(found, module(x).numpy()) > 30


def test_an_export_is_verified_and_says_so(checkpoint: Path, tmp_path: Path) -> None:
    plan = make_plan("int4", method="rtn", block_size=32, vision="w8a8")
    places = [(find_target("coreml", prefill=16), tmp_path / "bundle")]
    (result,) = export_bundles(str(checkpoint), places, ExportOptions(plan=plan))
    bundle = open_bundle(result.bundle.folder)
    vision = bundle.manifest.parts["vision"]
    assert (vision.quantization.bits, vision.quantization.activations) == (8, "int8-static")
    assert bundle.manifest.parts["decoder"].quantization.activations == "float16"
    assert vision.parity is not None
    assert vision.parity.cosine > 0.98
    for check in self_check(bundle, open_backend(bundle)):
        assert check.passed, check.text
