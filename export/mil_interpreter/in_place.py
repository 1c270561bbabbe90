"""Which updates of a state can be made in its own memory, so that a cache is not copied at each step."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass

from mobilemm.errors import MobileMMError
from mobilemm.export.mil_interpreter.ops import Handler
from mobilemm.export.mil_interpreter.program import Block, Operation, walk

STATE_OPERATIONS = ("read_state", "write_state")


@dataclass(frozen=True)
class InPlace:
    """Operations, by `id`: slice updates to make in their input, and writes of a state that need no copy."""

    updates: frozenset[int] = frozenset()
    writes: frozenset[int] = frozenset()


def states_updated_in_place(block: Block, known: Mapping[str, Handler]) -> InPlace:
    """Which slice updates of a function's block can be made in the state's own memory.

    An update can where its input lies in the memory of one state, its output is what is written to that state
    before it is read again, and no value that lies in the same memory is used behind the update.
    """
    operations = block.operations
    last: dict[str, float] = dict.fromkeys(block.outputs, math.inf)
    for index in range(len(operations) - 1, -1, -1):
        for name in names_used(operations[index]):
            last.setdefault(name, index)
    accesses: dict[str, list[int]] = {}
    left_alone: set[str] = set()  # states that blocks inside touch, or that some write gave other memory
    for index, operation in enumerate(operations):
        if operation.type in ("read_state", "slice_update") and len(operation.outputs) != 1:
            raise MobileMMError(f"{operation.location}: has {len(operation.outputs)} outputs, not one")
        if operation.type in STATE_OPERATIONS:
            accesses.setdefault(str(operation.operand("input")), []).append(index)
        for inner in (inner for nested in operation.blocks for inner in walk(nested)):
            if inner.type in STATE_OPERATIONS:
                left_alone.add(str(inner.operand("input")))
    state_of: dict[str, str] = {}  # the state in whose memory a value lies
    last_use: dict[str, float] = {}  # of all values in a state's memory
    updates: set[int] = set()
    writes: set[int] = set()

    def join(name: str, state: str) -> None:
        state_of[name] = state
        last_use[state] = max(last_use.get(state, -1), last.get(name, -1))

    for index, operation in enumerate(operations):
        if operation.type == "read_state":
            join(operation.outputs[0][0], str(operation.operand("input")))
        elif operation.type == "write_state":
            state, value = str(operation.operand("input")), operation.operand("data")
            if isinstance(value, str) and state_of.get(value) == state and state not in left_alone:
                writes.add(id(operation))
            else:
                left_alone.add(state)
        elif operation.type == "slice_update":
            owner, other = (
                state_of.get(value) if isinstance(value := operation.operand(argument), str) else None
                for argument in ("x", "update")
            )
            if owner is None or owner == other or owner in left_alone or last_use[owner] > index:
                continue
            output = operation.outputs[0][0]
            following = bisect.bisect(accesses[owner], index)
            access = operations[accesses[owner][following]] if following < len(accesses[owner]) else None
            if access is not None and access.type == "write_state" and access.operand("data") == output:
                updates.add(id(operation))
                join(output, owner)
        else:
            # Views share their input's memory, and what blocks give may be any value from outside.
            handler = known.get(operation.type)
            names = (
                names_used(operation) if operation.blocks or (handler is not None and handler.view) else ()
            )
            for name in names:
                for output, _ in operation.outputs:
                    if name in state_of:
                        join(output, state_of[name])
    return InPlace(frozenset(updates), frozenset(writes))


def names_used(operation: Operation) -> set[str]:
    """All names that an operation reads, in the blocks inside of it too."""
    names = {value for values in operation.arguments.values() for value in values if isinstance(value, str)}
    for block in operation.blocks:
        names.update(block.outputs)
        for inner in block.operations:
            names |= names_used(inner)
    return names
