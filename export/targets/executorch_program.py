"""Programs of the edge dialect → one .pte with all of them: their constants, memory and bytes."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mobilemm.errors import MobileMMError
from mobilemm.export.targets.executorch_report import delegates
from mobilemm.runtime.manifest import ModelCard


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the collection of cycles: tracing makes millions of objects and hardly any garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def lean_lowering(*, keep_weights: bool = False) -> Iterator[None]:
    """Within it XNNPACK's delegates are made without a second copy of the weights.

    Unless they are kept, a linear layer's codes are given back as soon as its delegate holds them, packed.
    """
    from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend

    copy_for_preprocess, preprocess = (
        XnnpackBackend.copy_exported_program_for_preprocess,
        XnnpackBackend.preprocess,
    )

    def packed(program: Any, specs: list[Any]) -> Any:
        result = preprocess(program, specs)
        for tensor in program.state_dict.values():
            if tensor.dtype == torch.int8 and tensor.dim() == 2 and not keep_weights:
                tensor.untyped_storage().resize_(0)
        return result

    # The hook that ExecuTorch has for this, of a backend that changes the graph alone.
    XnnpackBackend.copy_exported_program_for_preprocess = staticmethod(lambda program, specs: copied(program))
    XnnpackBackend.preprocess = staticmethod(packed)
    try:
        yield
    finally:
        XnnpackBackend.copy_exported_program_for_preprocess = copy_for_preprocess
        XnnpackBackend.preprocess = staticmethod(preprocess)


def compile_config(kept: Sequence[Any] = ()) -> Any:
    """Of the edge dialect; operators that are `kept` are not decomposed."""
    from executorch.exir import EdgeCompileConfig

    # Operators of dimensions' order would come with one more pass over the program, and are not needed.
    return EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True, preserve_ops=list(kept))


def executable_of(
    programs: Mapping[str, Any], constants: Mapping[str, Any], etrecord: Path | None = None
) -> Any:
    """One program with these methods; keys and values get a memory of their own.

    Raises MobileMMError when they have not.
    """
    from executorch.exir import EdgeProgramManager, ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass

    cached = {name: mutable_bytes(program) for name, program in programs.items()}
    recorded = {name: copied(program) for name, program in programs.items()} if etrecord else {}
    manager = EdgeProgramManager(dict(programs), dict(constants), compile_config())
    executable = manager.to_executorch(
        ExecutorchBackendConfig(
            emit_stacktrace=False,
            emit_mutable_buffer_names=True,
            # Without shared mutable buffers a runtime that has one arena for all methods lets one method's
            # intermediate values overwrite another's keys and values.
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False, share_mutable_buffers=True),
        )
    )
    for plan in executable.executorch_program.execution_plan:
        if sum(plan.non_const_buffer_sizes[2:]) < cached.get(plan.name, 0):
            raise MobileMMError(
                f"method {plan.name!r}: its cache lies where other methods compute; this is a bug"
            )
    if etrecord is not None:
        from executorch.devtools import generate_etrecord

        edge = EdgeProgramManager(recorded, dict(constants), compile_config())
        generate_etrecord(etrecord, edge, executable)
    return executable


def mutable_bytes(program: Any) -> int:
    """Of the buffers that a program changes: keys and values."""
    buffers = set(program.graph_signature.buffers_to_mutate.values())
    return sum(program.state_dict[name].nbytes for name in buffers)


def forget_weights(program: Any) -> None:
    """Leaves the shapes alone of weights that delegates hold once more, as they were before lowering."""
    for delegate in delegates(program.graph_module):
        for tensors in (delegate.original_module.state_dict, delegate.original_module.constants):
            for name, tensor in tensors.items():
                shape = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                tensors[name] = (
                    nn.Parameter(shape, requires_grad=False) if isinstance(tensor, nn.Parameter) else shape
                )


def copied(program: Any) -> Any:
    """A copy over the same tensors: what makes it executable changes a program.

    Of a tensor that is a part of another the copy has its own, since XNNPACK writes out whole storages.
    """
    tensors = [*program.state_dict.values(), *program.constants.values()]
    return copy.deepcopy(program, {id(tensor): _whole(tensor) for tensor in tensors})


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.nbytes == tensor.untyped_storage().nbytes():
        return tensor
    copied = tensor.detach().clone()
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def write_program(executable: Any, path: Path) -> None:
    """As a .pte file."""
    with path.open("wb") as file:
        executable.write_to_file(file)


def constant_methods(card: ModelCard) -> dict[str, Any]:
    """What ExecuTorch's runners ask a program: their limits, and how an answer ends.

    The runner of 1.5 reads `get_eos_ids`; those of some vendors, and optimum-executorch, `get_eos_id`.
    Source: extension/llm/runner/constants.h of ExecuTorch.
    """
    constants: dict[str, Any] = {
        "get_max_seq_len": card.context_length,
        "get_max_context_len": card.context_length,
        "get_vocab_size": card.vocab_size,
        "get_eos_ids": list(card.eos_token_ids),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        "image_placeholder_id": card.image_token_id,
    }
    if card.bos_token_id is not None:
        constants["get_bos_id"] = card.bos_token_id
    if card.eos_token_ids:
        constants["get_eos_id"] = card.eos_token_ids[0]
    return constants
