"""GPTQ: each column's rounding error is made up for by the columns behind it, as seen on calibration data.

Our own rather than optimum's: that one needs a CUDA machine and its own packed kernels, and holds the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mobilemm.errors import MobileMMError
from mobilemm.export.quantization import QuantizedWeight, WeightScheme, block_length
from mobilemm.export.quantizers import check_finite, round_to_nearest

# Columns whose updates of all later columns are gathered into one matrix product.
PANEL = 128
DAMPING = 0.01


def gptq(weight: Tensor, hessian: Tensor, scheme: WeightScheme, *, name: str = "weight") -> QuantizedWeight:
    """Codes that keep the layer's output, given what its inputs were.

    Columns with large inputs come first, while there are still many behind them to make up for their errors.
    Scales and zero points are searched for beforehand, so blocks stay blocks of neighbours. In that search an
    error counts as much as the inputs of its column, which is half of what is won over plain rounding.

    Args:
        weight: floating point (rows, columns).
        hessian: float32 (columns, columns), XᵀX over the calibration's inputs X; left as it is.
        scheme: bits, block and symmetry.
        name: of the layer, for errors.

    Raises MobileMMError for NaN and infinite weights or inputs.
    Source: Frantar et al. 2022, "GPTQ", arXiv 2210.17323, algorithm 1; the order of columns as in its code.
    The same columns come out of Babai's nearest plane (Chen et al. 2025, arXiv 2507.18553), which needs the
    Hessian's own Cholesky factor, not its inverse's: less work, and better conditioned.
    """
    check_finite(weight, name)
    columns = weight.shape[1]
    block = block_length(scheme.block_size, columns)
    damped = _damped(hessian, name)
    order, factor = _order_and_shares(damped)
    rounded = round_to_nearest(weight, scheme, importance=damped.diagonal(), name=name)
    scales = rounded.scales.T.contiguous()
    # What divides by a scale of 0 is a block of zeros.
    divisors = torch.where(scales == 0, 1.0, scales)
    if rounded.zero_points is None:
        zero_points = torch.full_like(scales, 2 ** (scheme.bits - 1))
    else:
        zero_points = rounded.zero_points.T.to(torch.float32).contiguous()
    wanted = weight.T[order].float()  # a column of the weight is a row here, and lies in one piece
    aims = wanted.clone()
    codes = torch.zeros(scales.shape[0] * block, weight.shape[0], dtype=torch.uint8)
    top = 2**scheme.bits - 1
    groups = (order // block).tolist()
    threads = torch.get_num_threads()
    for start in range(0, columns, PANEL):
        end = min(start + PANEL, columns)
        errors = wanted[start:end]  # of columns that are done
        torch.set_num_threads(1)  # a column is so short that threads would wait longer than they compute
        for index, place in enumerate(range(start, end)):
            group, column = groups[place], aims[place]
            # What the panel's errors before it have left to make up for. Adding each error to all columns
            # behind it would come to the same, and write where this only reads.
            column.addmv_(errors[:index].T, factor[start:place, place])
            code = (column / divisors[group]).round_().add_(zero_points[group]).clamp_(0, top)
            codes[order[place]] = code
            errors[index] -= code.sub_(zero_points[group]).mul_(scales[group])
        torch.set_num_threads(threads)
        aims[end:].addmm_(factor[start:end, end:].T, errors)
    shape = (weight.shape[0], scales.shape[0], block)
    return QuantizedWeight.from_codes(
        codes.T.reshape(shape).contiguous(), rounded.scales, rounded.zero_points, scheme.bits, columns
    )


def _damped(hessian: Tensor, name: str) -> Tensor:
    """The Hessian with a little added to its diagonal."""
    if not torch.isfinite(hessian).all():
        raise MobileMMError(f"layer {name!r}: its inputs on the calibration data are NaN or infinite")
    damped = hessian.clone()
    mean = damped.diagonal().mean().item()
    # An input that is always zero says nothing of its column: with damping alone it is rounded to nearest.
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    return damped


def _order_and_shares(damped: Tensor) -> tuple[Tensor, Tensor]:
    """Columns by falling size of their inputs; and, in that order, by how much each column makes up for the
    error of one before it: a triangle above a diagonal of ones."""
    order = damped.diagonal().argsort(descending=True, stable=True)
    # Reversed in both directions a lower factor is an upper one.
    upper = torch.linalg.cholesky(damped[order][:, order].flip(0, 1)).flip(0, 1)
    return order, upper.div_(upper.diagonal().clone())
