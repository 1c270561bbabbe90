"""Methods against naive rounding, on random matrices and on real ones of the default model."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from mobilemm.errors import MobileMMError
from mobilemm.export.gptq import gptq
from mobilemm.export.quantization import QuantizedWeight, WeightScheme
from mobilemm.export.quantizers import hqq, quantize, round_to_nearest

SCHEMES = [
    WeightScheme(bits, block, symmetric)
    for bits in (4, 6, 8)
    for block in (32, 64, 128, None)
    for symmetric in (True, False)
]


def random_matrix(rows: int = 48, columns: int = 160, seed: int = 0) -> Tensor:
    """Heavy tails, as trained weights have."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, columns, generator=generator) * torch.rand(rows, columns, generator=generator) ** 2
    )


@pytest.fixture(scope="module")
def real_matrix() -> Tensor:
    """The first down projection of SmolLM2-135M (576, 1536), out of its package."""
    gguf = pytest.importorskip("gguf")
    from mobilemm.models.checkpoints import default

    path = default._package_file(default.LANGUAGE_MODEL_PACKAGE)
    if path is None:
        pytest.skip("the default model's package is not installed")
    found = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_down.weight")
    return torch.from_numpy(gguf.dequantize(found.data, found.tensor_type)).float()


def squared_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    return (weight - quantized.dequantize()).square().sum().item()


def output_error(weight: Tensor, quantized: QuantizedWeight, inputs: Tensor) -> float:
    return (inputs @ (weight - quantized.dequantize()).T).square().sum().item()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("search", [True, False])
def test_no_weight_is_off_by_more_than_its_block_allows(scheme: WeightScheme, search: bool) -> None:
    weight = random_matrix()
    quantized = round_to_nearest(weight, scheme, search=search)
    error = (weight - quantized.dequantize()).abs()
    block = scheme.block_size or weight.shape[1]
    for start in range(0, weight.shape[1], block):
        chosen = weight[:, start : start + block]
        peak = chosen.abs().amax(1)
        if scheme.symmetric:
            step = peak / 2 ** (scheme.bits - 1)  # half a step; a whole one at the short end of the range
            limit = step * 1.001
        else:
            extent = chosen.amax(1).clamp(min=0) - chosen.amin(1).clamp(max=0)
            limit = extent / (2**scheme.bits - 1) * 1.001
        if not search:  # a search may clip a few weights by more
            assert (error[:, start : start + block].amax(1) <= limit).all()
        assert error[:, start : start + block].square().mean(1).le(limit**2).all()


def test_plain_symmetric_is_the_field_s_own_rule() -> None:
    # llama.cpp's Q4_0: d = signed absmax / -8, code = min(15, floor(w / d + 8.5)).
    weight = random_matrix(7, 64)
    quantized = round_to_nearest(weight, WeightScheme(4, 32, True), search=False)
    blocks = weight.reshape(7, 2, 32).numpy()
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]
    scale = peak / np.float32(-8)
    codes = np.minimum(15, np.floor(blocks / scale[..., None] + np.float32(8.5)))
    np.testing.assert_array_equal(quantized.scales.numpy(), scale)
    np.testing.assert_array_equal(quantized.codes().numpy(), codes.astype(np.uint8))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("method", [round_to_nearest, hqq])
def test_search_and_hqq_beat_naive_rounding(method, block, symmetric, real_matrix) -> None:
    scheme = WeightScheme(4, block, symmetric)
    for weight in (random_matrix(64, 512), real_matrix):
        naive = squared_error(weight, round_to_nearest(weight, scheme, search=False))
        assert squared_error(weight, method(weight, scheme)) < 0.97 * naive


def test_hqq_forgives_outliers_more_than_least_squares() -> None:
    weight = random_matrix(64, 512)
    scheme = WeightScheme(4, 128, False)

    def norm(quantized: QuantizedWeight) -> float:
        return (weight - quantized.dequantize()).abs().pow(0.7).sum().item()

    assert norm(hqq(weight, scheme)) < norm(round_to_nearest(weight, scheme, search=False))


@pytest.mark.parametrize("symmetric", [True, False])
def test_importance_moves_the_error_to_columns_that_do_not_matter(symmetric: bool) -> None:
    weight = random_matrix(32, 256)
    importance = torch.ones(256)
    importance[::8] = 100.0
    scheme = WeightScheme(4, 128, symmetric)
    weighted = round_to_nearest(weight, scheme, importance=importance).dequantize() - weight
    plain = round_to_nearest(weight, scheme).dequantize() - weight
    assert (weighted.square() * importance).sum() < (plain.square() * importance).sum()
    assert weighted.square().sum() > plain.square().sum()


# --- GPTQ ------------------------------------------------------------------------------------------------


def correlated_inputs(columns: int, count: int = 1024, seed: int = 1) -> Tensor:
    """Inputs of low rank with a few large channels, as hidden states are."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, columns // 8, generator=generator) @ torch.randn(
        columns // 8, columns, generator=generator
    )
    inputs = mixed + 0.3 * torch.randn(count, columns, generator=generator)
    inputs[:, ::37] *= 6
    return inputs


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [32, 64, 128, 256, None])
def test_gptq_beats_rounding_on_inputs_it_has_not_seen(block, symmetric, real_matrix) -> None:
    scheme = WeightScheme(4, block, symmetric, "gptq")
    weight = real_matrix[:96, :416]  # 3.25 blocks of 128
    inputs = correlated_inputs(416, 4096)
    seen, unseen = inputs[:2048], inputs[2048:]
    ours = gptq(weight, seen.T @ seen, scheme)
    rounded = round_to_nearest(weight, scheme)
    assert output_error(weight, ours, unseen) < 0.6 * output_error(weight, rounded, unseen)


def test_gptq_is_rounding_when_inputs_are_independent() -> None:
    weight = random_matrix(16, 256)
    scheme = WeightScheme(4, 64, False, "gptq")
    ours = gptq(weight, torch.eye(256) * 7, scheme)
    rounded = round_to_nearest(weight, scheme)
    torch.testing.assert_close(ours.dequantize(), rounded.dequantize())


def test_gptq_matches_the_paper_s_algorithm_step_by_step() -> None:
    # Algorithm of the OBQ kind with explicit inverses: quantize column i, then move its error to the columns
    # behind it along the inverse of the Hessian that is left, one column at a time, in float64.
    columns, scheme = 24, WeightScheme(4, None, True, "gptq")
    weight = random_matrix(5, columns).double()
    inputs = correlated_inputs(columns, 256).double()
    hessian = inputs.T @ inputs
    ours = gptq(weight.float(), hessian.float(), scheme)
    damped = hessian + torch.eye(columns, dtype=torch.float64) * 0.01 * hessian.diagonal().mean()
    order = sorted(range(columns), key=lambda i: -damped[i, i].item())
    damped, left = damped[order][:, order], weight[:, order]
    expected = torch.zeros_like(weight)
    scale = ours.scales.double()[:, 0]
    for i in range(columns):
        code = (left[:, i] / scale).round().add(8).clamp(0, 15)
        expected[:, order[i]] = (code - 8) * scale
        inverse = torch.linalg.inv(damped[i:, i:])
        error = (left[:, i] - expected[:, order[i]]) / inverse[0, 0]
        left[:, i:] -= error[:, None] * inverse[0]
    torch.testing.assert_close(ours.dequantize().double(), expected, atol=1e-6, rtol=1e-5)


def test_gptq_with_inputs_that_are_always_zero() -> None:
    weight = random_matrix(16, 128)
    scheme = WeightScheme(4, 32, False, "gptq")
    inputs = correlated_inputs(128)
    inputs[:, 5:40] = 0
    quantized = gptq(weight, inputs.T @ inputs, scheme)
    assert output_error(weight, quantized, inputs) < output_error(
        weight, round_to_nearest(weight, scheme), inputs
    )
    torch.testing.assert_close(
        gptq(weight, torch.zeros(128, 128), scheme).dequantize(),
        round_to_nearest(weight, scheme).dequantize(),
    )


def test_gptq_refuses_a_hessian_that_is_not_finite() -> None:
    hessian = torch.eye(64)
    hessian[3, 3] = float("inf")
    with pytest.raises(MobileMMError, match=r"layers\.1\.down.*inputs"):
        gptq(random_matrix(8, 64), hessian, WeightScheme(4, 32, True, "gptq"), name="layers.1.down")


# --- what comes along in checkpoints ---------------------------------------------------------------------


@pytest.mark.parametrize("method", [round_to_nearest, hqq])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zero_rows_and_constants(method, scheme: WeightScheme) -> None:
    weight = random_matrix(4, 160)
    weight[0] = 0
    weight[1, 32:64] = 0
    weight[2] = 0.37
    weight[3] = -2.5
    quantized = method(weight, scheme)
    got = quantized.dequantize()
    assert (got[0] == 0).all()
    if scheme.block_size == 32:
        assert (got[1, 32:64] == 0).all()
    torch.testing.assert_close(got[2:], weight[2:], rtol=1e-5, atol=0)
    assert torch.isfinite(quantized.scales).all()


@pytest.mark.parametrize("method", [round_to_nearest, hqq])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e20, 1e37])
@pytest.mark.parametrize("symmetric", [True, False])
def test_magnitude_does_not_matter(method, magnitude: float, symmetric: bool) -> None:
    weight = random_matrix().clamp(-3, 3)
    scheme = WeightScheme(4, 32, symmetric)
    expected = method(weight, scheme).dequantize()
    got = method(weight * magnitude, scheme).dequantize() / magnitude
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_what_is_not_finite_is_refused_by_name(bad: float, method: str) -> None:
    weight = random_matrix()
    weight[3, 5] = bad
    with pytest.raises(MobileMMError, match=r"layers\.7\.down.*1 of its 7680 weights"):
        quantize(weight, WeightScheme(4, 32, True, method), "layers.7.down")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_same_weights_same_bytes_whatever_the_chunks(method: str, monkeypatch) -> None:
    weight = random_matrix(37, 160)
    scheme = WeightScheme(4, 64, False, method)  # type: ignore[arg-type]
    first = quantize(weight, scheme)
    monkeypatch.setattr("mobilemm.export.quantizers.CHUNK_ELEMENTS", 5 * 160)
    second = quantize(weight, scheme)
    assert torch.equal(first.packed, second.packed)
    assert torch.equal(first.scales, second.scales)
    assert torch.equal(first.zero_points, second.zero_points)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_taken_as_they_are(dtype: torch.dtype) -> None:
    weight = random_matrix().to(dtype)
    scheme = WeightScheme(8, 32, True)
    assert torch.equal(quantize(weight, scheme).packed, quantize(weight.float(), scheme).packed)


def test_the_weight_is_left_alone() -> None:
    weight = random_matrix()
    before = weight.clone()
    quantize(weight, WeightScheme(4, 128, False))
    hqq(weight, WeightScheme(4, 128, False))
    gptq(weight, torch.eye(160), WeightScheme(4, 128, False))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_above_zero_where_kernels_take_no_others(bits: Literal[4, 8], search: bool) -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    free, bound = (
        round_to_nearest(weight, WeightScheme(bits, 32, positive=positive), search=search)
        for positive in (False, True)
    )
    assert (free.scales < 0).any()
    assert (bound.scales > 0).all()
    # Half a step at most from each weight, since without a search no weight is cut off.
    error = (bound.dequantize() - weight).abs().unflatten(1, (-1, 32))
    if not search:
        assert (error <= bound.scales[..., None] * 0.501).all()
    assert error.square().sum() < 1.6 * (free.dequantize() - weight).square().sum()
