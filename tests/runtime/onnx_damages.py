"""What is done to the ONNX parts of a bundle, all hashes made to fit."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.runtime.damages import Damage
from tests.runtime.tiny_bundle import rehash


def rewrite(change: Callable[[random.Random, Any, Path], str], parts: tuple[str, ...]) -> Damage:
    def damage(rng: random.Random, folder: Path) -> str:
        path = folder / "parts" / f"{rng.choice(parts)}.onnx"
        model = onnx.load(path, load_external_data=False)
        told = change(rng, model, path)
        path.write_bytes(model.SerializeToString())
        rehash(folder)
        return f"{path.name}: {told}"

    damage.__name__ = change.__name__
    return damage


def stored_floats(model: Any) -> list[Any]:
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16)
    return [tensor for tensor in model.graph.initializer if tensor.data_type in floats]


def spoil_values(rng: random.Random, model: Any, path: Path) -> str:
    """NaN or infinity in one place of one tensor, wherever and however it is stored."""
    bad = rng.choice([np.nan, np.inf, -np.inf])
    tensor = rng.choice(stored_floats(model))
    if tensor.name == "mask" and bad == -np.inf:
        bad = np.nan  # a mask of zeros and −∞ is what it should be
    if len(tensor.float_data):
        tensor.float_data[rng.randrange(len(tensor.float_data))] = bad
    elif tensor.data_location == TensorProto.EXTERNAL:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        place = int(entries["offset"]) + 4 * rng.randrange(int(entries["length"]) // 4)
        data = path.with_name(entries["location"])
        content = bytearray(data.read_bytes())
        content[place : place + 4] = np.float32(bad).tobytes()
        data.write_bytes(content)
    else:
        values = numpy_helper.to_array(tensor).copy()
        # A scalar of −∞ alone is a mask's fill value.
        values.reshape(-1)[rng.randrange(values.size)] = np.nan if values.size == 1 else bad
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return f"{tensor.name} {bad}"


def spoil_hidden_values(rng: random.Random, model: Any, path: Path) -> str:
    """NaN in a Constant, in a branch of an If, and −∞ as a quantizer's only scale."""
    nan = numpy_helper.from_array(
        np.array([1, rng.choice([np.nan, np.inf])], rng.choice([np.float32, np.float16, np.float64])), "n"
    )
    constant = helper.make_node("Constant", [], ["hidden"], "hidden", value=nan)
    kind = rng.choice(["constant", "branch", "scale", "constant scale"])
    if kind == "constant":
        model.graph.node.append(constant)
    elif kind == "branch":
        out = helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [2])
        branch = helper.make_graph(
            [helper.make_node("Identity", ["n"], ["hidden"])], "branch", [], [out], [nan]
        )
        model.graph.node.append(
            helper.make_node("If", ["yes"], ["o"], then_branch=branch, else_branch=branch)
        )
    else:
        model.graph.node.append(helper.make_node("DequantizeLinear", ["q", "the_scale"], ["o"], "dequantize"))
        scale = numpy_helper.from_array(np.array(-np.inf, np.float32), "the_scale")
        if kind == "scale":
            model.graph.initializer.append(scale)
        else:
            model.graph.node.append(helper.make_node("Constant", [], ["the_scale"], "c", value=scale))
    return kind


def lead_outside(rng: random.Random, model: Any, path: Path) -> str:
    tensor = rng.choice([t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL])
    entries = {entry.key: entry for entry in tensor.external_data}
    location = rng.choice(
        [
            "../../etc/passwd",
            "/etc/passwd",
            "../manifest.json",
            "../tokenizer.json",
            "decoder.onnx",
            "vision.onnx",
            "",
            "../parts/decoder.onnx.data",
            "./decoder.onnx.data",
            "*/_ORT_MEM_ADDR_/*",
            "decoder.onnx.data/",
            "x\0y",
            "C:\\x",
            "file:///etc/passwd",
            "../golden/image.png",
            "decoder.onnx.DATA",
        ]
    )
    entries["location"].value = location
    return location


def misplace(rng: random.Random, model: Any, path: Path) -> str:
    tensor = rng.choice([t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL])
    entries = {entry.key: entry for entry in tensor.external_data}
    key = rng.choice(["offset", "length"])
    old = int(entries[key].value)
    values = [
        "-1",
        "",
        "x",
        "1e3",
        "0x10",
        str(2**63),
        str(2**64),
        "9" * 100,
        "99999999",
        " 0",
        "+1",
        "\u0661",
        "1.0",
    ]
    if key == "length":
        values += [str(old + 1), str(old - 1), "0", str(2 * old)]
    entries[key].value = rng.choice(values)
    return f"{tensor.name} {key} {entries[key].value[:30]}"


def misshape(rng: random.Random, model: Any, path: Path) -> str:
    tensor = rng.choice([tensor for tensor in model.graph.initializer if len(tensor.dims)])
    axis = rng.randrange(len(tensor.dims))
    old = tensor.dims[axis]
    new = rng.choice([-1, 0, old + 1, old * 2, 2**31, 2**62, 2**63 - 1, -(2**63)])
    tensor.dims[axis] = new
    if new > 2**61:
        tensor.dims.extend([4, 2])  # the product of 64-bit numbers overflows to 0
    return f"{tensor.name} axis {axis}: {old} to {new}"


def retype(rng: random.Random, model: Any, path: Path) -> str:
    tensor = rng.choice(model.graph.initializer)
    sizes = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.INT64: 8, TensorProto.UINT8: 1}
    types = [
        TensorProto.STRING,
        TensorProto.COMPLEX64,
        TensorProto.UNDEFINED,
        TensorProto.FLOAT8E4M3FN,
        99,
        -5,
    ]
    types += [other for other, size in sizes.items() if size != sizes[tensor.data_type]]
    tensor.data_type = rng.choice(types)
    return f"{tensor.name} {tensor.data_type}"


def misfit_quantized(rng: random.Random, model: Any, path: Path) -> str:
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    key = rng.choice(["K", "N", "bits", "block_size"])
    values = {
        "K": [0, -32, 64, 2**40],
        "N": [0, 41, 80, 2**40],
        "bits": [0, 2, 3, 8],
        "block_size": [0, 8, 32, -16],
    }
    attribute = next(attribute for attribute in node.attribute if attribute.name == key)
    attribute.i = rng.choice(values[key])
    return f"{key} {attribute.i}"


def change_operators(rng: random.Random, model: Any, path: Path) -> str:
    node = rng.choice(model.graph.node)
    kind = rng.choice(
        ["domain", "context", "python", "function", "training", "sparse", "sparse value", "nested"]
    )
    if kind == "domain":
        node.domain = rng.choice(
            ["ai.onnx.contrib", "com.example", "ai.onnx.ml", "com.microsoft.nchwc", "x\ny", "AI.ONNX"]
        )
    elif kind == "context":
        model.graph.node.append(
            helper.make_node(
                "EPContext", [], ["c"], "c", domain="com.microsoft", ep_cache_context="../../x.so"
            )
        )
    elif kind == "python":
        node.op_type, node.domain = "PythonOp", "com.microsoft"
    elif kind == "function":
        opset = [helper.make_opsetid("", 21)]
        inner = [helper.make_node("Identity", ["a"], ["b"])]
        model.functions.append(
            helper.make_function("com.microsoft", "MatMulNBits", ["a"], ["b"], inner, opset)
        )
    elif kind == "training":
        model.training_info.add().algorithm.name = "x"
    elif kind == "sparse":
        model.graph.sparse_initializer.add().values.name = "x"
    elif kind == "sparse value":
        node.attribute.add(name="x", type=onnx.AttributeProto.SPARSE_TENSOR).sparse_tensor.dims.append(5)
    else:
        inner = helper.make_node("System", [], ["o"], "s", domain="com.example")
        branch = helper.make_graph([inner], "b", [], [])
        model.graph.node.append(
            helper.make_node("If", ["yes"], ["o"], then_branch=branch, else_branch=branch)
        )
    return kind


def change_interface(rng: random.Random, model: Any, path: Path) -> str:
    side = rng.choice([model.graph.input, model.graph.output])
    value = rng.choice(side)
    kind = rng.choice(["name", "dtype", "number", "rank", "no shape", "drop", "add", "twice"])
    shape = value.type.tensor_type.shape
    if kind == "name":
        value.name += "_"
    elif kind == "dtype":
        value.type.tensor_type.elem_type = rng.choice([TensorProto.DOUBLE, TensorProto.STRING, 0, 77])
    elif kind == "number":
        dim = rng.choice(shape.dim)
        dim.dim_value = dim.dim_value + 1 if dim.HasField("dim_value") else 1
    elif kind == "rank":
        shape.dim.add().dim_value = 1
    elif kind == "no shape":
        value.type.tensor_type.ClearField("shape")
    elif kind == "drop":
        side.remove(value)
    elif kind == "add":
        side.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    else:
        side.append(value)
    return f"{kind} {value.name}"


def spoil_protobuf(rng: random.Random, folder: Path) -> str:
    path = folder / "parts" / rng.choice(["vision.onnx", "embed.onnx", "decoder.onnx"])
    data = path.read_bytes()
    kinds = {
        "cut": data[: rng.randrange(1, len(data) - 1)],
        "random": rng.randbytes(rng.randrange(1, 2000)),
        "of zeros": bytes(100),
        "a length beyond the end": data[:8] + b"\x3a\xff\xff\xff\xff\x0f" + data[8:],
        "deep": b"\x3a\x7f" * 5000,
        "text": b"ir_version: 10\n",
        "empty model": b"\x08\x0a",
        "another file": (folder / "tokenizer.json").read_bytes(),
    }
    kind = rng.choice(list(kinds))
    path.write_bytes(kinds[kind])
    rehash(folder)
    return f"{path.name} {kind}"


def shorten_external_data(rng: random.Random, folder: Path) -> str:
    path = folder / "parts" / "decoder.onnx.data"
    size = path.stat().st_size
    os.truncate(path, rng.choice([0, 1, size - 1, rng.randrange(size)]))
    rehash(folder)
    return path.name
