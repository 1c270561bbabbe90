"""The structure of an ExecuTorch program (.pte), read within limits and without a runtime.

Every offset, index and size is held against what it points into before it is used: ExecuTorch itself trusts
most of them. Source: ExecuTorch's schema/program.fbs (file identifier ET12) and schema/extended_header.h.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

LARGEST_PROGRAM = 2**28  # bytes of the structure alone; weights lie in segments behind it
MOST_STEPS = 20_000_000
LARGEST_MEMORY = 2**36

DTYPES = {
    **{0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64"},
    **{11: "bool", 15: "bfloat16", 27: "uint16", 28: "uint32", 29: "uint64"},
}
SIZES = {"8": 1, "t8": 1, "bool": 1, "16": 2, "32": 4, "64": 8}


# What operators are given: tensors, integers, numbers, bools, lists of integers, or anything (.), by their
# first letters. The runtime trusts that it is so, and ends the process where it is not.
SIGNATURES = {
    "aten::sym_size.int": "tii",
    "aten::select_copy.int_out": "tiitt",
    "aten::slice_copy.Tensor_out": "ti..itt",
    "aten::unsqueeze_copy.out": "titt",
    "aten::embedding.out": "ttibbtt",
    "aten::expand_copy.out": "tlbtt",
    "aten::permute_copy.out": "tltt",
    "aten::_local_scalar_dense": "t.",
    "executorch_prim::et_view.default": "tlt",
    "llama::update_cache.out": "ttitt",
    "llama::custom_sdpa.out": "ttti.nbntt",
    "quantized_decomposed::embedding_4bit.dtype_out": "tt.iititt",
    "quantized_decomposed::embedding_byte.dtype_out": "tt.iititt",
}


class PteError(ValueError):
    """What is wrong with the file, for a message that names it."""


@dataclass(frozen=True)
class TensorType:
    """An input or output: its type, and its sizes, of which those that may be smaller are upper bounds."""

    dtype: str
    shape: tuple[int, ...]
    dynamic: bool


@dataclass(frozen=True)
class IntegerList:
    """A list of integers, by the indices that they have among a method's values."""

    indices: tuple[int, ...]


Value = TensorType | IntegerList | int | float | bool | str | None


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        inputs, outputs: tensors, or numbers; the outputs of a method without instructions are constants.
        instructions: how many.
        operators: "aten::embedding.out", each once.
        backends: the delegates' ids.
        planned: bytes of each memory that it needs.
    """

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    instructions: int
    operators: tuple[str, ...]
    backends: tuple[str, ...]
    planned: tuple[int, ...]


def read_pte(file: BufferedReader) -> dict[str, Method]:
    """The methods of a program by name. Raises PteError."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(40)
    if len(head) < 40 or head[4:8] != b"ET12":
        raise PteError("is no ExecuTorch program of format ET12")
    program_size, base = size, size
    if head[8:12] == b"eh00":
        length, program_size, base = struct.unpack_from("<IQQ", head, 12)
        if length < 24:
            raise PteError("its header is damaged")
        data_size = struct.unpack_from("<Q", head, 32)[0] if length >= 32 else size - min(base, size)
        if not 0 < program_size <= size or base + data_size > size or (base and base < program_size):
            raise PteError("is cut off, or its header is damaged")
    if program_size > LARGEST_PROGRAM:
        raise PteError(f"its structure is larger than {LARGEST_PROGRAM // 2**20} MB")
    file.seek(0)
    reader = _Reader(file.read(program_size))
    try:
        return _program(reader, base or size, size)
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise PteError(f"its structure is damaged ({error})") from None


@dataclass(frozen=True)
class _Table:
    """A table of a FlatBuffer; fields by their number in the schema."""

    reader: _Reader
    at: int

    def _field(self, number: int) -> int | None:
        vtable = self.at - self.reader.number("<i", self.at)
        length = self.reader.number("<H", vtable)
        if 6 + 2 * number > length:
            return None
        offset = self.reader.number("<H", vtable + 4 + 2 * number)
        if offset >= self.reader.number("<H", vtable + 2):
            raise PteError("its structure is damaged (a field behind its table)")
        return self.at + offset if offset else None

    def number(self, number: int, form: str, default: int = 0) -> Any:
        at = self._field(number)
        return default if at is None else self.reader.number(form, at)

    def table(self, number: int) -> _Table | None:
        at = self._field(number)
        return None if at is None else _Table(self.reader, self.reader.follow(at))

    def text(self, number: int) -> str:
        at = self._field(number)
        if at is None:
            return ""
        start, count = self.reader.vector(at, 1)
        return self.reader.data[start : start + count].decode()

    def numbers(self, number: int, form: str) -> tuple[Any, ...]:
        at = self._field(number)
        if at is None:
            return ()
        start, count = self.reader.vector(at, struct.calcsize(form))
        return struct.unpack_from(f"<{count}{form[-1]}", self.reader.data, start)

    def tables(self, number: int) -> Iterator[_Table]:
        at = self._field(number)
        if at is not None:
            start, count = self.reader.vector(at, 4)
            for place in range(start, start + 4 * count, 4):
                yield _Table(self.reader, self.reader.follow(place))


class _Reader:
    """The bytes, and how much may yet be read of them: shared lists could make a structure endless."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.steps = 0

    def number(self, form: str, at: int) -> Any:
        self.step(1)
        if at < 0:  # which unpack_from would count from the end
            raise PteError("its structure is damaged (an offset before the file)")
        return struct.unpack_from(form, self.data, at)[0]

    def follow(self, at: int) -> int:
        target = at + self.number("<I", at)
        if target >= len(self.data):
            raise PteError("its structure is damaged (an offset behind the file)")
        return target

    def vector(self, at: int, width: int) -> tuple[int, int]:
        start = self.follow(at)
        count = self.number("<I", start)
        if start + 4 + count * width > len(self.data):
            raise PteError("its structure is damaged (a list longer than the file)")
        self.step(count)
        return start + 4, count

    def step(self, count: int) -> None:
        self.steps += count
        if self.steps > MOST_STEPS:
            raise PteError("its structure is larger than any program's")


def _program(reader: _Reader, base: int, size: int) -> dict[str, Method]:
    program = _Table(reader, reader.follow(0))
    segments = [(one.number(0, "<Q"), one.number(1, "<Q")) for one in program.tables(4)]
    for offset, length in segments:
        if base + offset + length > size:
            raise PteError("is cut off: weights lie behind its end")
    keys = [(one.text(0), one.number(1, "<I")) for one in program.tables(7)]
    if len({key for key, _ in keys}) < len(keys):
        raise PteError("two of its weights have one name")
    for key, index in keys:
        _within(index, len(segments), f"the weight {key[:40]!r}")
    inline = sum(1 for _ in program.tables(3))
    constants: list[int] = []
    constant_bytes = 0
    if (table := program.table(5)) is not None and (offsets := table.numbers(1, "<Q")):
        index = table.number(0, "<I")
        _within(index, len(segments), "the segment of constants")
        constants, constant_bytes = list(offsets), segments[index][1]
    found: dict[str, Method] = {}
    for plan in program.tables(1):
        method = _method(plan, len(segments), inline, constants, constant_bytes)
        if method.name in found:
            raise PteError(f"has two methods {method.name[:40]!r}")
        found[method.name] = method
    return found


def _method(
    plan: _Table, segments: int, inline: int, constants: Sequence[int], constant_bytes: int
) -> Method:
    name = plan.text(0)
    planned = plan.numbers(8, "<q")
    if any(size < 0 for size in planned) or sum(planned) > LARGEST_MEMORY:
        raise PteError(f"method {name[:40]!r} asks for more memory than any phone has")
    values = [_value(one, planned, constants, constant_bytes) for one in plan.tables(2)]

    def indices(numbers: Sequence[int]) -> Sequence[int]:
        for index in numbers:
            _within(index, len(values), f"a value of method {name[:40]!r}")
        return numbers

    for value in values:
        if isinstance(value, IntegerList) and not all(
            type(values[index]) is int for index in indices(value.indices)
        ):
            raise PteError(f"a list of method {name[:40]!r} holds what is no integer")
    operators = [f"{one.text(0)}.{one.text(1)}".removesuffix(".") for one in plan.tables(6)]
    backends: list[str] = []
    for one in plan.tables(7):
        backends.append(one.text(0))
        reference = one.table(1)
        if reference is None:
            raise PteError(f"a delegate of method {name[:40]!r} has no data")
        limit = segments if reference.number(0, "<b") else inline
        _within(reference.number(1, "<I"), limit, f"a delegate of method {name[:40]!r}")
    count = 0
    for chain in plan.tables(5):
        instructions = list(chain.tables(2))
        count += len(instructions)
        for one in instructions:
            _instruction(one, operators, len(backends), len(instructions), values, indices)
    return Method(
        name,
        tuple(values[index] for index in indices(plan.numbers(3, "<i"))),
        tuple(values[index] for index in indices(plan.numbers(4, "<i"))),
        count,
        tuple(dict.fromkeys(operators)),
        tuple(dict.fromkeys(backends)),
        planned,
    )


def _instruction(
    one: _Table,
    operators: Sequence[str],
    delegates: int,
    count: int,
    values: Sequence[Value],
    indices: Callable[[Sequence[int]], Sequence[int]],
) -> None:
    kind, body = one.number(0, "<B"), one.table(1)
    if body is None or not 1 <= kind <= 5:
        raise PteError(f"an instruction of kind {kind} is unknown")
    first = body.number(0, "<i")
    if kind in (1, 2):  # of an operator, of a delegate
        _within(first, len(operators) if kind == 1 else delegates, "an operator or a delegate")
        given = [values[index] for index in indices(body.numbers(1, "<i"))]
        name = operators[first] if kind == 1 else "a delegate"
        letters = SIGNATURES.get(name) if kind == 1 else "t" * len(given)
        if letters is not None and not _is_given(letters, given):
            raise PteError(f"{name[:60]} is not given what it takes")
    elif kind == 3:
        indices((first, body.number(1, "<i")))
    elif kind == 4:
        indices((first,))
        _within(body.number(1, "<i"), count + 1, "an instruction")
    else:
        indices((first,))


def _is_given(letters: str, given: Sequence[Value]) -> bool:
    numbers = {"i": (int,), "n": (int, float), "b": (bool,)}
    kinds = {**numbers, "t": (TensorType,), "l": (IntegerList,)}
    return len(letters) == len(given) and all(
        letter == "." or type(value) in kinds[letter] for letter, value in zip(letters, given, strict=True)
    )


def _value(one: _Table, planned: Sequence[int], constants: Sequence[int], constant_bytes: int) -> Value:
    kind, body = one.number(0, "<B"), one.table(1)
    if body is None or kind == 1:
        return None
    if kind == 2:
        return int(body.number(0, "<q"))
    if kind == 3:
        return bool(body.number(0, "<B"))
    if kind == 4:
        return float(body.number(0, "<d"))
    if kind == 6:
        return body.text(0)
    if kind == 7:
        return IntegerList(body.numbers(0, "<q"))
    if kind != 5:
        return None
    code = body.number(0, "<b")
    if code not in DTYPES:
        raise PteError(f"a tensor of type {code} is unknown")
    dtype, sizes = DTYPES[code], body.numbers(2, "<i")
    if any(size < 0 for size in sizes) or len(sizes) > 16:
        raise PteError(f"a tensor of the shape {tuple(sizes[:16])} is impossible")
    order = body.numbers(3, "<B")
    if sorted(order) != list(range(len(sizes))):
        raise PteError(f"a tensor with the order {order[:16]} of {len(sizes)} dimensions is impossible")
    nbytes = math.prod(sizes) * next(width for end, width in SIZES.items() if dtype.endswith(end))
    allocation, index = body.table(6), body.number(5, "<I")
    if allocation is not None:
        memory = allocation.number(0, "<I")
        _within(memory, len(planned), "a tensor's memory")
        offset = allocation.number(1, "<I") + (allocation.number(2, "<I") << 32)
        if offset + nbytes > planned[memory]:
            raise PteError("a tensor lies behind its memory")
    if index and constants:
        _within(index, len(constants), "a constant")
        if allocation is None and constants[index] + nbytes > constant_bytes:
            raise PteError("a constant lies behind the file's")
    if (extra := body.table(9)) is not None:
        extra.text(1)  # the buffer's name
    return TensorType(dtype, tuple(sizes), body.number(8, "<b") != 0)


def _within(index: int, limit: int, what: str) -> None:
    if not 0 <= index < limit:
        raise PteError(f"{what} is number {index} of {limit}")
