"""Palettes: k-means in one dimension, against the optimum where it is known, and how they are held."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.layerwise import Stream, load_parameters, quantize_decoder
from mobilemm.export.palettes import k_means, palettize
from mobilemm.export.quantization import (
    PartPlan,
    QuantizedEmbedding,
    QuantizedLinear,
    WeightScheme,
    make_plan,
)
from mobilemm.export.quantizers import quantize
from mobilemm.export.targets import find_target

PAL4, PAL6 = WeightScheme(4, 16, method="kmeans"), WeightScheme(6, 16, method="kmeans")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mean_square(weight: Tensor, scheme: WeightScheme, importance: Tensor | None = None) -> float:
    made = quantize(weight, scheme) if importance is None else palettize(weight, scheme, importance)
    return float((made.dequantize() - weight).square().mean())


def test_normal_weights_reach_the_least_error_there_is() -> None:
    """Max 1960, "Quantizing for minimum distortion", table I; for 64 levels Panter and Dite's limit."""
    weight = normal(64, 4096)
    assert mean_square(weight, PAL4) == pytest.approx(0.009497, rel=0.01)
    assert mean_square(weight, PAL6) == pytest.approx(np.sqrt(3) * np.pi / 2 / 64**2, rel=0.05)


def test_palettes_beat_even_steps_of_as_many_bits() -> None:
    """Of 4.01 bits, tables included; blocks of 128 take 4.13 and lose more, of 32 take 4.5 and lose less."""
    weight = normal(144, 1536)
    error = mean_square(weight, PAL4)
    assert error < mean_square(weight, WeightScheme(4, 128)) < mean_square(weight, WeightScheme(4, None))
    assert mean_square(weight, WeightScheme(4, 32)) < error
    assert PAL4.nbytes(144, 1536) * 8 / weight.numel() == pytest.approx(4 + 16 * 16 / (16 * 1536))
    assert palettize(weight, PAL4).nbytes == PAL4.nbytes(144, 1536)


def best_error(values: Tensor, counts: Tensor, entries: int) -> float:
    """The least weighted squared error of so many clusters of sorted values, over all borders there are."""
    sums = [nn.functional.pad((counts.double() * values**power).cumsum(0), (1, 0)) for power in (0, 1, 2)]
    mass, moment, square = (total[None, :] - total[:, None] for total in sums)  # of start … stop
    cost = torch.where(mass > 0, square - moment**2 / mass, torch.inf)
    least = cost[0]
    for _ in range(entries - 1):
        least = (least[:, None] + cost).amin(0)
    return least[-1].item()


@pytest.mark.parametrize("tails", [0, 1, 2])
def test_clusters_are_near_the_optimum_of_all_borders(tails: int) -> None:
    """Of normal weights, and of some with outliers."""
    values = normal(1, 800, seed=tails) * (1 + tails * normal(1, 800, seed=9).square())
    counts = torch.rand(800, generator=torch.Generator().manual_seed(tails)) + 0.1
    table = k_means(values, 16, counts)[0]
    assert (table.diff() >= 0).all()
    error = ((values[0, :, None] - table).square().amin(-1) * counts).sum().item()
    order = values[0].argsort()
    optimum = best_error(values[0, order].double(), counts[order], 16)
    assert optimum * 0.999 <= error < 1.15 * optimum


def test_columns_with_more_energy_are_nearer() -> None:
    weight = normal(32, 96)
    weight[:, :8] += 3
    importance = torch.ones(96)
    importance[:8] = 100.0
    plain, weighted = palettize(weight, PAL4), palettize(weight, PAL4, importance)

    def error(made: Tensor) -> float:
        return float(((made - weight).square() * importance).sum())

    assert error(weighted.dequantize()) < 0.7 * error(plain.dequantize())


@pytest.mark.parametrize(
    ("rows", "columns", "tables"), [(48, 33, 3), (40, 20, 4), (7, 1, 1), (1, 5, 1), (19, 8, 19)]
)
@pytest.mark.parametrize("scheme", [PAL4, PAL6])
def test_every_weight_gets_the_nearest_of_its_table(
    rows: int, columns: int, tables: int, scheme: WeightScheme
) -> None:
    weight = normal(rows, columns)
    made = palettize(weight, scheme)
    assert made.palette is not None
    assert made.palette.shape == (tables, 2**scheme.bits)
    assert torch.equal(made.palette, made.palette.half().float())
    each = made.palette.repeat_interleave(rows // tables, 0)[:, None]
    distance = (weight[..., None] - each).abs()
    assert torch.equal((made.dequantize() - weight).abs(), distance.amin(-1))
    codes = made.codes()[:, 0, :columns].long()
    assert torch.equal(torch.take_along_dim(each, codes[..., None], -1)[..., 0], made.dequantize())


def test_few_different_weights_are_exact() -> None:
    weight = torch.tensor([-1.0, 0.0, 0.5])[torch.arange(64 * 10) % 3].view(64, 10)
    assert torch.equal(palettize(weight, PAL4).dequantize(), weight)
    assert torch.equal(palettize(torch.zeros(16, 8), PAL4).dequantize(), torch.zeros(16, 8))


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = normal(16, 8)
    weight[3, 4] = float("nan")
    with pytest.raises(MobileMMError, match="layer 'x': 1 of its 128 weights are NaN"):
        palettize(weight, PAL4, name="x")


def test_linear_layers_and_tables_compute_with_them() -> None:
    weight = normal(48, 33)
    made = palettize(weight, PAL4)
    x, ids = normal(2, 33, seed=1), torch.tensor([[0, 47], [16, 15]])
    linear = QuantizedLinear(made, torch.ones(48))
    torch.testing.assert_close(linear(x), x @ made.dequantize().T + 1)
    assert torch.equal(QuantizedEmbedding(made)(ids), made.dequantize()[ids])
    assert torch.equal(linear.quantized.dequantize(), made.dequantize())


def test_layers_are_weighted_by_what_they_are_fed(tiny) -> None:
    decoder, weights, calibration = tiny
    plan = PartPlan(PAL4, (("lm_head", PAL6),))
    quantize_decoder(decoder, weights, plan, calibration=calibration)
    layer = decoder.layers[0]
    fresh = type(decoder)(decoder.spec)
    load_parameters(fresh.layers[0], weights, "layers.0.")
    energies = Stream.start(fresh, calibration).hessians(fresh.layers[0])["qkv"].diagonal()
    expected = palettize(weights["layers.0.qkv.weight"], PAL4, energies)
    assert torch.equal(layer.qkv.palette, expected.palette)
    assert torch.equal(layer.qkv.packed, expected.packed)
    assert not torch.equal(layer.qkv.palette, palettize(weights["layers.0.qkv.weight"], PAL4).palette)
    assert decoder.lm_head.bits == 6


def test_without_data_they_are_plain(tiny) -> None:
    decoder, weights, _ = tiny
    quantize_decoder(decoder, weights, PartPlan(PAL4))
    assert torch.equal(decoder.layers[1].o.palette, palettize(weights["layers.1.o.weight"], PAL4).palette)


def test_words_make_the_plan() -> None:
    plan = make_plan("pal4", vision="pal6", keep=["*.down=pal6", "layers.0.*=int8"])
    assert plan.part("decoder").default == PAL4
    assert plan.part("decoder").scheme("layers.3.down") == PAL6
    assert plan.part("decoder").scheme("layers.0.qkv").method == "rtn"
    assert plan.part("embed").default == PAL4
    assert plan.part("vision") == PartPlan(PAL6)
    assert make_plan("int4", embed="pal6", block_size=32).part("embed").default.block_size == 32


@pytest.mark.parametrize("target", ["onnx", "executorch"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"llm": "pal4", "embed": "int8"}, "'decoder' in pal4 is not possible"),
        ({"vision": "pal6"}, "'vision' in pal6 is not possible"),
        ({"keep": ["*.down=pal6"]}, "'decoder' in pal6 is not possible"),
    ],
)
def test_other_targets_refuse_them(target: str, words: dict[str, object], message: str) -> None:
    pytest.importorskip({"onnx": "onnx"}.get(target, target))
    with pytest.raises(MobileMMError) as caught:
        find_target(target).stores(make_plan(**words))  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert f"--target {target}" in str(caught.value)
    assert "\n" not in str(caught.value)
