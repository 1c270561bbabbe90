"""Runs an .mlpackage on PyTorch, on any system: what Core ML would compute, as far as its program says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mobilemm.errors import MobileMMError, one_line
from mobilemm.export.mil_interpreter.compiler import Compiler, Program, Run
from mobilemm.export.mil_interpreter.features import Feature, Signature, read_signature, result_types
from mobilemm.export.mil_interpreter.ops import MOST_ELEMENTS
from mobilemm.export.mil_interpreter.package import Package
from mobilemm.export.mil_interpreter.program import TensorType, read_functions
from mobilemm.export.mil_interpreter.values import TORCH, ConstantStore, Precision
from mobilemm.runtime.manifest_check import shown

Array = NDArray[Any]

KEPT_CONSTANTS = 2**30


def load(path: str | Path, precision: Precision = "declared", keep_bytes: int = KEPT_CONSTANTS) -> Model:
    """Loads an .mlpackage with an ML program, and checks it.

    Args:
        path: the package's folder.
        precision: "declared" rounds what each operation gives to its declared type, as storing it does; the
            arithmetic inside of an operation is that of fp32. "float32" rounds nothing to fp16: what the
            program means, without what fp16 costs.
        keep_bytes: how many bytes of decompressed constants to keep in fp32, and three times as many in
            fp16; what is left is decompressed at each use.

    Raises MobileMMError, one line, for a package that is damaged or that holds what is not known here: an
    operation (with function and output), a kind of input.
    """
    return Model(path, precision, keep_bytes)


class State:
    """The states of one conversation, shared by all functions of a model; zeros at first.

    As coremltools' MLState: `read_state(name)` and `write_state(name, value)`.
    """

    def __init__(self, types: Mapping[str, TensorType], tensors: dict[str, Tensor]) -> None:
        self._types, self.tensors = dict(types), tensors

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._types)

    def read_state(self, name: str) -> Array:
        """A copy of a state. Raises MobileMMError when there is none of that name."""
        return self._tensor(name).numpy().astype(_numpy(self._types[name].dtype))

    def write_state(self, name: str, value: Array) -> None:
        """Sets a state. Raises MobileMMError for another name or shape."""
        held = self._tensor(name)
        if value.shape != tuple(held.shape):
            raise MobileMMError(f"the state {name!r} has the shape {tuple(held.shape)}, not {value.shape}")
        stored = value.astype(_numpy(self._types[name].dtype))
        self.tensors[name] = torch.from_numpy(stored).to(held.dtype, copy=True)

    def copy(self) -> State:
        """Another state with the same contents."""
        return State(self._types, {name: tensor.clone() for name, tensor in self.tensors.items()})

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise MobileMMError(f"there is no state {name!r}; there are {', '.join(self.tensors) or 'none'}")
        return self.tensors[name]


class Model:
    """A loaded package; called, it runs one of its functions.

    Attributes:
        path: the package's folder.
        precision: as `load` was told.
        functions: the functions' names.
        default_function: the one that is run when none is named.
    """

    def __init__(self, path: str | Path, precision: Precision, keep_bytes: int) -> None:
        if precision not in ("declared", "float32"):
            raise ValueError(f"precision is {precision!r}; it can be 'declared' or 'float32'")
        self.path, self.precision = Path(path), precision
        package = Package(path)
        self._functions = read_functions(package)
        self.functions = tuple(self._functions)
        default = package.specification.description.defaultFunctionName or "main"
        self.default_function = default if default in self._functions else self.functions[0]
        self._store = ConstantStore(precision, keep_bytes)
        compiler = Compiler(self._store)
        self._programs: dict[str, tuple[Program, int]] = {}
        self._results: dict[str, dict[str, TensorType]] = {}
        self._signatures: dict[str, Signature] = {}
        self._states: dict[str, TensorType] = {}
        for name, function in self._functions.items():
            self._programs[name] = compiler.function(function)
            results = result_types(package, function)
            self._results[name] = results
            self._signatures[name] = read_signature(package, function, results)
            for state, kind in function.states.items():
                if self._states.setdefault(state, kind) != kind:
                    raise package.error(f"functions disagree on the state {shown(state)}")
        for state, kind in self._states.items():
            size = 1
            for length in kind.shape:
                size *= length or 0
            if None in kind.shape or size > MOST_ELEMENTS:
                raise package.error(f"the state {shown(state)} of {shown(str(kind.shape))} is too large")

    def inputs(self, function: str | None = None) -> tuple[Feature, ...]:
        """A function's inputs, states apart. Raises MobileMMError when there is no such function."""
        return self._signatures[self._name(function)].inputs

    def outputs(self, function: str | None = None) -> tuple[Feature, ...]:
        """A function's outputs. Raises MobileMMError when there is no such function."""
        return self._signatures[self._name(function)].outputs

    def states(self, function: str | None = None) -> tuple[Feature, ...]:
        """A function's states. Raises MobileMMError when there is no such function."""
        return self._signatures[self._name(function)].states

    def make_state(self) -> State:
        """States of zeros, for all functions."""
        tensors = {
            name: torch.zeros([size or 0 for size in kind.shape], dtype=TORCH[kind.dtype])
            for name, kind in self._states.items()
        }
        return State(self._states, tensors)

    def __call__(
        self,
        inputs: Mapping[str, Any],
        function: str | None = None,
        state: State | None = None,
        observe: Callable[[str, Tensor], None] | None = None,
    ) -> dict[str, Array]:
        """Runs a function.

        Args:
            inputs: arrays by name, in one of the shapes that the package allows; converted to the declared
                types. A picture is (1, channels, height, width) with values from 0 to 255.
            function: its name; left out, the default one.
            state: from `make_state`, changed by what the function writes; needed where the function has
                states. Whatever the function had written when it fails stays written.
            observe: called with the name and the value of each operation's output, as it arises.

        Returns the outputs by name, in their declared types; those of fp16 are float32 where `precision` is
        "float32".

        Raises MobileMMError for other inputs, and naming function and operation where one fails.
        """
        name = self._name(function)
        (program, slots), kept = self._programs[name], self._functions[name].states
        if kept and state is None:
            raise MobileMMError(f"{self.path}: function {name!r} needs a state: pass make_state()")
        states: dict[str, Tensor] = {} if state is None else state.tensors
        if missing := sorted(kept.keys() - states.keys()):
            raise MobileMMError(
                f"{self.path}: function {name!r}: the state passed lacks {', '.join(missing)}"
            )
        run = Run([None] * slots, states, observe)
        with torch.inference_mode():
            converted = self._convert_inputs(name, inputs)
            for slot, (key, kind) in zip(program.inputs, self._functions[name].inputs.items(), strict=True):
                run.values[slot] = converted[key].to(TORCH[kind.dtype])
            try:
                program.run(run)
                found = [
                    run.values[operand] if isinstance(operand, int) else self._store.tensor(operand)
                    for operand in program.outputs
                ]
            except MobileMMError:
                raise
            except Exception as error:  # PyTorch's are of many kinds
                raise MobileMMError(f"{run.location}: {one_line(error)}") from error
            names = self._functions[name].block.outputs
            return {
                key: self._array(value, self._results[name][key])
                for key, value in zip(names, found, strict=True)
            }

    def _name(self, function: str | None) -> str:
        name = self.default_function if function is None else function
        if name not in self._functions:
            raise MobileMMError(
                f"{self.path}: there is no function {name!r}; there are {', '.join(self.functions)}"
            )
        return name

    def _convert_inputs(self, function: str, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        features = {feature.name: feature for feature in self.inputs(function)}
        where = f"{self.path}: function {function!r}"
        if unknown := sorted(set(inputs) - set(features)):
            raise MobileMMError(
                f"{where} has no input {', '.join(unknown)}; it has {', '.join(features) or 'none'}"
            )
        converted = {}
        for name, feature in features.items():
            if name not in inputs:
                if not feature.optional:
                    raise MobileMMError(f"{where} needs the input {name!r}")
                array = np.full([size or 1 for size in feature.shape], feature.default)
            else:
                array = np.asarray(inputs[name])
            if not feature.allows(array.shape):
                raise MobileMMError(
                    f"{where}: input {name!r} has the shape {array.shape}; allowed is {feature.allowed}"
                )
            converted[name] = self._convert(array, feature, where)
        return converted

    def _convert(self, array: Array, feature: Feature, where: str) -> Tensor:
        wanted = np.dtype(feature.dtype)
        if array.dtype.kind not in "biuf" or (array.dtype.kind == "f" and wanted.kind in "iub"):
            raise MobileMMError(f"{where}: input {feature.name!r} is {array.dtype}; wanted is {wanted}")
        if wanted.kind in "iu" and array.size:
            limits = np.iinfo(wanted)
            if int(array.min()) < limits.min or int(array.max()) > limits.max:
                raise MobileMMError(f"{where}: input {feature.name!r} does not fit {wanted}")
        if wanted == np.float16 and self.precision == "float32":
            wanted = np.dtype(np.float32)
        with np.errstate(over="ignore"):  # too large for fp16: infinite, as Core ML has it
            stored = np.array(array, wanted, order="C")
        held = {"f": np.float32, "u": np.int64 if wanted.itemsize > 1 else np.uint8}.get(wanted.kind, wanted)
        return torch.from_numpy(stored.astype(held, copy=False))

    def _array(self, value: Any, kind: TensorType) -> Array:
        if not isinstance(value, Tensor):
            raise MobileMMError(f"{self.path}: an output is a list")
        dtype = _numpy("FLOAT32" if self.precision == "float32" and kind.dtype == "FLOAT16" else kind.dtype)
        with np.errstate(over="ignore"):
            return np.array(value.numpy(), dtype, order="C")


def _numpy(dtype: str) -> np.dtype[Any]:
    """NumPy's type of MIL's."""
    names = {"FLOAT16": "f2", "FLOAT32": "f4", "FLOAT64": "f8", "BOOL": "?"}
    return np.dtype(names.get(dtype, dtype.lower()))
