"""Signal tokens' states as phones have them: an output projector that has seen some forgives the rest."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mobilemm.data.mixture import Mixture, encode
from mobilemm.export.calibration import read_calibration
from mobilemm.export.decoder import Decoder
from mobilemm.export.model import Model, open_model
from mobilemm.export.options import ExportOptions
from mobilemm.export.quantization import make_plan
from mobilemm.export.quantized_parts import QuantizedParts
from mobilemm.export.signal_states import ROWS, dequantized, signal_states
from mobilemm.training.drawing import Kept, write_tensors

QUANTIZED = "quantized-states.safetensors"


def with_quantized_states(
    kept: Kept,
    checkpoint: str | None,
    mixture: Mixture,
    share: float,
    run: Path,
    report: Callable[[str], None] = print,
) -> Kept:
    """`kept` with a share of its rows read behind the language model as `mobilemm export` has it.

    That is quantized by the default plan, and the states' mean error is taken away. Rows are those whose
    answer is one drawing. What is found is kept in the run's folder.
    """
    model = open_model(checkpoint, ExportOptions(plan=make_plan()))
    rows: dict[str, list[int]] = {}
    for source in mixture.sources:
        for row in source.rows:
            sample = source.source.sample(row, random.Random(0))
            ids = encode(mixture.processor, sample, mixture.max_length).input_ids
            places = [place for place, token in enumerate(ids) if token in model.split.signal_token_ids]
            if len(places) == len(model.split.signal_token_ids):
                rows[sample.name] = ids[: places[-1] + 1]
    names = sorted(random.Random(mixture.seed).sample(sorted(rows), round(share * len(rows))))
    if not names:
        return kept
    chosen = [rows[name] for name in names]
    digest = hashlib.sha256(json.dumps([model.digest, chosen]).encode()).hexdigest()
    path = run / f"{digest[:16]}-{QUANTIZED}"
    if not path.is_file():
        write_tensors({"states": _states(model, chosen, report).half()}, path)
    found = load_file(path)["states"].float()
    exact = torch.cat([kept[name]["signal_states"] for name in names])
    shift = (found - exact).mean(0)
    report(f"{len(names):,} rows behind the quantized language model")
    quantized = {
        name: {"signal_states": states[None] - shift} for name, states in zip(names, found, strict=True)
    }
    return {**kept, **quantized}


def _states(model: Model, rows: list[list[int]], report: Callable[[str], None]) -> Tensor:
    parts = QuantizedParts(model, ExportOptions(plan=make_plan()), read_calibration(), report=report)
    decoder, _ = parts.module("decoder")
    assert isinstance(decoder, Decoder)

    def progress(done: int) -> None:
        if done // ROWS % 16 == 0:
            report(f"the quantized language model's states: {done:,} of {len(rows):,} rows")

    return signal_states(model, dequantized(decoder), parts.table(), rows, progress)
