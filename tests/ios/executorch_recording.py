"""ExecuTorch programs, and their calls on ExecuTorch's own runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mobilemm.runtime.backends.executorch import ExecutorchBackend, ExecutorchDecoder, ExecutorchProgram
from mobilemm.runtime.bundle import Bundle, open_plain
from mobilemm.runtime.executorch_check import METHODS
from mobilemm.runtime.pte import TensorType, read_pte
from tests.ios.calls import Calls


def interfaces(bundle: Bundle) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Of each method that a part is: inputs and outputs as the program has them."""
    found = {}
    for name, part in bundle.manifest.parts.items():
        with open_plain(bundle.folder, part.file) as file:
            method = read_pte(file)[METHODS[name]]
        sides = {"inputs": method.inputs, "outputs": method.outputs}
        found[method.name] = {
            side: [
                {"dtype": one.dtype, "shape": list(one.shape)}
                for one in values
                if isinstance(one, TensorType)
            ]
            for side, values in sides.items()
        }
    return found


class RecordingProgram(ExecutorchProgram):
    """A program whose calls are kept."""

    def __init__(self, path: Path, threads: int, calls: Calls) -> None:
        super().__init__(path, threads)
        self.calls = calls

    def __call__(self, method: str, *inputs: NDArray[Any]) -> NDArray[Any]:
        output = super().__call__(method, *inputs)
        given = [self.calls.keep(value) for value in inputs]
        self.calls.made.append({"method": method, "inputs": given, "output": self.calls.keep(output)})
        return output


class RecordingExecutorchBackend(ExecutorchBackend):
    def __init__(self, bundle: Bundle, calls: Calls) -> None:
        super().__init__(bundle, 1)
        self.calls = calls

    def program(self, part: str) -> ExecutorchProgram:
        if part not in self._programs:
            self._programs[part] = RecordingProgram(self.bundle.part_path(part), 1, self.calls)
        return self._programs[part]

    def decoder(self) -> ExecutorchDecoder:
        decoder = super().decoder()
        decoder.program = RecordingProgram(self.bundle.part_path("decoder"), 1, self.calls)
        return decoder
