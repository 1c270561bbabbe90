"""What runs a bundle's parts: one `Backend` a target, the same for Python, Kotlin and Swift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from mobilemm.errors import MobileMMError

if TYPE_CHECKING:
    from mobilemm.runtime.bundle import Bundle

Array = NDArray[Any]


class Decoder(Protocol):
    """The language model with the keys and values of one conversation."""

    @property
    def length(self) -> int:
        """How many positions the cache holds."""

    def decode(
        self, inputs_embeds: Array, position_ids: Array | None = None, logits_positions: Array | None = None
    ) -> Array:
        """Appends to the cache and gives logits. When it raises, the cache is what it was before.

        Shapes: `inputs_embeds` (1, n, hidden); `position_ids` int64 (3, 1, n), only for models whose
        positions have three dimensions; `logits_positions` int64 (k), which of the n positions to give logits
        of, counted from the end where negative, left out the last → (1, k, vocabulary) in float32.

        Raises MobileMMError when the cache would grow longer than the model's context.
        """

    def truncate(self, length: int) -> None:
        """Forgets all positions from `length` on."""


class Backend(Protocol):
    """One bundle, its parts loaded when they are first used."""

    @property
    def runtime(self) -> str:
        """What runs it here, for people: a name and a version."""

    @property
    def prefills_in_pieces(self) -> bool:
        """Whether texts and pictures are fed one after the other, as the runtime's own runner does.

        With activations in int8, what a near-tie falls to depends on it.
        """

    def load(self, part: str) -> None:
        """Loads a part now. Raises MobileMMError when it cannot be loaded."""

    def release(self, part: str) -> None:
        """Gives a part's memory back; the next use loads it again."""

    def run(self, part: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs a part that keeps no state: its outputs by name. Raises MobileMMError when it cannot."""

    def decoder(self) -> Decoder:
        """A decoder with an empty cache. Several share the weights."""


def open_backend(bundle: Bundle, threads: int | None = None) -> Backend:
    """What runs this bundle on this computer; `threads` left out, as many as there are cores.

    Raises MobileMMError when its package is missing or too old.
    """
    target = bundle.manifest.target
    if target == "onnx":
        from mobilemm.runtime.backends.onnx import OnnxBackend

        return OnnxBackend(bundle, threads)
    if target == "coreml":
        from mobilemm.runtime.backends.coreml import CoreMLBackend

        return CoreMLBackend(bundle, threads)
    from mobilemm.runtime.backends.executorch import ExecutorchBackend

    return ExecutorchBackend(bundle, threads)


def refuse_overflow(total: int, context_length: int) -> None:
    """Raises MobileMMError when a cache of `total` positions would be longer than the model's context."""
    if total > context_length:
        raise MobileMMError(f"{total} positions are more than this model's context of {context_length}")
