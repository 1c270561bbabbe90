"""What coremltools' PyTorch converter lacks, or does wrong without a word, for the graphs traced here."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any


@functools.cache
def complete_converter() -> None:
    """Adds to coremltools' table of PyTorch operators, and mends it, once."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.frontend.torch.torch_op_registry import (
        _TORCH_OPS_REGISTRY,
        register_torch_op,
    )

    for name in ("add", "sub", "rsub"):
        _TORCH_OPS_REGISTRY.set_func_by_name(_with_factor(name, _TORCH_OPS_REGISTRY.get_func(name)), name)

    def mobilemm_mt(context: Any, node: Any) -> None:
        (x,) = _get_inputs(context, node, expected=1)
        axes = [*range(x.rank - 2), x.rank - 1, x.rank - 2]
        context.add(mb.transpose(x=x, perm=axes, name=node.name))

    register_torch_op(mobilemm_mt, torch_alias=["mt"], override=True)


def _with_factor(kind: str, convert: Any) -> Any:
    """An addition or subtraction that knows `alpha`, the factor of its second operand."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs, promote_input_dtypes

    def converter(context: Any, node: Any) -> None:
        inputs = _get_inputs(context, node)
        if len(inputs) < 3 or inputs[2].val == 1:
            convert(context, node)
            return
        first, second = inputs[1::-1] if kind == "rsub" else inputs[:2]
        second, factor = promote_input_dtypes([second, inputs[2]])
        first, second = promote_input_dtypes([first, mb.mul(x=second, y=factor)])
        context.add((mb.add if kind == "add" else mb.sub)(x=first, y=second, name=node.name))

    return converter


@contextlib.contextmanager
def unchecked_passes() -> Iterator[None]:
    """coremltools checks the whole program behind each pass and words it for its log: twice the work."""
    from coremltools.converters.mil.mil import Program

    check, words = Program.validate, Program.__str__
    Program.validate = lambda self, check_essential_scope=False: None
    Program.__str__ = lambda self: "Program"
    try:
        yield
    finally:
        Program.validate, Program.__str__ = check, words


# What a decoder step, traced in float16, has need of among coremltools' ninety passes. Each of them walks the
# whole program and checks it anew, and those left out look for patterns of other models.
STEP_PASSES = (
    "common::update_output_dtypes",
    "common::const_elimination",
    "common::sanitize_input_output_names",
    "common::noop_elimination",
    "common::fuse_squeeze_expand_dims",
    "common::merge_consecutive_reshapes",
    "common::merge_consecutive_transposes",
    "common::reduce_transposes",
    "common::dedup_op_and_var_names",
    "common::add_fp16_cast",
    "common::update_output_dtypes",
    "common::const_elimination",
    "common::dead_code_elimination",
    "common::cast_optimization",
    "common::remove_redundant_ops",
    "common::canonicalize_inplace_pattern",
    "common::prefer_state_in_downstream",
    "common::const_elimination",
    "common::const_deduplication",
    "common::dead_code_elimination",
)

# What lies between an angle's computation and its sine.
_ON_THE_WAY_TO_SINES = frozenset(
    (
        "add",
        "cast",
        "concat",
        "exp",
        "expand_dims",
        "gather",
        "matmul",
        "mul",
        "real_div",
        "reshape",
        "slice_by_index",
        "squeeze",
        "tile",
        "transpose",
    )
)
_STATISTICS = frozenset(("pow", "reduce_mean", "rsqrt", "square"))


def keeps_float32(op: Any) -> bool:
    """Whether a MIL operation of a float32 graph must not be made float16.

    Angles grow with the position and lose their phase; squares in norms written out overflow beyond 256.
    """
    return op.op_type in _STATISTICS or _feeds_sine(op, 8)


def _feeds_sine(op: Any, depth: int) -> bool:
    if op.op_type in ("sin", "cos"):
        return True
    if depth == 0 or op.op_type not in _ON_THE_WAY_TO_SINES:
        return False
    return any(_feeds_sine(user, depth - 1) for output in op.outputs for user in output.child_ops)
