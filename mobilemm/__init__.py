"""mobilemm: on-device, lightweight multimodal LLMs: train, export, verify and run them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["MobileMMError", "__version__", "load"]

from mobilemm.errors import MobileMMError

if TYPE_CHECKING:
    from mobilemm.models.checkpoints import load


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, so `import mobilemm` leaves them alone.
    if name == "load":
        from mobilemm.models.checkpoints import load

        return load
    raise AttributeError(f"module 'mobilemm' has no attribute {name!r}")
