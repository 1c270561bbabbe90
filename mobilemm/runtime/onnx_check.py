"""Checks an ONNX part as a file: what onnxruntime would load is looked at before it does.

Whoever makes a hostile bundle computes its hashes as well. So the graph is parsed, and no weight may lie
outside of the part's own files, be of another size than its shape needs, or hold a NaN; no operator may load
code or files; inputs and outputs are those of the manifest.

Source: the ONNX IR specification (onnx.proto, "External Data").
"""

from __future__ import annotations

import math
import os
import posixpath
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from mobilemm.errors import MobileMMError, one_line
from mobilemm.runtime.manifest import Manifest, Part, Tensor
from mobilemm.runtime.manifest_check import AGAIN, shown

DOMAINS = ("", "ai.onnx", "com.microsoft")
# Operators of these domains that load files or run code of their own.
REFUSED = ("EPContext", "PythonOp", "PythonOpGrad")
LARGEST_GRAPH = 2**31 - 1  # protobuf's own limit
CHUNK = 2**24

# Bits of one element.
BITS = {
    "FLOAT": 32,
    "FLOAT16": 16,
    "BFLOAT16": 16,
    "DOUBLE": 64,
    "UINT8": 8,
    "INT8": 8,
    "UINT16": 16,
    "INT16": 16,
    "UINT32": 32,
    "INT32": 32,
    "UINT64": 64,
    "INT64": 64,
    "BOOL": 8,
    "UINT4": 4,
    "INT4": 4,
    "UINT2": 2,
    "INT2": 2,
}
# Of floating-point types, the bits that are all set in NaN and infinity.
EXPONENT = {
    "FLOAT": ("u4", 0x7F800000),
    "FLOAT16": ("u2", 0x7C00),
    "BFLOAT16": ("u2", 0x7F80),
    "DOUBLE": ("u8", 0x7FF0000000000000),
}
MINUS_INFINITY = {"FLOAT": 0xFF800000, "FLOAT16": 0xFC00, "BFLOAT16": 0xFF80, "DOUBLE": 0xFFF0000000000000}
TENSOR_DTYPES = {"FLOAT": "float32", "FLOAT16": "float16"} | {
    name.upper(): name for name in ("uint8", "int8", "int32", "int64")
}


def check_onnx_part(folder: Path, manifest: Manifest, name: str, *, values: bool = True) -> None:
    """Checks one part of a bundle in `folder`, whose files have the sizes that the manifest says.

    `values`: also that all floating-point weights are finite, which reads them (in pieces of 16 MB).

    Raises MobileMMError naming file and tensor, or that the `onnx` extra is to be installed.
    """
    part = manifest.parts[name]
    _PartCheck(folder, manifest, part, values).run()


class _PartCheck:
    def __init__(self, folder: Path, manifest: Manifest, part: Part, values: bool) -> None:
        try:
            import onnx
        except ImportError:
            raise MobileMMError(
                "ONNX bundles need the package onnx; install it: pip install 'mobilemm[onnx]'"
            ) from None
        self.onnx = onnx
        self.folder, self.part, self.values = folder, part, values
        self.path = folder / part.file
        self.sizes = {file.path: file.bytes for file in manifest.files}
        self.masks: set[str] = set()

    def run(self) -> None:
        model = self.parse()
        if model.functions:
            self.refuse(f"holds the function {shown(model.functions[0].name)}; none is allowed")
        if len(model.training_info):
            self.refuse("holds training information")
        for graph in self.graphs(model.graph):
            for node in graph.node:
                self.check_operator(node)
            for initializer in graph.sparse_initializer:
                self.refuse(f"tensor {shown(initializer.values.name)} is sparse")
        names = [tensor.name for tensor in model.graph.initializer]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            self.refuse(f"tensor {shown(twice[0])} stands there twice")
        for tensor, scale in self.tensors(model.graph):
            self.check_tensor(tensor, scale)
        for graph in self.graphs(model.graph):
            self.check_quantized(graph)
        self.check_interface(model.graph)

    def refuse(self, wrong: str) -> NoReturn:
        raise MobileMMError(f"{self.path}: {wrong}; {AGAIN}")

    def parse(self) -> Any:
        from mobilemm.runtime.bundle import open_plain

        with open_plain(self.folder, self.part.file) as opened:
            if os.fstat(opened.fileno()).st_size > LARGEST_GRAPH:
                self.refuse("is larger than the 2 GB that ONNX allows without external data")
            data = opened.read()
        try:
            model = self.onnx.ModelProto.FromString(data)
        except Exception as error:  # protobuf's own type, which it does not export in all versions
            self.refuse(f"is no ONNX model ({one_line(error, 80)})")
        if not model.HasField("graph") or not model.graph.node:
            self.refuse("is no ONNX model (it has no graph)")
        return model

    def graphs(self, graph: Any) -> Iterator[Any]:
        """A graph and those inside of its nodes (If, Loop, Scan); protobuf limits the depth."""
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    yield from self.graphs(inner)

    def tensors(self, graph: Any) -> Iterator[tuple[Any, bool]]:
        """All stored tensors, and whether each is read by an operator as a scale or other parameter."""
        for inner in self.graphs(graph):
            parameters = {
                name for node in inner.node if _quantizes(node.op_type) for name in list(node.input)[1:]
            }
            for tensor in inner.initializer:
                yield tensor, tensor.name in parameters
            for node in inner.node:
                for attribute in node.attribute:
                    if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                        self.refuse(f"node {shown(node.name)} holds a sparse tensor")
                    stored = [attribute.t] if attribute.HasField("t") else []
                    for tensor in (*stored, *attribute.tensors):
                        yield tensor, any(name in parameters for name in node.output)

    def check_operator(self, node: Any) -> None:
        if node.domain not in DOMAINS or node.op_type in REFUSED:
            operator = f"{node.domain}.{node.op_type}".lstrip(".")
            self.refuse(f"operator {shown(operator)} is not allowed; those of ai.onnx and com.microsoft are")

    def check_tensor(self, tensor: Any, scale: bool) -> None:
        """Size, place and values of one stored tensor."""
        known = self.onnx.TensorProto.DataType
        dtype = known.Name(tensor.data_type) if tensor.data_type in known.values() else str(tensor.data_type)
        if dtype not in BITS:
            self.refuse(f"tensor {shown(tensor.name)} has the type {dtype}, which is not allowed")
        if any(size < 0 for size in tensor.dims):
            self.refuse(f"tensor {shown(tensor.name)} has a negative dimension")
        if tensor.HasField("segment"):
            self.refuse(f"tensor {shown(tensor.name)} is stored in segments")
        count = math.prod(tensor.dims)
        size = -(-count * BITS[dtype] // 8)
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            relative, offset = self.external_place(tensor, size)
            if self.values and dtype in EXPONENT:
                self.check_values(tensor.name, dtype, self.external_chunks(relative, offset, size), scale)
            return
        if len(tensor.external_data):
            self.refuse(f"tensor {shown(tensor.name)} is stored inside and outside of the file")
        pieces: Iterator[bytes]
        if tensor.HasField("raw_data"):
            if len(tensor.raw_data) != size:
                self.wrong_size(tensor, len(tensor.raw_data), size)
            raw = tensor.raw_data
            pieces = (raw[at : at + CHUNK] for at in range(0, size, CHUNK))
        else:
            pieces = iter([self.typed_values(tensor, dtype, count)])
        if self.values and dtype in EXPONENT:
            self.check_values(tensor.name, dtype, pieces, scale)

    def typed_values(self, tensor: Any, dtype: str, count: int) -> bytes:
        """The bytes of values that are stored one by one in a list of their type."""
        import numpy as np

        if dtype == "FLOAT":
            values: Any = np.asarray(tensor.float_data, "<f4")
        elif dtype == "DOUBLE":
            values = np.asarray(tensor.double_data, "<f8")
        elif dtype in ("INT64", "UINT64", "UINT32"):
            values = tensor.int64_data if dtype == "INT64" else tensor.uint64_data
        else:
            values = np.asarray(tensor.int32_data, "<i4")
            count = -(-count * min(BITS[dtype], 8) // 8)  # types under a byte are packed
        if len(values) != count:
            self.wrong_size(tensor, len(values), count, "values")
        if dtype in ("FLOAT16", "BFLOAT16"):
            values = values.astype("<u2")
        return values.tobytes() if dtype in EXPONENT else b""

    def wrong_size(self, tensor: Any, found: int, wanted: int, unit: str = "bytes") -> NoReturn:
        dims = shown(str(list(tensor.dims)))[1:-1]
        self.refuse(
            f"tensor {shown(tensor.name)} has {found:,} {unit}; its shape {dims} needs {shown(wanted)}"
        )

    def external_place(self, tensor: Any, size: int) -> tuple[str, int]:
        """File and offset of a tensor outside of the .onnx file, after a check that it lies there whole."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        relative = posixpath.join(posixpath.dirname(self.part.file), location)
        if location.startswith("/") or relative not in self.part.files or relative == self.part.file:
            self.refuse(
                f"tensor {shown(tensor.name)} lies in {shown(location)}, which is no file of this part"
            )
        numbers = []
        for key, default in (("offset", "0"), ("length", str(size))):
            text = entries.get(key, default)
            if not (text.isascii() and text.isdecimal() and len(text) < 19):
                self.refuse(f"tensor {shown(tensor.name)}: external data's {key} is {shown(text)}")
            numbers.append(int(text))
        offset, length = numbers
        if length != size:
            self.wrong_size(tensor, length, size)
        if offset + length > self.sizes[relative]:
            self.refuse(
                f"tensor {shown(tensor.name)} ends at byte {offset + length:,} of {shown(relative)}, which"
                f" has {self.sizes[relative]:,}"
            )
        return relative, offset

    def external_chunks(self, relative: str, offset: int, size: int) -> Iterator[bytes]:
        from mobilemm.runtime.bundle import open_plain

        with open_plain(self.folder, relative) as opened:
            opened.seek(offset)
            while size > 0 and (piece := opened.read(min(size, CHUNK))):
                size -= len(piece)
                yield piece

    def check_values(self, name: str, dtype: str, pieces: Iterator[bytes], scale: bool) -> None:
        """Refuses NaN and infinity. An additive mask, of zeros and −∞ alone, is what it looks like."""
        import numpy as np

        kind, mask = EXPONENT[dtype]
        only_mask = not scale
        infinite = False
        for piece in pieces:
            bits = np.frombuffer(piece, f"<{kind}")
            infinite = infinite or bool(((bits & mask) == mask).any())
            only_mask = only_mask and bool(((bits == 0) | (bits == MINUS_INFINITY[dtype])).all())
            if infinite and not only_mask:
                self.refuse(f"tensor {shown(name)} holds NaN or infinity")

    def check_quantized(self, graph: Any) -> None:
        """That MatMulNBits' weights have the sizes that its attributes say: the kernel goes by those."""
        shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type != "MatMulNBits":
                continue
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            rows, columns = attributes.get("N", 0), attributes.get("K", 0)
            bits, block = attributes.get("bits", 4), attributes.get("block_size", 0)
            if min(rows, columns, block) < 1 or bits not in (2, 4, 8) or len(node.input) < 3:
                self.refuse(
                    f"node {shown(node.name)}: MatMulNBits with K, N, bits or block_size out of range"
                )
            blocks = -(-columns // block)
            packed = -(-blocks * bits // 8)
            counts = {
                1: (rows * blocks * -(-block * bits // 8),),
                2: (rows * blocks,),
                3: (rows * packed, rows * blocks),  # zero points packed, or of the scales' type
                5: (rows,),
            }
            for index, wanted in counts.items():
                name = node.input[index] if index < len(node.input) else ""
                if name in shapes and math.prod(shapes[name]) not in wanted:
                    self.refuse(
                        f"tensor {shown(name)} has {math.prod(shapes[name]):,} elements; node"
                        f" {shown(node.name)} (K {columns:,}, N {rows:,}, {bits} bits, blocks of {block:,})"
                        f" needs {wanted[0]:,}"
                    )

    def check_interface(self, graph: Any) -> None:
        """Inputs and outputs as the manifest has them; an input with a default value need not be listed."""
        defaults = {tensor.name for tensor in graph.initializer}
        for side, values, optional in (
            ("inputs", graph.input, defaults),
            ("outputs", graph.output, set()),
        ):
            listed: dict[str, Tensor] = {tensor.name: tensor for tensor in getattr(self.part, side)}
            found = {value.name: value for value in values}
            if len(found) < len(values):
                self.refuse(f"two {side} have one name")
            for name in [*(listed.keys() - found.keys()), *(found.keys() - listed.keys() - optional)]:
                where = "the graph" if name in listed else "the manifest"
                self.refuse(f"{side[:-1]} {shown(name)} is not in {where}")
            for name in listed:
                self.check_declared(side[:-1], listed[name], found[name])

    def check_declared(self, side: str, tensor: Tensor, value: Any) -> None:
        """A number is the same number in both; a dynamic dimension is one in both, under any name."""
        if not value.type.HasField("tensor_type"):
            self.refuse(f"{side} {shown(tensor.name)} is no tensor")
        declared = value.type.tensor_type
        known = self.onnx.TensorProto.DataType
        name = known.Name(declared.elem_type) if declared.elem_type in known.values() else ""
        if TENSOR_DTYPES.get(name) != tensor.dtype:
            self.refuse(
                f"{side} {shown(tensor.name)} is {name or 'untyped'}; the manifest says {tensor.dtype}"
            )
        if not declared.HasField("shape"):
            self.refuse(f"{side} {shown(tensor.name)} has no shape")
        shape = [dim.dim_value if dim.HasField("dim_value") else None for dim in declared.shape.dim]
        wanted = [size if isinstance(size, int) else None for size in tensor.shape]
        if shape != wanted:
            self.refuse(
                f"{side} {shown(tensor.name)} has the shape {shown(str(shape))[1:-1]}; the manifest says"
                f" {shown(str(tensor.shape))[1:-1]}"
            )


def _quantizes(op_type: str) -> bool:
    return any(word in op_type.lower() for word in ("quantize", "nbits", "integer", "qlinear", "qgemm"))
