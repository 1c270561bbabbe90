"""ExecuTorch's own runtime behind the Android library's stand-in for it, over standard input and output.

    python -m tests.android.executorch_server

Numbers are big-endian, texts as Java's `writeUTF` has them, tensors' bytes the machine's own. A question is
its kind (byte) and the program's number (int), then

    1  load: threads (int), path                      -> count (int), the methods' names
    2  execute: method, count (int), tensors          -> count (int), tensors
    3  close                                          ->

where a tensor is its type's code (byte), rank (int), sizes (long), length in bytes (int), and these. An
answer begins with 0 (byte), or is 1, the runtime's number of the error (int), and its text.
"""

from __future__ import annotations

import os
import re
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mobilemm.errors import MobileMMError
from mobilemm.runtime.backends.executorch import ExecutorchProgram

LOAD, EXECUTE = 1, 2
# As DType of org.pytorch.executorch counts them.
CODES = {0: "uint8", 1: "int8", 3: "int32", 4: "int64", 5: "float16", 6: "float32"}
INTERNAL = 1


class Question:
    """Values out of a file; raises EOFError at its end."""

    def __init__(self, source: BinaryIO) -> None:
        self.source = source

    def number(self, kind: str) -> int:
        (value,) = struct.unpack(f">{kind}", self._bytes(struct.calcsize(f">{kind}")))
        return int(value)

    def text(self) -> str:
        return self._bytes(self.number("H")).decode()

    def tensor(self) -> NDArray[Any]:
        dtype = CODES[self.number("b")]
        shape = [self.number("q") for _ in range(self.number("i"))]
        return np.frombuffer(bytearray(self._bytes(self.number("i"))), dtype).reshape(shape)

    def _bytes(self, count: int) -> bytes:
        data = self.source.read(count)
        if len(data) < count:
            raise EOFError
        return data


def number(kind: str, value: int) -> bytes:
    return struct.pack(f">{kind}", value)


def text(value: str) -> bytes:
    data = value.encode()
    return number("H", len(data)) + data


def tensor(value: NDArray[Any]) -> bytes:
    code = next(code for code, name in CODES.items() if name == value.dtype.name)
    sizes = b"".join(number("q", size) for size in value.shape)
    data = np.ascontiguousarray(value).tobytes()
    return number("b", code) + number("i", value.ndim) + sizes + number("i", len(data)) + data


def answer(question: Question, programs: dict[int, ExecutorchProgram]) -> bytes:
    """Reads a question whole before anything can fail. Raises MobileMMError when the runtime does."""
    kind, program = question.number("b"), question.number("i")
    if kind == LOAD:
        threads, path = question.number("i"), Path(question.text())
        made = ExecutorchProgram(path, threads or None)
        try:
            names = made._module.method_names()
        except RuntimeError as error:
            raise MobileMMError(str(error)) from None
        programs[program] = made
        return number("i", len(names)) + b"".join(text(name) for name in names)
    if kind == EXECUTE:
        method = question.text()
        inputs = [question.tensor() for _ in range(question.number("i"))]
        return number("i", 1) + tensor(programs[program](method, *inputs))
    del programs[program]
    return b""


def serve(source: BinaryIO, target: BinaryIO) -> None:
    question = Question(source)
    programs: dict[int, ExecutorchProgram] = {}
    while True:
        try:
            found = number("b", 0) + answer(question, programs)
        except EOFError:
            return
        except MobileMMError as error:
            code = re.search(r"error: 0x([0-9a-f]+)", str(error))
            found = number("b", 1) + number("i", int(code[1], 16) if code else INTERNAL) + text(str(error))
        target.write(found)
        target.flush()


def main() -> None:
    # What libraries print must not come between the answers.
    with os.fdopen(os.dup(1), "wb") as target:
        os.dup2(2, 1)
        serve(sys.stdin.buffer, target)


if __name__ == "__main__":
    main()
