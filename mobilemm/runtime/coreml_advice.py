"""What a Core ML bundle's programs let expect of Apple's processors: predicted, never measured. No torch.

Sources: Apple, "Deploying Transformers on the Apple Neural Engine" (2022: the last dimension's alignment to
64 bytes); coremltools' guide, "Flexible Input Shapes" and "Multifunction Models", and its issue 2631
(states); the community's list of unsupported layers (github.com/hollance/neural-engine). What the Neural
Engine does not take runs on the GPU or the CPU, and the way there and back takes time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mobilemm.runtime.bundle import Bundle

if TYPE_CHECKING:
    from mobilemm.export.mil_interpreter.features import Feature
    from mobilemm.export.mil_interpreter.program import Function, Operation

NOT_ON_THE_NEURAL_ENGINE = frozenset(
    {
        *("gather", "gather_along_axis", "gather_nd", "scatter", "scatter_along_axis", "scatter_nd"),
        *("non_zero", "range_1d", "one_hot", "cond", "while_loop", "make_list", "lstm", "gru", "rnn"),
    }
)
LARGEST_DIMENSION = 16_384
ALIGNMENT = 64  # bytes, of a tensor's last dimension
STATE_MULTIPLE = 32
LARGE_STATES = 256 * 2**20
LARGE_PART = 2**30
ELEMENT_BYTES = {"FLOAT16": 2, "FLOAT32": 4}


@dataclass(frozen=True)
class Advice:
    """One prediction about a part, and what would change it."""

    part: str
    text: str


def predict(bundle: Bundle) -> list[Advice]:
    """Predictions about the parts of a checked Core ML bundle; none for a part with nothing odd.

    Raises MobileMMError when a package cannot be read.
    """
    from mobilemm.export.mil_interpreter.features import read_signature, result_types
    from mobilemm.export.mil_interpreter.package import Package
    from mobilemm.export.mil_interpreter.program import read_functions

    found = []
    for name, part in bundle.manifest.parts.items():
        package = Package(bundle.part_path(name))
        functions = read_functions(package)
        features: list[Feature] = []
        for function in functions.values():
            features += read_signature(package, function, result_types(package, function)).inputs
        texts = [*_shapes(features), *_operations(functions), *_states(functions), *_sharing(functions)]
        if part.bytes > LARGE_PART:
            texts.append(
                f"has {part.bytes / 1e9:.1f} GB, more than phones with less than 8 GB of memory can be"
                " expected to load: fewer bits help (--q-llm int4)"
            )
        found += [Advice(name, text) for text in texts]
    return found


def _shapes(features: list[Feature]) -> Iterator[str]:
    flexible = sorted({f.name for f in features if f.ranges and any(low != high for low, high in f.ranges)})
    if flexible:
        names = ", ".join(flexible)
        yield f"input {names} has a range of lengths: the Neural Engine takes the default length only"


def _operations(functions: dict[str, Function]) -> Iterator[str]:
    """About the function with the most operations of each kind: the others are like it."""
    from mobilemm.export.mil_interpreter.program import TensorType

    refused: Counter[str] = Counter()
    large: dict[str, int] = {}
    outputs = float32 = uneven = 0
    for function in functions.values():
        kinds: Counter[str] = Counter()
        in_function = wide = odd = 0
        for operation in _computed(function):
            kinds[operation.type] += operation.type in NOT_ON_THE_NEURAL_ENGINE
            for _, kind in operation.outputs:
                if not isinstance(kind, TensorType) or kind.dtype not in ELEMENT_BYTES:
                    continue
                last = kind.shape[-1] if kind.shape else None
                in_function += 1
                wide += kind.dtype == "FLOAT32"
                odd += last not in (None, 1) and (last or 0) * ELEMENT_BYTES[kind.dtype] % ALIGNMENT != 0
                most = max((size or 0 for size in kind.shape), default=0)
                if most > LARGEST_DIMENSION:
                    large[operation.type] = max(large.get(operation.type, 0), most)
        refused |= kinds
        outputs, float32, uneven = max(outputs, in_function), max(float32, wide), max(uneven, odd)
    if refused := +refused:
        named = ", ".join(f"{count} {kind}" for kind, count in sorted(refused.items()))
        yield f"the Neural Engine is not known to take {named}"
    if float32:
        yield f"{float32} of {outputs} results are float32, which the Neural Engine does not compute in"
    for name, size in sorted(large.items()):
        yield f"{name} gives a dimension of {size:,}; the Neural Engine takes {LARGEST_DIMENSION:,} at most"
    if uneven * 10 > outputs:
        yield (
            f"the last dimension of {uneven} of {outputs} results is no multiple of {ALIGNMENT} bytes: the"
            " Neural Engine pads it"
        )


def _computed(function: Function) -> Iterator[Operation]:
    from mobilemm.export.mil_interpreter.program import walk

    for operation in walk(function.block):
        if operation.type != "const" and not operation.type.startswith("constexpr_"):
            yield operation


def _states(functions: dict[str, Function]) -> Iterator[str]:
    states = {name: kind for function in functions.values() for name, kind in function.states.items()}
    total = 0
    for name, kind in sorted(states.items()):
        shape = [size or 1 for size in kind.shape]
        total += math.prod(shape) * ELEMENT_BYTES.get(kind.dtype, 2)
        if any(length % STATE_MULTIPLE for length in shape[-2:]):
            ends = " × ".join(str(length) for length in shape[-2:])
            yield (
                f"state {name} ends in {ends}, not in multiples of {STATE_MULTIPLE}: such states have failed"
                " on the Neural Engine"
            )
    if total > LARGE_STATES:
        yield f"its states take {total / 1e6:,.0f} MB of memory; a shorter context helps (--max-seq-len)"


def _sharing(functions: dict[str, Function]) -> Iterator[str]:
    """Whether functions use the same weights of the file, as those of one model should."""
    from mobilemm.export.mil_interpreter.package import Blob
    from mobilemm.export.mil_interpreter.program import Constant, walk

    used: dict[str, dict[Blob, int]] = {}
    for name, function in functions.items():
        used[name] = {
            operand.stored: operand.stored.bytes
            for operation in walk(function.block)
            for operands in operation.arguments.values()
            for operand in operands
            if isinstance(operand, Constant) and isinstance(operand.stored, Blob)
        }
    names = sorted(used)
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            smaller = min(sum(used[first].values()), sum(used[second].values()))
            shared = sum(size for blob, size in used[first].items() if blob in used[second])
            if smaller and shared < 0.9 * smaller:
                yield f"functions {first} and {second} share {shared / smaller:.0%} of their weights only"
