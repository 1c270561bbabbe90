"""Palettes in a package are the plan's own, as coremltools reads the file; an export with them is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mobilemm.export.assemble import export_bundles
from mobilemm.export.options import ExportOptions
from mobilemm.export.palettes import palettize
from mobilemm.export.parts import Embed, Part
from mobilemm.export.quantization import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    WeightScheme,
    make_plan,
)
from mobilemm.export.targets import find_target
from mobilemm.export.targets.coreml import CoreMLOptions, CoreMLTarget
from mobilemm.export.targets.coreml_package import read_spec
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import open_bundle
from mobilemm.runtime.self_check import self_check

ct = pytest.importorskip("coremltools")

# Layer → bits, rows that share a table, columns. One is odd.
LAYERS: dict[str, tuple[Any, int | None, int]] = {
    "pal4": (4, 16, 96),
    "pal4_odd": (4, 32, 97),
    "pal6": (6, 16, 64),
    "pal6_one_table": (6, None, 80),
}
ROWS = 48


def weights() -> dict[str, QuantizedWeight]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: palettize(
            torch.randn(ROWS, columns, generator=generator), WeightScheme(bits, rows, method="kmeans")
        )
        for name, (bits, rows, columns) in LAYERS.items()
    }


class Layers(nn.Module):
    """Each layer over as many of the input's columns as it takes, one beside the other."""

    def __init__(self) -> None:
        super().__init__()
        for index, (name, weight) in enumerate(weights().items()):
            self.add_module(name, QuantizedLinear(weight, torch.linspace(-1, 1, ROWS) if index % 2 else None))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([child(x[..., : LAYERS[name][2]]) for name, child in self.named_children()], -1)


def looked_up(package: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Layer → the codes' type and the weights, of coremltools' own operations, by NumPy."""
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.converters.mil.mil import types

    spec = read_spec(package)
    program = load(spec, spec.specificationVersion, str(package / "Data/com.apple.CoreML/weights"))
    found = {}
    for operation in program.functions["main"].find_ops(op_type="constexpr_lut_to_dense"):
        codes, lut = operation.indices.val.astype(np.int64), operation.lut.val.astype(np.float32)
        assert lut.shape[1:-2] == (1,) * (codes.ndim - 1)
        tables = lut.reshape(len(lut), -1)
        codes = codes.reshape(len(tables), -1)
        values = np.take_along_axis(tables, codes, 1).reshape(operation.indices.val.shape)
        name = operation.outputs[0].name.split("_weight")[0]
        found[name] = (types.builtin_to_string(operation.indices.dtype), values)
    return found


@pytest.mark.parametrize("layout", ["gpu", "ane"])
def test_what_is_stored_is_what_was_found(layout: Any, tmp_path: Path) -> None:
    module = Layers().eval()
    x = torch.randn(1, 5, 97, generator=torch.Generator().manual_seed(1))
    part = Part("vision", module, {"x": x}, ("y",))
    target = CoreMLTarget(CoreMLOptions(layout=layout))
    exported = target.write(part, module, tmp_path)
    found = looked_up(tmp_path / exported.file)
    assert found.keys() == LAYERS.keys()
    for name, weight in weights().items():
        kind, values = found[name]
        assert kind == f"uint{weight.bits}"
        assert values.ndim == (2 if layout == "gpu" else 4)
        np.testing.assert_array_equal(values.reshape(weight.shape), weight.dequantize().numpy())
    with torch.no_grad():
        wanted = module(x).numpy()
    made = target.run(part, exported, tmp_path, {"x": x.numpy()})
    assert np.abs(made - wanted).max() < 4e-3 * np.abs(wanted).max()
    size = (tmp_path / exported.file / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    assert size < sum(weight.nbytes for weight in weights().values()) + 4096


def test_a_tables_rows_are_gathered_from_its_palettes(tmp_path: Path) -> None:
    weight = palettize(torch.randn(48, 64), WeightScheme(6, 16, method="kmeans"), name="table")
    embed = Embed(48, 64, image_token_id=48)
    embed.table = QuantizedEmbedding(weight)  # type: ignore[assignment]
    inputs = {"input_ids": torch.zeros(1, 5, dtype=torch.int64), "image_features": torch.zeros(2, 64)}
    part = Part("embed", embed, inputs, ("inputs_embeds",))
    target = CoreMLTarget()
    exported = target.write(part, embed.eval(), tmp_path)
    ((kind, values),) = looked_up(tmp_path / exported.file).values()
    assert kind == "uint6"
    np.testing.assert_array_equal(values, weight.dequantize().numpy())
    ids = np.array([[7, 47, 0, 16, 7]])
    made = target.run(
        part, exported, tmp_path, {"input_ids": ids, "image_features": np.zeros((0, 64), np.float32)}
    )
    np.testing.assert_array_equal(made[0], weight.dequantize().numpy()[ids[0]])


def test_a_bundle_of_palettes_is_verified_and_says_so(checkpoint: Path, tmp_path: Path) -> None:
    plan = make_plan("pal6", embed="pal6", vision="pal6", keep=["*.down=pal4"])
    places = [(find_target("coreml", prefill=16), tmp_path / "bundle")]
    (result,) = export_bundles(str(checkpoint), places, ExportOptions(plan=plan))
    bundle = open_bundle(result.bundle.folder)
    for name, part in bundle.manifest.parts.items():
        assert (part.quantization.method, part.quantization.bits) == ("kmeans", 6), name
        assert part.quantization.block_size == 16
        assert part.parity is not None
    assert bundle.manifest.parts["decoder"].quantization.exceptions == {"*.down": 4}
    for check in self_check(bundle, open_backend(bundle)):
        assert check.passed, check.text
