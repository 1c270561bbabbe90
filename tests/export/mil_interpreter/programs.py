"""MIL programs made with coremltools' builder and saved as packages, each in a function of its own."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Notices on versions and on libraries that only macOS has.
logging.getLogger("coremltools").setLevel(logging.ERROR)

import coremltools as ct  # noqa: E402
from coremltools.converters.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import Function, Program, types  # noqa: E402

TYPES = {
    **{"float16": types.fp16, "float32": types.fp32, "int32": types.int32, "bool": types.bool},
    **{"int8": types.int8, "uint8": types.uint8, "int16": types.int16, "uint16": types.uint16},
}


def save_program(
    path: Path,
    build: Callable[..., Any],
    inputs: Mapping[str, np.ndarray[Any, Any]],
    states: Mapping[str, Sequence[int]] | None = None,
    target: Any = ct.target.iOS18,
    **options: Any,
) -> Path:
    """Saves the program that `build` makes of its inputs, in order, then its states; no pass changes it."""
    placeholders: dict[str, Any] = {
        name: mb.placeholder(value.shape, dtype=TYPES[value.dtype.name]) for name, value in inputs.items()
    }
    for name, shape in (states or {}).items():
        placeholders[name] = mb.state_tensor_placeholder(shape, dtype=types.fp16)
    program = Program()
    with Function(placeholders, opset_version=target) as function:
        outputs = build(*function.inputs.values())
        function.set_outputs(list(outputs) if isinstance(outputs, list | tuple) else [outputs])
        program.add_function("main", function)
    gc.freeze()  # coremltools collects garbage at each conversion, which takes long beside so many modules
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=target,
        pass_pipeline=ct.PassPipeline.EMPTY,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
        **options,
    )
    gc.unfreeze()
    model.save(str(path))
    return path


def convert_module(
    path: Path, module: Any, inputs: Sequence[Any], half: bool = False, target: Any = ct.target.iOS18
) -> Path:
    """Traces a PyTorch module and converts it with coremltools' own settings; inputs are named x0, x1, …"""
    import torch

    with torch.no_grad():
        traced = torch.jit.trace(module, tuple(inputs), check_trace=False)
    gc.freeze()
    model = ct.convert(
        traced,
        inputs=[ct.TensorType(name=f"x{i}", shape=tuple(tensor.shape)) for i, tensor in enumerate(inputs)],
        minimum_deployment_target=target,
        compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
        skip_model_load=True,
    )
    gc.unfreeze()
    model.save(str(path))
    return path
