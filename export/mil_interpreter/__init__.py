"""A reference interpreter of MIL, the language of Core ML's ML programs: runs an .mlpackage on PyTorch.

    from mobilemm.export import mil_interpreter

    model = mil_interpreter.load("decoder.mlpackage")
    state = model.make_state()
    outputs = model({"inputs_embeds": embeds, "position_ids": positions}, function="prefill", state=state)

It executes the file that ships: the saved program and its weights, compressed constants and states included.
It tells what the program computes, not how fast a phone does, nor how an accelerator orders its additions.
"""

from mobilemm.export.mil_interpreter.features import Feature
from mobilemm.export.mil_interpreter.interpreter import Model, State, load

__all__ = ["Feature", "Model", "State", "load"]
