"""Two packages of one function each → one package of both, weights that are the same bytes stored once.

coremltools does the same by loading both programs with all their weights, which takes several times a model's
size in memory. Here only bytes are compared and copied.
Source of the weights' format: coremltools, mlmodel/src/MILBlob/Blob/StorageFormat.hpp.
"""

from __future__ import annotations

import hashlib
import mmap
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mobilemm.export.targets.coreml_package import SPEC_FILE, read_spec

WEIGHTS_FILE = Path("Data/com.apple.CoreML/weights/weight.bin")
# A file begins with the number of records and its version; each record with 64 bytes: a mark, the type, the
# data's size, where it begins, and by how many bits it is padded.
HEADER, RECORD = struct.Struct("<II"), struct.Struct("<IIQQQ")
ALIGNMENT = 64


def merge(packages: Mapping[str, Path], default: str, destination: Path) -> None:
    """Moves the first package to `destination`, and the functions and weights of the others into it.

    Args:
        packages: function's name → package with one function, `main`.
        default: the function that is run when none is named.
    """
    (first, base), *others = packages.items()
    shutil.move(base, destination)
    spec = read_spec(destination)
    program, description = spec.mlProgram, spec.description
    functions = [_function(description, first)]
    program.functions[first].CopyFrom(program.functions["main"])
    del program.functions["main"]
    for name, package in others:
        other = read_spec(package)
        functions.append(_function(other.description, name))
        main = other.mlProgram.functions["main"]
        places = list(_blobs(main))
        moved = _append(
            destination / WEIGHTS_FILE, package / WEIGHTS_FILE, {place.offset for place in places}
        )
        for place in places:
            place.offset = moved[place.offset]
        program.functions[name].CopyFrom(main)
    for field in ("input", "output", "state"):
        description.ClearField(field)
    description.functions.extend(functions)
    description.defaultFunctionName = default
    (destination / SPEC_FILE).write_bytes(spec.SerializeToString())


def _function(description: Any, name: str) -> Any:
    from coremltools.proto import Model_pb2

    return Model_pb2.FunctionDescription(
        name=name, input=description.input, output=description.output, state=description.state
    )


def _blobs(function: Any) -> Iterator[Any]:
    """References to weights, in whatever operations have them."""
    for block in function.block_specializations.values():
        for operation in block.operations:
            values = list(operation.attributes.values())
            for argument in operation.inputs.values():
                values += [each.value for each in argument.arguments if each.WhichOneof("binding") == "value"]
            for value in values:
                if value.WhichOneof("value") == "blobFileValue":
                    yield value.blobFileValue


def _append(destination: Path, source: Path, offsets: set[int]) -> dict[int, int]:
    """Copies records that `destination` does not hold yet; offset in `source` → offset there."""
    moved: dict[int, int] = {}
    with destination.open("r+b") as file, source.open("rb") as other:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            known = {_digest(mapped, place): place for place in _records(mapped)}
        count, version = HEADER.unpack(_read(file, 0, HEADER.size))
        with mmap.mmap(other.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            for offset in sorted(offsets):
                digest = _digest(mapped, offset)
                if digest not in known:
                    mark, kind, size, begin, padding = RECORD.unpack_from(mapped, offset)
                    place = -(-file.seek(0, 2) // ALIGNMENT) * ALIGNMENT
                    file.seek(place)
                    record = RECORD.pack(mark, kind, size, place + ALIGNMENT, padding)
                    file.write(record.ljust(ALIGNMENT, b"\0"))
                    file.write(mapped[begin : begin + size])
                    known[digest] = place
                    count += 1
                moved[offset] = known[digest]
        file.seek(0)
        file.write(HEADER.pack(count, version))
    return moved


def _records(mapped: mmap.mmap) -> Iterator[int]:
    """Where the records of a file are."""
    count, _ = HEADER.unpack_from(mapped, 0)
    place = ALIGNMENT
    for _ in range(count):
        yield place
        _, _, size, begin, _ = RECORD.unpack_from(mapped, place)
        place = -(-(begin + size) // ALIGNMENT) * ALIGNMENT


def _digest(mapped: mmap.mmap, place: int) -> bytes:
    """Of a record's type and data."""
    _, kind, size, begin, padding = RECORD.unpack_from(mapped, place)
    digest = hashlib.sha256(struct.pack("<IQQ", kind, size, padding))
    with memoryview(mapped) as view, view[begin : begin + size] as data:
        digest.update(data)
    return digest.digest()


def _read(file: Any, place: int, size: int) -> bytes:
    file.seek(place)
    return bytes(file.read(size))
