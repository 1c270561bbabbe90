"""Weights → codes: round to nearest with a search of the scale, and half-quadratic quantization.

Both need no data and see one matrix at a time, a few rows at once: what they hold beside the matrix and its
codes stays small. GPTQ, which looks at what a layer is fed, is in `gptq.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mobilemm.errors import MobileMMError
from mobilemm.export.quantization import QuantizedWeight, WeightScheme, block_length

# Weights are taken in chunks whose few temporary copies stay in a core's cache.
CHUNK_ELEMENTS = 2**17

# Parts of a block's range that are tried: less than 1 clips the largest weights in favour of the many.
RANGES = {4: tuple(1.0 - step / 14 for step in range(7)), 6: (1.0, 0.96, 0.92), 8: (1.0,)}

# Of half-quadratic quantization: the norm's exponent, the penalty's start and growth, and the iterations.
HQQ_NORM, HQQ_PENALTY, HQQ_GROWTH, HQQ_ITERATIONS = 0.7, 10.0, 1.01, 20

Parameters = tuple[Tensor, Tensor]


def quantize(weight: Tensor, scheme: WeightScheme, name: str = "weight") -> QuantizedWeight:
    """A matrix without looking at data: by "hqq", by "kmeans", or round to nearest for every other method.

    Args:
        weight: floating point (rows, columns).
        scheme: of 4, 6 or 8 bits.
        name: of the layer, for errors.

    Raises MobileMMError for NaN and infinite weights.
    """
    if scheme.method == "hqq":
        return hqq(weight, scheme, name=name)
    if scheme.palette:
        from mobilemm.export.palettes import palettize

        return palettize(weight, scheme, name=name)
    # Least squared error, all columns alike, does a whole model more harm than good: it clips the few large
    # weights, which lie in the columns that matter. SmolLM2-135M at 4 bits, symmetric, block 128, mean KL to
    # fp32: 0.55 with the plain range, 0.65 with the search.
    return round_to_nearest(weight, scheme, search=False, name=name)


def round_to_nearest(
    weight: Tensor,
    scheme: WeightScheme,
    *,
    search: bool = True,
    importance: Tensor | None = None,
    name: str = "weight",
) -> QuantizedWeight:
    """Round to nearest, each block with the scale (and zero point) of least squared error.

    Args:
        weight: floating point (rows, columns).
        scheme: bits, block and symmetry.
        search: False takes the range of each block as it is; symmetric, the weight of largest magnitude
            gets code 0, as in onnxruntime and in llama.cpp's Q4_0.
        importance: float32 (columns,), a weight on the squared error, such as the inputs' mean square.
        name: of the layer, for errors.

    Raises MobileMMError for NaN and infinite weights.
    """
    weights = None if importance is None else _blocks(importance[None], scheme)[0]
    return _by_chunks(weight, scheme, name, lambda blocks: find_parameters(blocks, scheme, search, weights))


def hqq(weight: Tensor, scheme: WeightScheme, *, name: str = "weight") -> QuantizedWeight:
    """Half-quadratic quantization: the error's l_p norm, p < 1, is minimized, so that outliers are forgiven.

    The zero point (symmetric: the scale) is solved for in turns with the sparse part of the error. In the end
    zero points are whole numbers, because kernels take them so, and the scale is fitted once more.

    Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models".
    Raises MobileMMError for NaN and infinite weights.
    """
    return _by_chunks(weight, scheme, name, lambda blocks: _half_quadratic(blocks, scheme))


def find_parameters(
    blocks: Tensor, scheme: WeightScheme, search: bool = True, importance: Tensor | None = None
) -> Parameters:
    """Scales and zero points, float32 (…,), of blocks of weights, float32 (…, block size).

    With `search` several ranges are tried for each block; each gets the scale that fits its codes best, and
    the one of least squared error wins, weighted by `importance` (…, block size).
    """
    # In units of the largest weight no square overflows or vanishes.
    peaks = blocks.abs().amax(-1)
    blocks = blocks / torch.where(peaks > 0, peaks, 1.0)[..., None]
    candidates = (
        _symmetric(blocks, scheme, search) if scheme.symmetric else _asymmetric(blocks, scheme, search)
    )
    scale, zero_point = next(candidates)
    if not search:
        return scale * peaks, zero_point
    scale, error = _fit(blocks, scale, zero_point, scheme.bits, importance)
    for other_scale, other_zero_point in candidates:
        other_scale, other_error = _fit(blocks, other_scale, other_zero_point, scheme.bits, importance)
        better = other_error < error
        error = torch.where(better, other_error, error)
        scale = torch.where(better, other_scale, scale)
        zero_point = torch.where(better, other_zero_point, zero_point)
    return scale * peaks, zero_point


def encode(blocks: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
    """Codes, still float32, of blocks (…, block size) with these scales and zero points (…,)."""
    # A block of zeros has the scale 0.
    codes = blocks / torch.where(scales == 0, 1.0, scales)[..., None]
    return codes.round_().add_(zero_points[..., None]).clamp_(0, 2**bits - 1)


def check_finite(weight: Tensor, name: str) -> None:
    """Raises MobileMMError when the weight holds NaN or infinity."""
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise MobileMMError(
            f"layer {name!r}: {bad} of its {weight.numel()} weights are NaN or infinite; the checkpoint is"
            " damaged, or its training diverged"
        )


def _by_chunks(
    weight: Tensor, scheme: WeightScheme, name: str, parameters: Callable[[Tensor], Parameters]
) -> QuantizedWeight:
    check_finite(weight, name)
    rows, columns = weight.shape
    block = block_length(scheme.block_size, columns)
    count = -(-columns // block)
    codes = torch.empty(rows, count, block, dtype=torch.uint8)
    scales = torch.empty(rows, count)
    zero_points = None if scheme.symmetric else torch.empty(rows, count, dtype=torch.uint8)
    step = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        chosen = slice(start, start + step)
        blocks = _blocks(weight[chosen].float(), scheme)
        scales[chosen], zeros = parameters(blocks)
        codes[chosen] = encode(blocks, scales[chosen], zeros, scheme.bits)
        if zero_points is not None:
            zero_points[chosen] = zeros
    return QuantizedWeight.from_codes(codes, scales, zero_points, scheme.bits, columns)


def _blocks(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """(rows, columns) → (rows, blocks, block size), zeros behind the last column."""
    block = block_length(scheme.block_size, weight.shape[1])
    padding = -weight.shape[1] % block
    return torch.nn.functional.pad(weight, (0, padding)).unflatten(1, (-1, block))


def _symmetric(blocks: Tensor, scheme: WeightScheme, search: bool) -> Iterator[Parameters]:
    """Scales of either sign, where the scheme allows: codes reach one further below zero than above."""
    half = 2 ** (scheme.bits - 1)
    low, high = blocks.amin(-1), blocks.amax(-1)
    if scheme.positive:
        scale = torch.maximum(-low / half, high / (half - 1))
        for part in RANGES[scheme.bits] if search else (1.0,):
            yield scale * part, torch.full_like(scale, half)
        return
    scale = torch.where(high > -low, high, low) / -half
    zero_point = torch.full_like(scale, half)
    for part in RANGES[scheme.bits] if search else (1.0,):
        yield scale * part, zero_point
    for part in RANGES[scheme.bits]:
        yield -scale * part, zero_point


def _asymmetric(blocks: Tensor, scheme: WeightScheme, search: bool) -> Iterator[Parameters]:
    """Ranges that hold zero, with the nearest zero points to theirs and those beside them."""
    top = 2**scheme.bits - 1
    low, high = blocks.amin(-1).clamp_(max=0), blocks.amax(-1).clamp_(min=0)
    for part in RANGES[scheme.bits] if search else (1.0,):
        scale = (high - low) * (part / top)
        exact = -low * part / torch.where(scale == 0, 1.0, scale)
        for shift in (0, 1, -1) if search else (0,):
            yield scale, exact.round().add_(shift).clamp_(0, top)


def _fit(
    blocks: Tensor, scales: Tensor, zero_points: Tensor, bits: int, importance: Tensor | None
) -> Parameters:
    """The best scale for the codes that these give, and the squared error less a constant."""
    codes = encode(blocks, scales, zero_points, bits).sub_(zero_points[..., None])
    weighted = codes if importance is None else codes * importance
    product, square = (weighted * blocks).sum(-1), (weighted * codes).sum(-1)
    # Σ(w - s·q)² = Σw² - 2s·Σwq + s²·Σq² is least at s = Σwq / Σq².
    fitted = torch.where(square > 0, product / torch.where(square > 0, square, 1.0), scales)
    return fitted, -product * fitted


def _half_quadratic(blocks: Tensor, scheme: WeightScheme) -> Parameters:
    peaks = blocks.abs().amax(-1)
    blocks = blocks / torch.where(peaks > 0, peaks, 1.0)[..., None]
    candidates = _symmetric(blocks, scheme, False) if scheme.symmetric else _asymmetric(blocks, scheme, False)
    scale, zero_point = next(candidates)
    least = torch.full_like(scale, float("inf"))
    best, penalty = (scale, zero_point), HQQ_PENALTY
    for _ in range(HQQ_ITERATIONS):
        codes = encode(blocks, scale, zero_point, scheme.bits)
        steps = codes - zero_point[..., None]
        error = blocks - steps * scale[..., None]
        norm = error.abs().pow_(HQQ_NORM).sum(-1)
        better = norm < least
        if not better.any():
            break
        least = torch.where(better, norm, least)
        best = (torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1]))
        # The part of the error that is left to outliers: the proximal step of the l_p norm.
        size = error.abs()
        outliers = error.sign() * (size - size.clamp(min=1e-8) ** (HQQ_NORM - 1) / penalty).clamp_(min=0)
        if scheme.symmetric:
            square = (steps * steps).sum(-1)
            product = ((blocks - outliers) * steps).sum(-1)
            scale = torch.where(square > 0, product / torch.where(square > 0, square, 1.0), scale)
        else:
            divisor = torch.where(scale == 0, 1.0, scale)[..., None]
            zero_point = (codes - (blocks - outliers) / divisor).mean(-1)
        penalty *= HQQ_GROWTH
    scale, zero_point = best[0], best[1].round().clamp(0, 2**scheme.bits - 1)
    fitted, _ = _fit(blocks, scale, zero_point, scheme.bits, None)
    return fitted * peaks, zero_point
