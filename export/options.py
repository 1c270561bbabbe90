"""What an export makes of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mobilemm.export.quantization import QuantizationPlan


@dataclass(frozen=True)
class ExportOptions:
    """What is made of a model.

    Attributes:
        plan: how each part's weights are stored.
        context_length: longest conversation in tokens, pictures included; None: the model's, at most 8192.
        image_size: side of the pictures, for families that leave it open.
        calibration: JSON of conversations that methods with data look at; None for the set that ships.
        verify: compare each part with PyTorch, and stop when one is below its floor.
        name: of the model, in the manifest; None for its folder's.
        budget: bytes that the language model may take; the layers that suffer most get 8 bits. None: by plan.
        steps: of the generator; None: those it was distilled for.
        stepwise: the generator as one step and a decoder of latents, for progress and any number of steps.
        int8_cache: keys and values in int8, with steps found on the calibration set.
    """

    plan: QuantizationPlan = field(default_factory=QuantizationPlan)
    context_length: int | None = None
    image_size: int | None = None
    calibration: Path | None = None
    verify: bool = True
    name: str | None = None
    budget: int | None = None
    int8_cache: bool = False
    steps: int | None = None
    stepwise: bool = False
