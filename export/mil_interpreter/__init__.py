"""A reference interpreter of MIL, the language of Core ML's ML programs: runs an .mlpackage on PyTorch.

    from mobilemm.export import mil_interpreter

    model = mil_interpreter.load("decoder.mlpackage")
    state = model.make_state()
    outputs = model({"inputs_embeds": embeds, "position_ids": positions}, function="prefill", state=state)

It executes the file that ships: the saved program and its weights, compressed constants and states included.
It tells what the program computes, not how fast a phone does, nor how an accelerator orders its additions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobilemm.export.mil_interpreter.features import Feature
    from mobilemm.export.mil_interpreter.interpreter import Model, State, load

__all__ = ["Feature", "Model", "State", "load"]


def __getattr__(name: str) -> Any:
    """When first asked for, so that packages can be read (`package`, `program`) without importing torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "Feature":
        from mobilemm.export.mil_interpreter import features

        return features.Feature
    from mobilemm.export.mil_interpreter import interpreter

    return getattr(interpreter, name)
