"""What an export will take, before it is made: sizes by the plan, memory and time by rule of thumb."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mobilemm.export.decoder import Decoder
from mobilemm.export.layerwise import uses_data
from mobilemm.export.memory import available_memory
from mobilemm.export.model import Model, open_model
from mobilemm.export.options import ExportOptions
from mobilemm.export.parts import Part
from mobilemm.export.quantization import PartPlan
from mobilemm.export.quantized_parts import CALIBRATION_TOKENS
from mobilemm.export.targets import Target

# Measured on two cores of a server: weights rounded, and moved through calibration, a second; the rest of an
# export (loading, converting, verifying) costs this much a part.
ROUNDED_PER_SECOND, CALIBRATED_FLOPS = 12e6, 60e9
SECONDS_PER_PART = 12.0
# Interpreter, PyTorch and the exporter themselves.
BASE_MEMORY = 0.7e9


@dataclass(frozen=True)
class PartEstimate:
    """One part's parameters, its mean bits a parameter, and its bytes, tables of positions included."""

    name: str
    parameters: int
    bits: float
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """`peak_memory` in bytes, anonymous memory alone; `seconds` on two cores."""

    parts: tuple[PartEstimate, ...]
    peak_memory: int
    seconds: float


def estimate(source: str | None, target: Target, options: ExportOptions) -> Estimate:
    """Takes the model apart and reckons, without quantizing or converting anything."""
    return estimate_of(open_model(source, options), target, options)


def memory_warning(model: Model, target: Target, options: ExportOptions) -> str | None:
    """A line for a machine that has less memory free than an export will probably take."""
    needed, free = estimate_of(model, target, options).peak_memory, available_memory()
    if free is None or free >= needed:
        return None
    return (
        f"warning: --target {target.name} will take about {needed / 1e9:.1f} GB of memory here, and"
        f" {free / 1e9:.1f} GB are free; --max-seq-len makes the cache shorter"
    )


def estimate_of(model: Model, target: Target, options: ExportOptions) -> Estimate:
    """The same of a model that is open."""
    model = model.with_options(options, target.default_context)
    parts: list[PartEstimate] = []
    seconds = 0.0
    largest = 0.0
    for name, part in model.parts.items():
        plan = options.plan.part(name)
        parameters, size = _size(part, plan)
        if not parameters:
            continue
        bits = 8 * size / parameters
        size += sum(buffer.nbytes for buffer in part.module.buffers())  # rotary tables, mostly
        parts.append(PartEstimate(name, parameters, bits, size))
        seconds += SECONDS_PER_PART
        if plan.default.quantized:
            seconds += parameters / ROUNDED_PER_SECOND
        if isinstance(part.module, Decoder) and uses_data(plan.default):
            seconds += 4 * parameters * CALIBRATION_TOKENS / CALIBRATED_FLOPS
        largest = max(largest, target.memory_factor * size)
    return Estimate(tuple(parts), int(BASE_MEMORY + largest), seconds)


def _size(part: Part, plan: PartPlan) -> tuple[int, int]:
    """Parameters and bytes. A table that another part holds counts there."""
    parameters = size = 0
    for name, module in part.module.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or not isinstance(weight, nn.Parameter):
            continue
        if name in part.shared and plan.scheme(name).quantized:
            continue
        count = weight.numel() + (module.bias.numel() if getattr(module, "bias", None) is not None else 0)
        parameters += count
        scheme = plan.scheme(name)
        if scheme.quantized and isinstance(module, (nn.Linear, nn.Embedding)):
            size += scheme.nbytes(*weight.shape) + 4 * (count - weight.numel())
        else:
            size += count * 4
    return parameters, size
