"""An .mlpackage on disk, read as a stranger's: the folder, the specification, the weight files. No torch.

Sources: the layout that coremltools' ModelPackage writes; coremltools' MILBlob/Blob/StorageFormat.hpp.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilemm.errors import MobileMMError, one_line
from mobilemm.export.mil_interpreter.protobuf import coreml_protobuf
from mobilemm.runtime.bundle import open_plain
from mobilemm.runtime.manifest_check import shown

# A parsed specification takes up to 40 times the room of its bytes. It holds no weights: that of a language
# model with 1.4 billion of them has 2 MB.
LARGEST_SPECIFICATION = 20 * 2**20
LARGEST_MANIFEST = 2**20

SENTINEL = 0xDEADBEEF
HEADER = np.dtype(
    [("sentinel", "<u4"), ("dtype", "<u4"), ("bytes", "<u8"), ("offset", "<u8"), ("padding_bits", "<u8")]
)

# Weight files' number of a type, and MIL's name of it.
BLOB_DTYPES = {
    **{1: "FLOAT16", 2: "FLOAT32", 3: "UINT8", 4: "INT8", 5: "BFLOAT16", 6: "INT16", 7: "UINT16"},
    **{8: "INT4", 9: "UINT1", 10: "UINT2", 11: "UINT4", 12: "UINT3", 13: "UINT6", 14: "INT32", 15: "UINT32"},
}
# Bits of one stored element.
BITS = {
    **{"BOOL": 8, "FLOAT16": 16, "FLOAT32": 32, "FLOAT64": 64, "INT8": 8, "INT16": 16, "INT32": 32},
    **{"INT64": 64, "UINT8": 8, "UINT16": 16, "UINT32": 32, "UINT64": 64},
    **{"INT4": 4, "UINT4": 4, "UINT6": 6, "UINT3": 3, "UINT2": 2, "UINT1": 1},
}
NUMPY = {
    **{"BOOL": "?", "FLOAT16": "<f2", "FLOAT32": "<f4", "FLOAT64": "<f8", "INT8": "i1", "INT16": "<i2"},
    **{"INT32": "<i4", "INT64": "<i8", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8"},
    **{"INT4": "i1", "UINT4": "u1", "UINT6": "u1", "UINT3": "u1", "UINT2": "u1", "UINT1": "u1"},
}


@dataclass(frozen=True)
class Blob:
    """Where the elements of one constant lie in a weight file."""

    file: str
    offset: int
    bytes: int


class Package:
    """An .mlpackage: its specification, parsed, and its weight files, mapped when they are first read.

    Attributes:
        path: the package's folder.
        specification: the Model of Model.proto; always an ML program.

    Raises MobileMMError, one line, for whatever is missing, damaged or leads outside.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise MobileMMError(f"{self.path}: there is no such folder; give an .mlpackage")
        self._root = self._find_root()
        self._maps: dict[str, NDArray[np.uint8]] = {}
        data = self._read(self._root, LARGEST_SPECIFICATION)
        try:
            self.specification: Any = coreml_protobuf()[0].Model.FromString(data)
        except Exception as error:  # protobuf's own type, which it does not export in all versions
            raise self.error(f"its specification cannot be parsed ({one_line(error, 80)})") from None
        kind = self.specification.WhichOneof("Type")
        if kind != "mlProgram":
            raise self.error(f"is {shown(kind) if kind else 'empty'}, not an ML program")

    def error(self, wrong: str) -> MobileMMError:
        """An error about this package."""
        return MobileMMError(f"{self.path}: {wrong}")

    def blob(self, file: str, offset: int, dtype: str, count: int) -> Blob:
        """The place of `count` elements whose header lies at `offset`, checked against type and file."""
        stored = self._map(file)
        if offset % 64 or offset < 64 or offset + 64 > len(stored):
            raise self.error(
                f"a weight lies at byte {shown(offset)} of {shown(file)}, which has {len(stored):,} bytes"
            )
        header = stored[offset : offset + HEADER.itemsize].view(HEADER)[0]
        size, start = int(header["bytes"]), int(header["offset"])
        if int(header["sentinel"]) != SENTINEL:
            raise self.error(f"byte {offset:,} of {shown(file)} is not the beginning of a weight")
        found = BLOB_DTYPES.get(int(header["dtype"]), f"type {int(header['dtype'])}")
        if found != dtype and not (dtype == "BOOL" and found == "UINT8"):
            raise self.error(
                f"the weight at byte {offset:,} of {shown(file)} is {found}, declared as {dtype}"
            )
        wanted = -(-count * BITS[dtype] // 8)
        if size != wanted:
            raise self.error(
                f"the weight at byte {offset:,} of {shown(file)} has {size:,} bytes; its shape needs"
                f" {shown(wanted)}"
            )
        if start + size > len(stored):
            raise self.error(
                f"the weight at byte {offset:,} of {shown(file)} ends at byte {shown(start + size)} of"
                f" {len(stored):,}"
            )
        return Blob(file, start, size)

    def elements(self, blob: Blob, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """A constant's elements. Of types under a byte a copy, one byte each; else a view of the file."""
        raw = self._map(blob.file)[blob.offset : blob.offset + blob.bytes]
        return unpack(raw, dtype, shape)

    def _map(self, file: str) -> NDArray[np.uint8]:
        if file not in self._maps:
            inside = file.removeprefix("@model_path/")
            if inside == file or not _is_plain(inside):
                raise self.error(f"a weight lies in {shown(file)}, which is no file of the package")
            relative = f"{self._root.rpartition('/')[0]}/{inside}"
            with open_plain(self.path, relative) as opened:
                if os.fstat(opened.fileno()).st_size == 0:
                    raise self.error(f"{shown(relative)} is empty")
                self._maps[file] = np.memmap(opened, np.uint8, "r")
        return self._maps[file]

    def _find_root(self) -> str:
        """The specification's path inside of the package, as Manifest.json has it."""
        data = self._read("Manifest.json", LARGEST_MANIFEST)
        try:
            manifest = json.loads(data)
            item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]
            relative = item["path"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self.error("its Manifest.json names no root model") from None
        if not isinstance(relative, str) or not _is_plain(relative):
            raise self.error(f"its Manifest.json has the path {shown(relative)}, which leads outside")
        return f"Data/{relative}"

    def _read(self, relative: str, most: int) -> bytes:
        with open_plain(self.path, relative) as opened:
            data = opened.read(most + 1)
        if len(data) > most:
            raise self.error(f"{shown(relative)} is larger than {most // 2**20} MB")
        return data


def unpack(raw: NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Elements out of stored bytes: little-endian, types under a byte packed, lowest bits first."""
    bits, count = BITS[dtype], math.prod(shape)
    if bits >= 8:
        return raw[: count * bits // 8].view(NUMPY[dtype]).reshape(shape)
    if bits == 4:
        codes = np.empty(2 * len(raw), np.uint8)
        np.bitwise_and(raw, 15, out=codes[0::2])
        np.right_shift(raw, 4, out=codes[1::2])
    else:
        planes = np.unpackbits(raw, bitorder="little")[: count * bits].reshape(count, bits)
        codes = np.packbits(planes, axis=1, bitorder="little")[:, 0]
    codes = codes[:count].reshape(shape)
    if dtype == "INT4":
        return (codes ^ 8).view(np.int8) - np.int8(8)  # two's complement
    return codes


def _is_plain(relative: str) -> bool:
    """Whether a path consists of plain names, so that it stays where it is."""
    return bool(re.fullmatch(r"[^/\\\0]+(/[^/\\\0]+)*", relative)) and not (
        {".", ".."} & set(relative.split("/"))
    )
