"""From a function's program to a list of bound calls: what can be decided once is decided here.

Names become slots of a list; constants are bound; a value's slot is emptied behind its last use; and a slice
update of a state is made in the state itself where nobody can tell.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from mobilemm.errors import MobileMMError, one_line
from mobilemm.export.mil_interpreter.in_place import InPlace, names_used, states_updated_in_place
from mobilemm.export.mil_interpreter.ops import Handler, handlers
from mobilemm.export.mil_interpreter.ops.indexing import slice_update_in_place
from mobilemm.export.mil_interpreter.program import (
    Block,
    Constant,
    Function,
    Operation,
    StateType,
    Type,
)
from mobilemm.export.mil_interpreter.values import ConstantStore, Expression, Operand, to_declared, to_python
from mobilemm.runtime.manifest_check import shown

MOST_LIVE_ELEMENTS = 2**28
"""Elements of all values that are alive at once, constants and states apart (1 GB)."""

MOST_LOOPED_OPERATIONS = 2_000_000
"""Operations that loops may run in one call, so that none goes on for ever."""

LARGE = 2**20

Scope: TypeAlias = "dict[str, Operand]"
Values: TypeAlias = "list[Any]"


@dataclass
class Run:
    """One call of a function while it runs."""

    values: Values
    states: dict[str, Tensor]
    observe: Callable[[str, Tensor], None] | None = None
    location: str = ""
    looped: int = 0
    large: dict[int, int] = field(default_factory=dict)

    def put(self, slot: int, value: Any) -> None:
        self.values[slot] = value
        if isinstance(value, Tensor) and value.numel() > LARGE:
            self.large[slot] = value.numel()
            if sum(self.large.values()) > MOST_LIVE_ELEMENTS:
                raise ValueError(f"more than {MOST_LIVE_ELEMENTS:,} elements are alive at once")

    def free(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.values[slot] = None
            if self.large:
                self.large.pop(slot, None)


@dataclass(frozen=True)
class Program:
    """A block, ready to run.

    Attributes:
        inputs: the slots that its inputs go to.
        steps: what is run in order.
        outputs: where its outputs are found then.
    """

    inputs: tuple[int, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Operand, ...]

    def run(self, run: Run) -> None:
        for step in self.steps:
            run.location = step.location
            step.run(run)
            run.free(step.frees)


class Step(ABC):
    """One operation; subclasses run it."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.frees: list[int] = []

    @abstractmethod
    def run(self, run: Run) -> None:
        """Takes what it needs from the run's values, and puts its results there."""


class Call(Step):
    """An operation that a handler computes."""

    def __init__(
        self,
        operation: Operation,
        function: Callable[..., Any],
        handler: Handler,
        store: ConstantStore,
        outputs: Sequence[tuple[int, Type]],
    ) -> None:
        super().__init__(operation.location)
        self.function, self.handler, self.store = function, handler, store
        self.outputs = tuple(outputs)
        self.names = [name for name, _ in operation.outputs]
        self.fixed: dict[str, Any] = {}
        self.slots: list[tuple[str, int]] = []
        self.fetched: list[tuple[str, Callable[[Values], Any]]] = []
        self.pending: list[tuple[str, Expression]] = []

    def bind(self, name: str, operands: Sequence[Operand]) -> None:
        """Binds an argument. Raises TypeError, ValueError, MobileMMError when it cannot be one."""
        kind = self.handler.parameters[name].kind
        if kind == "list[Tensor]":
            self.fetched.append((name, self._fetch_all(operands)))
            return
        if kind.startswith("list[") and len(operands) > 1:  # numbers one by one
            inner = kind[5:-1]
            self.fetched.append((name, lambda values: [_python(one, inner, values) for one in operands]))
            return
        if len(operands) != 1:
            raise TypeError(f"{len(operands)} values where one is expected")
        (operand,) = operands
        if kind in ("Tensor", "StoredTensor", "TensorList"):
            if isinstance(operand, Expression):
                self.pending.append((name, operand))
            else:
                self.slots.append((name, operand))
        elif isinstance(operand, Expression):
            self.fixed[name] = operand.python(kind)
        else:
            self.fetched.append((name, lambda values: _python(operand, kind, values)))

    def run(self, run: Run) -> None:
        if self.pending:
            self._bind_pending()
        values = run.values
        arguments = self.fixed.copy()
        for name, slot in self.slots:
            arguments[name] = values[slot]
        for name, fetch in self.fetched:
            arguments[name] = fetch(values)
        result = self.function(**arguments)
        results = result if isinstance(result, tuple) else (result,)
        if len(results) != len(self.outputs):
            raise ValueError(f"gives {len(results)} outputs, declared are {len(self.outputs)}")
        precision, exact = self.store.precision, self.handler.exact
        for (slot, declared), value in zip(self.outputs, results, strict=True):
            value = to_declared(value, declared, precision, exact)
            if self.handler.view:
                values[slot] = value
            else:
                run.put(slot, value)
        if run.observe is not None:
            for name, (slot, _) in zip(self.names, self.outputs, strict=True):
                if isinstance(values[slot], Tensor):
                    run.observe(name, values[slot])

    def _bind_pending(self) -> None:
        """Reads constants when the operation runs for the first time; those that are kept stay bound."""
        for name, expression in self.pending:
            stored = self.handler.parameters[name].kind == "StoredTensor"
            read = self.store.stored if stored else self.store.tensor
            tensor = read(expression)
            if self.store.keeps(expression, tensor):
                self.fixed[name] = tensor
            else:
                self.fetched.append((name, _once_more(read, expression)))
        self.pending = []

    def _fetch_all(self, operands: Sequence[Operand]) -> Callable[[Values], Any]:
        return lambda values: [
            self.store.tensor(operand) if isinstance(operand, Expression) else values[operand]
            for operand in operands
        ]


def _once_more(read: Callable[[Expression], Tensor], expression: Expression) -> Callable[[Values], Tensor]:
    return lambda _: read(expression)


class ReadState(Step):
    """The state's value of this moment."""

    def __init__(self, operation: Operation, state: str, slot: int) -> None:
        super().__init__(operation.location)
        self.state, self.slot = state, slot

    def run(self, run: Run) -> None:
        run.values[self.slot] = run.states[self.state]


class WriteState(Step):
    """A new value of a state; copied unless it lies in the state's own memory, or in nobody's else."""

    def __init__(
        self, operation: Operation, state: str, operand: Operand, store: ConstantStore, own: bool
    ) -> None:
        super().__init__(operation.location)
        self.state, self.operand, self.store, self.own = state, operand, store, own

    def run(self, run: Run) -> None:
        operand = self.operand
        value = self.store.tensor(operand) if isinstance(operand, Expression) else run.values[operand]
        if value.shape != run.states[self.state].shape or value.dtype != run.states[self.state].dtype:
            raise ValueError(f"{tuple(value.shape)} into a state of {tuple(run.states[self.state].shape)}")
        run.states[self.state] = value if self.own else value.clone()


class Condition(Step):
    """`cond`: one of two blocks."""

    def __init__(
        self,
        operation: Operation,
        predicate: Operand,
        branches: tuple[Program, Program],
        store: ConstantStore,
        outputs: Sequence[tuple[int, Type]],
    ) -> None:
        super().__init__(operation.location)
        self.predicate, self.branches, self.store, self.outputs = predicate, branches, store, outputs

    def run(self, run: Run) -> None:
        chosen = self.branches[0 if bool(_value(self.predicate, run, self.store)) else 1]
        chosen.run(run)
        run.location = self.location
        results = [_value(operand, run, self.store) for operand in chosen.outputs]
        for (slot, declared), value in zip(self.outputs, results, strict=True):
            run.put(slot, to_declared(value, declared, self.store.precision, True))


class Loop(Step):
    """`while_loop`: the second block, as long as the first gives true."""

    def __init__(
        self,
        operation: Operation,
        variables: Sequence[Operand],
        condition: Program,
        body: Program,
        store: ConstantStore,
        outputs: Sequence[tuple[int, Type]],
    ) -> None:
        super().__init__(operation.location)
        self.variables, self.condition, self.body = variables, condition, body
        self.store, self.outputs = store, outputs

    def run(self, run: Run) -> None:
        state = [_value(operand, run, self.store) for operand in self.variables]
        while True:
            self._enter(self.condition, state, run)
            (goes_on,) = [_value(operand, run, self.store) for operand in self.condition.outputs]
            if not bool(goes_on):
                break
            self._enter(self.body, state, run)
            state = [_value(operand, run, self.store) for operand in self.body.outputs]
            run.location = self.location
            run.looped += len(self.condition.steps) + len(self.body.steps) + 1
            if run.looped > MOST_LOOPED_OPERATIONS:
                raise ValueError(f"loops have run {MOST_LOOPED_OPERATIONS:,} operations")
        run.location = self.location
        for (slot, declared), value in zip(self.outputs, state, strict=True):
            run.put(slot, to_declared(value, declared, self.store.precision, True))

    def _enter(self, program: Program, state: Sequence[Any], run: Run) -> None:
        for slot, value in zip(program.inputs, state, strict=True):
            run.values[slot] = value
        program.run(run)


def _python(operand: Operand, kind: str, values: Values) -> Any:
    return (
        operand.python(kind) if isinstance(operand, Expression) else to_python(values[operand].numpy(), kind)
    )


def _value(operand: Operand, run: Run, store: ConstantStore) -> Any:
    return store.tensor(operand) if isinstance(operand, Expression) else run.values[operand]


class Compiler:
    """Compiles functions of one package.

    Raises MobileMMError for an operation, argument or constant that it does not know, naming function,
    operation and output.
    """

    def __init__(self, store: ConstantStore) -> None:
        self.store = store
        self.handlers = handlers()
        self.slots = 0

    def function(self, function: Function) -> tuple[Program, int]:
        """The function's program, and how many slots it needs. Its inputs are those that are no states."""
        self.slots = 0
        scope: Scope = {}
        self.states = set(function.states)
        inputs = [
            self._define(name, scope)
            for name, kind in function.block.inputs
            if not isinstance(kind, StateType)
        ]
        in_place = states_updated_in_place(function.block, self.handlers)
        return self._block(function.block, scope, tuple(inputs), in_place), self.slots

    def _define(self, name: str, scope: Scope) -> int:
        scope[name] = self.slots
        self.slots += 1
        return self.slots - 1

    def _block(self, block: Block, scope: Scope, inputs: tuple[int, ...], in_place: InPlace) -> Program:
        """`scope` holds the names around the block and gets those of the block."""
        steps: list[Step] = []
        own = set(inputs)
        uses: list[set[int]] = []
        for operation in block.operations:
            if operation.type == "const":
                scope[operation.outputs[0][0]] = self._constant(operation, scope)
                continue
            if operation.type.startswith("constexpr_"):
                for index, (name, _) in enumerate(operation.outputs):
                    scope[name] = self._decompression(operation, scope, index)
                continue
            step = self._step(operation, scope, in_place)
            used = {slot for name in names_used(operation) if isinstance(slot := scope.get(name), int)}
            defined = {slot for name, _ in operation.outputs if isinstance(slot := scope[name], int)}
            own |= defined
            steps.append(step)
            uses.append(used | defined)
        outputs = tuple(self._operand(name, scope, f"output {shown(name)}") for name in block.outputs)
        kept = {operand for operand in outputs if isinstance(operand, int)}
        for step, used in zip(reversed(steps), reversed(uses), strict=True):
            step.frees = sorted((used & own) - kept)
            kept |= used
        return Program(inputs, tuple(steps), outputs)

    def _operand(self, name: str | Constant, scope: Scope, location: str) -> Operand:
        if isinstance(name, Constant):
            return Expression(name)
        if name not in scope:
            raise MobileMMError(f"{location}: {shown(name)} is a state, not a value")
        return scope[name]

    def _constant(self, operation: Operation, scope: Scope) -> Expression:
        value = operation.operand("val")
        if not isinstance(value, Constant) or len(operation.outputs) != 1:
            raise MobileMMError(f"{operation.location}: is no constant")
        return Expression(value)

    def _handler(self, operation: Operation) -> Handler:
        handler = self.handlers.get(operation.type)
        if handler is None:
            raise MobileMMError(f"{operation.location}: this interpreter does not know the operation")
        for name in operation.arguments:
            if name not in handler.parameters:
                raise MobileMMError(f"{operation.location}: its argument {shown(name)} is not known")
        for name, parameter in handler.parameters.items():
            if parameter.required and name not in operation.arguments:
                raise MobileMMError(f"{operation.location}: its argument {name!r} is missing")
        return handler

    def _decompression(self, operation: Operation, scope: Scope, output: int) -> Expression:
        handler = self._handler(operation)
        arguments = {}
        for name in operation.arguments:
            operand = self._operand(operation.operand(name), scope, operation.location)
            if not isinstance(operand, Expression):
                raise MobileMMError(f"{operation.location}: its argument {name!r} is no constant")
            arguments[name] = operand
        return Expression(None, operation, handler, arguments, output)

    def _step(self, operation: Operation, scope: Scope, in_place: InPlace) -> Step:
        match operation.type:
            case "read_state" | "write_state":
                return self._state(operation, scope, in_place)
            case "cond":
                return self._condition(operation, scope)
            case "while_loop":
                return self._loop(operation, scope)
        handler = self._handler(operation)
        function = slice_update_in_place if id(operation) in in_place.updates else handler.function
        operands = {
            name: [self._operand(value, scope, operation.location) for value in values]
            for name, values in operation.arguments.items()
        }
        outputs = self._outputs(operation, scope)
        call = Call(operation, function, handler, self.store, outputs)
        for name, bound in operands.items():
            try:
                call.bind(name, bound)
            except (TypeError, ValueError) as error:
                raise MobileMMError(f"{operation.location}: argument {name!r}: {one_line(error)}") from None
        return call

    def _outputs(self, operation: Operation, scope: Scope) -> list[tuple[int, Type]]:
        for _, kind in operation.outputs:
            if isinstance(kind, StateType):
                raise MobileMMError(f"{operation.location}: an output is a state")
        return [(self._define(name, scope), kind) for name, kind in operation.outputs]

    def _state(self, operation: Operation, scope: Scope, in_place: InPlace) -> Step:
        state = operation.operand("input")
        if not isinstance(state, str) or state not in self.states:
            raise MobileMMError(f"{operation.location}: {shown(state)} is no state of the function")
        if operation.type == "write_state":
            value = self._operand(operation.operand("data"), scope, operation.location)
            return WriteState(operation, state, value, self.store, id(operation) in in_place.writes)
        if len(operation.outputs) != 1:  # in a block inside
            raise MobileMMError(f"{operation.location}: has {len(operation.outputs)} outputs, not one")
        return ReadState(operation, state, self._define(operation.outputs[0][0], scope))

    def _nested(self, operation: Operation, scope: Scope) -> list[Program]:
        if len(operation.blocks) != 2:
            raise MobileMMError(f"{operation.location}: has {len(operation.blocks)} blocks, not two")
        programs = []
        for block in operation.blocks:
            inputs = tuple(self._define(name, scope) for name, _ in block.inputs)
            programs.append(self._block(block, scope, inputs, InPlace()))
            for name, _ in (
                *block.inputs,
                *(output for inner in block.operations for output in inner.outputs),
            ):
                del scope[name]
        return programs

    def _condition(self, operation: Operation, scope: Scope) -> Step:
        predicate = self._operand(operation.operand("pred"), scope, operation.location)
        first, second = self._nested(operation, scope)
        outputs = self._outputs(operation, scope)
        if not len(first.outputs) == len(second.outputs) == len(outputs) or first.inputs or second.inputs:
            raise MobileMMError(f"{operation.location}: its blocks have other inputs and outputs than it has")
        return Condition(operation, predicate, (first, second), self.store, outputs)

    def _loop(self, operation: Operation, scope: Scope) -> Step:
        variables = [
            self._operand(value, scope, operation.location)
            for value in operation.arguments.get("loop_vars", [])
        ]
        condition, body = self._nested(operation, scope)
        outputs = self._outputs(operation, scope)
        counts = {len(variables), len(condition.inputs), len(body.inputs), len(body.outputs), len(outputs)}
        if len(counts) != 1 or len(condition.outputs) != 1:
            raise MobileMMError(f"{operation.location}: its blocks have other inputs and outputs than it has")
        return Loop(operation, variables, condition, body, self.store, outputs)
