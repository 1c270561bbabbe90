"""What an ExecuTorch method's operators are handed to."""

from __future__ import annotations

import logging
from typing import Any

from mobilemm.errors import MobileMMError

BACKENDS = ("xnnpack", "portable")


def check_backend(name: str) -> None:
    """Raises MobileMMError when there is none of that name."""
    if name not in BACKENDS:
        raise MobileMMError(f"--backend {name!r}: choose {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")


def partitioners(backend: str, *, decoder: bool) -> list[Any]:
    """What chooses the operators that `backend` takes, for one method."""
    if backend == "portable":
        return []
    return [_xnnpack(decoder)]


def _xnnpack(decoder: bool) -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec

    # It would rather be called in another way, which takes minutes more.
    logging.getLogger(XnnpackPartitioner.__module__).setLevel(logging.ERROR)
    partitioner = XnnpackPartitioner()
    if decoder:
        # Of all passes over each delegate only that for linear layers: a decoder has nothing for the
        # others, and half of its lowering would be theirs.
        specs = [CompileSpec("dqlinear_partitioner", b"")]
        partitioner.delegation_spec = DelegationSpec(partitioner.delegation_spec.backend_id, specs)
    return partitioner
