"""ONNX on phones: onnxruntime's own checker of accelerators, and its .ort format for minimal builds."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from mobilemm.errors import MobileMMError, one_line


def usability(path: Path) -> str:
    """What onnxruntime's mobile usability checker says of NNAPI and Core ML, in one line.

    It judges operations and shapes, and loads the model twice: it gets a copy without weights.
    """
    from onnxruntime.tools.mobile_helpers import usability_checker

    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.Logger("usability", logging.INFO)
    logger.addHandler(Collector())
    try:
        with tempfile.TemporaryDirectory(prefix="mobilemm-") as folder:
            usability_checker.checker(_without_weights(path, Path(folder)), logger)
    except Exception as error:  # it walks graphs that it was not written for
        return f"not to be had ({one_line(error, 80)})"
    verdicts, name = [], ""
    for line in lines:
        if line.startswith("Checking ") and not line.startswith("Checking if "):
            name = line.removeprefix("Checking ").strip()
        for mark in ("as is:", "if modified to have fixed input shapes:"):
            if mark in line:
                form = "with fixed shapes" if "fixed" in mark else "as is"
                verdicts.append(f"{name} {form} {line.split(mark)[1].strip()}")
    return "; ".join(dict.fromkeys(verdicts)) or "no verdict"


def _without_weights(path: Path, folder: Path) -> Path:
    """A copy whose tensors of the external file have shapes and types alone."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    copy = folder / path.name
    onnx.save(model, str(copy))
    return copy


def write_ort(path: Path) -> Path:
    """`NAME.ort` beside `NAME.onnx`, weights inside, for builds of onnxruntime that cannot parse ONNX.

    Raises MobileMMError when the format cannot hold the part.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Only what holds on every processor: further levels choose layouts of this one.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path.with_suffix(".ort"))
    options.add_session_config_entry("session.save_model_format", "ORT")
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise MobileMMError(f"{path}: --ort-format does not take it ({one_line(error)})") from error
    return path.with_suffix(".ort")
