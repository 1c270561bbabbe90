"""Calls of a runtime, written down whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Calls:
    """What was called, in order; tensors lie in files of their own in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[dict[str, Any]] = []
        self._tensors = 0

    def keep(self, value: NDArray[Any]) -> dict[str, Any]:
        file = f"tensor-{self._tensors}"
        self._tensors += 1
        (self.folder / file).write_bytes(np.ascontiguousarray(value).tobytes())
        return {"dtype": value.dtype.name, "shape": list(value.shape), "file": file}
