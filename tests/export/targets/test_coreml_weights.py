"""The codes in a package are the plan's own, as coremltools reads the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.parts import Embed, Part
from mobilemm.export.quantization import QuantizedEmbedding, QuantizedLinear, QuantizedWeight, WeightScheme
from mobilemm.export.quantizers import quantize
from mobilemm.export.targets.coreml import CoreMLOptions, CoreMLTarget
from mobilemm.export.targets.coreml_package import read_spec
from mobilemm.export.targets.coreml_weights import blocks_of

ct = pytest.importorskip("coremltools")

# Layer → bits, block size, symmetric, columns. Some do not fill their blocks, one is odd.
LAYERS: dict[str, tuple[Any, int | None, bool, int]] = {
    "int4": (4, 32, True, 96),
    "int4_unfilled": (4, 128, True, 576),
    "int4_asymmetric": (4, 64, False, 128),
    "int4_asymmetric_unfilled": (4, 64, False, 80),
    "int8_whole_rows": (8, None, True, 97),
    "int8_asymmetric": (8, 32, False, 64),
}
ROWS = 40


def weights() -> dict[str, QuantizedWeight]:
    generator = torch.Generator().manual_seed(3)
    made = {}
    for name, (bits, block, symmetric, columns) in LAYERS.items():
        matrix = torch.randn(ROWS, columns, generator=generator) + 0.3 * torch.rand(1, generator=generator)
        made[name] = quantize(matrix, WeightScheme(bits, block, symmetric, "rtn"), name)
    return made


class Layers(nn.Module):
    """Each layer over as many of the input's columns as it takes, one below the other."""

    def __init__(self) -> None:
        super().__init__()
        for index, (name, weight) in enumerate(weights().items()):
            bias = torch.linspace(-1, 1, ROWS) if index % 2 else None
            self.add_module(name, QuantizedLinear(weight, bias))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([child(x[..., : LAYERS[name][3]]) for name, child in self.named_children()], -1)


def expected(weight: QuantizedWeight) -> Tensor:
    """In float32, with scales as float16 has them."""
    scales = weight.scales.half().float()
    return QuantizedWeight(
        weight.packed, scales, weight.zero_points, weight.bits, weight.block_size, weight.shape
    ).dequantize()


def stored(package: Path, function: str = "main") -> dict[str, Any]:
    """coremltools' own operations over compressed constants, by the layer's name."""
    from coremltools.converters.mil.frontend.milproto.load import load

    spec = read_spec(package)
    program = load(spec, spec.specificationVersion, str(package / "Data/com.apple.CoreML/weights"))
    operations = program.functions[function].find_ops(op_type="constexpr_blockwise_shift_scale")
    return {op.outputs[0].name.split("_weight")[0]: op for op in operations}


def value_of(operation: Any) -> np.ndarray:
    """Scale times (code - offset) in float32, by NumPy."""
    codes = operation.data.val.astype(np.float32)
    repeat = codes.shape[1] // operation.scale.val.shape[1]
    scales = np.repeat(operation.scale.val.astype(np.float32), repeat, 1)
    offsets = 0.0
    if operation.offset is not None:
        offsets = np.repeat(operation.offset.val.astype(np.float32), repeat, 1)
    return (codes - offsets) * scales


@pytest.mark.parametrize("layout", ["gpu", "ane"])
def test_what_is_stored_is_what_was_quantized(layout: Any, tmp_path: Path) -> None:
    module = Layers().eval()
    x = torch.randn(1, 5, 576, generator=torch.Generator().manual_seed(1))
    part = Part("vision", module, {"x": x}, ("y",))
    target = CoreMLTarget(CoreMLOptions(layout=layout))
    exported = target.write(part, module, tmp_path)
    found = stored(tmp_path / exported.file)
    assert found.keys() == LAYERS.keys()
    for name, weight in weights().items():
        operation = found[name]
        kind = {4: "int4", 8: "int8"}[weight.bits]
        kind = kind if weight.zero_points is None else f"u{kind}"
        assert ct.converters.mil.mil.types.builtin_to_string(operation.data.dtype) == kind
        assert operation.outputs[0].rank == (2 if layout == "gpu" else 4)
        values = value_of(operation).reshape(weight.shape)
        np.testing.assert_array_equal(values, expected(weight).numpy(), err_msg=name)
    with torch.no_grad():
        wanted = module(x).numpy()
    made = target.run(part, exported, tmp_path, {"x": x.numpy()})
    assert np.abs(made - wanted).max() < 4e-3 * np.abs(wanted).max()


def test_a_tables_rows_are_gathered_from_its_codes(tmp_path: Path) -> None:
    weight = quantize(torch.randn(50, 64), WeightScheme(4, 32, True, "rtn"), "table")
    embed = Embed(50, 64, image_token_id=50, scale=8.0)
    embed.table = QuantizedEmbedding(weight)  # type: ignore[assignment]
    inputs = {"input_ids": torch.zeros(1, 5, dtype=torch.int64), "image_features": torch.zeros(2, 64)}
    part = Part("embed", embed, inputs, ("inputs_embeds",))
    target = CoreMLTarget()
    exported = target.write(part, embed.eval(), tmp_path)
    (operation,) = stored(tmp_path / exported.file).values()
    np.testing.assert_array_equal(value_of(operation), expected(weight).numpy())
    ids = np.array([[7, 50, 49, 50, 0, 7]])
    features = np.stack([np.full(64, 5.0, np.float32), np.full(64, -6.0, np.float32)])
    made = target.run(part, exported, tmp_path, {"input_ids": ids, "image_features": features})
    np.testing.assert_array_equal(made[0, [1, 3]], features)
    rows = 8 * expected(weight).numpy()[[7, 49, 0, 7]]
    np.testing.assert_allclose(made[0, [0, 2, 4, 5]], rows, rtol=2e-3)


def test_scales_are_repeated_where_blocks_do_not_fill_the_row() -> None:
    found = {name: blocks_of(weight) for name, weight in weights().items()}
    assert found["int4_unfilled"].scales.shape == (ROWS, 9)
    assert found["int4_asymmetric_unfilled"].scales.shape == (ROWS, 5)
    assert found["int8_whole_rows"].scales.shape == (ROWS, 1)


def test_widths_that_core_ml_has_not_are_refused() -> None:
    weight = quantize(torch.randn(8, 64), WeightScheme(6, 64, True, "rtn"), "x")
    with pytest.raises(MobileMMError, match="4 or 8 bits, not 6: choose int4 or int8"):
        blocks_of(weight)
