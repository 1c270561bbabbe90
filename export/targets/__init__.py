"""Targets: each turns one part into one file, and knows no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from numpy.typing import NDArray

from mobilemm.errors import MobileMMError

if TYPE_CHECKING:
    from torch import nn

    from mobilemm.export.parts import Part
    from mobilemm.export.quantization import QuantizationPlan
    from mobilemm.runtime.manifest import Manifest, ModelCard, Runtime, Tensor

TARGETS = ("onnx", "coreml", "executorch")


@dataclass(frozen=True)
class Exported:
    """One part as files of a target, by their paths in the folder that it was written to.

    `file` is what the runtime opens: one of `files`, or a folder of them. `notes` are for whoever exports.
    `module` is the part as it was written, where the target has quantized more than it was given.
    """

    file: str
    files: tuple[str, ...]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    cache: Literal["shared", "concatenated"] | None = None
    notes: tuple[str, ...] = ()
    module: nn.Module | None = None


class Target(Protocol):
    """One runtime's way of storing parts, and the runtime itself."""

    @property
    def name(self) -> Literal["onnx", "coreml", "executorch"]:
        """As `--target` and the manifest say it."""

    @property
    def runtime(self) -> Runtime:
        """The runtime, and the least version that runs what is written."""

    @property
    def fingerprint(self) -> str:
        """All options and versions that what is written depends on."""

    @property
    def default_context(self) -> int:
        """Positions that a conversation may have unless it is said otherwise, or the model knows fewer."""

    @property
    def memory_factor(self) -> float:
        """How many times a part's bytes are in memory at most while it is written and verified."""

    @property
    def joins(self) -> bool:
        """Whether all parts end in one file."""

    def stores(self, plan: QuantizationPlan) -> QuantizationPlan:
        """The plan as this target keeps to it. Raises MobileMMError naming the flag that it cannot follow."""

    def write(self, part: Part, module: nn.Module, folder: Path) -> Exported:
        """Writes one part into `folder`, where the parts that it shares tables with lie already.

        What lies there from an earlier, broken try is replaced.
        """

    def join(self, exported: Mapping[str, Exported], folder: Path, card: ModelCard) -> Mapping[str, Exported]:
        """All parts as one file, where the target joins them; those of each part alone are removed."""

    def run(self, part: Part, exported: Exported, folder: Path, inputs: Mapping[str, Any]) -> NDArray[Any]:
        """The first output of a written part on the target's runtime, a cache being empty.

        Of a decoder these are the logits of all positions.
        """

    def companions(self, manifest: Manifest) -> dict[str, str]:
        """Further text files that the runtime's own tools expect: path → content."""

    def label(self, manifest: Manifest, folder: Path) -> Manifest:
        """Writes into a bundle's parts what their format has room for of the model, its licence for example.

        Gives the manifest with the sizes that they have then.
        """


def find_target(name: str, **options: Any) -> Target:
    """The target of that name. Raises MobileMMError when there is none, or its packages are missing."""
    if name == "onnx":
        from mobilemm.export.targets.onnx import OnnxOptions, OnnxTarget

        return OnnxTarget(OnnxOptions(**options))
    if name == "coreml":
        from mobilemm.export.targets.coreml import CoreMLOptions, CoreMLTarget

        return CoreMLTarget(CoreMLOptions(**options))
    if name == "executorch":
        from mobilemm.export.targets.executorch import ExecutorchOptions, ExecutorchTarget

        return ExecutorchTarget(ExecutorchOptions(**options))
    raise MobileMMError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
