"""GPTQ: each column's rounding error is made up for by the columns behind it, as seen on calibration data.

Our own rather than optimum's: that one needs a CUDA machine and its own packed kernels, and holds the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mobilemm.errors import MobileMMError
from mobilemm.export.quantization import QuantizedWeight, WeightScheme, block_length
from mobilemm.export.quantizers import check_finite, encode, find_parameters

# Columns whose updates of all later columns are gathered into one matrix product.
PANEL = 128
DAMPING = 0.01


def gptq(weight: Tensor, hessian: Tensor, scheme: WeightScheme, *, name: str = "weight") -> QuantizedWeight:
    """Codes that keep the layer's output, given what its inputs were.

    Args:
        weight: floating point (rows, columns).
        hessian: float32 (columns, columns), XᵀX over the calibration's inputs X; left as it is.
        scheme: bits, block and symmetry.
        name: of the layer, for errors.

    Raises MobileMMError for NaN and infinite weights or inputs.
    Source: Frantar et al. 2022, "GPTQ", arXiv 2210.17323, algorithm 1; scales by search, as round to nearest.
    """
    check_finite(weight, name)
    rows, columns = weight.shape
    block = block_length(scheme.block_size, columns)
    count = -(-columns // block)
    factor, importance = _inverse_factor(hessian, name)
    remaining = weight.float().T.contiguous()  # a column of the weight is a row here, and lies in one piece
    codes = torch.full((count * block, rows), 0, dtype=torch.uint8)
    scales, zero_points = torch.empty(count, rows), torch.empty(count, rows)
    for start in range(0, columns, PANEL):
        end = min(start + PANEL, columns)
        panel, errors = remaining[start:end], torch.empty(end - start, rows)
        for index in range(end - start):
            column = start + index
            group = column // block
            if column % block == 0:
                ahead = remaining[column : column + block].T.contiguous()
                scales[group], zero_points[group] = find_parameters(
                    ahead, scheme, importance=importance[column : column + block]
                )
            scale, zero_point = scales[group], zero_points[group]
            code = encode(panel[index, :, None], scale, zero_point, scheme.bits)[:, 0]
            codes[column] = code
            errors[index] = (panel[index] - (code - zero_point) * scale) / factor[column, column]
            panel[index + 1 :].addr_(factor[column, column + 1 : end], errors[index], alpha=-1)
        remaining[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return QuantizedWeight.from_codes(
        codes.T.reshape(rows, count, block).contiguous(),
        scales.T.contiguous(),
        None if scheme.symmetric else zero_points.T.to(torch.uint8).contiguous(),
        scheme.bits,
        columns,
    )


def _inverse_factor(hessian: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of the damped Hessian's inverse, and the Hessian's diagonal."""
    if not torch.isfinite(hessian).all():
        raise MobileMMError(f"layer {name!r}: its inputs on the calibration data are NaN or infinite")
    damped = hessian.clone()
    diagonal = damped.diagonal()
    mean = diagonal.mean().item()
    # An input that is always zero says nothing of its column: it is rounded to nearest.
    diagonal += DAMPING * mean if mean > 0 else 1.0
    importance = diagonal.clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True), importance
