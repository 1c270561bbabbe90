"""2,000 damaged and hostile bundles, made of one that runs: each refused in one line, before it is loaded."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from pydantic import BaseModel

from mobilemm.errors import MobileMMError
from mobilemm.export.bundle import BundleWriter
from mobilemm.runtime.bundle import MANIFEST_SHA256, open_bundle
from mobilemm.runtime.manifest import Manifest
from tests.runtime.tiny_bundle import rehash, tiny_manifest, write_manifest, write_parts

Damage = Callable[[random.Random, Path], str]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with BundleWriter(tmp_path_factory.mktemp("pristine") / "tiny-onnx") as writer:
        write_parts(writer.folder)
        return writer.finish(tiny_manifest()).folder


def listed(folder: Path) -> list[str]:
    return [file["path"] for file in json.loads((folder / "manifest.json").read_text())["files"]]


# --- files ------------------------------------------------------------------------------------------------


def flip_a_bit(rng: random.Random, folder: Path) -> str:
    path = folder / rng.choice([*listed(folder), "manifest.json", MANIFEST_SHA256])
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"{path.name} at {place}"


def cut(rng: random.Random, folder: Path) -> str:
    path = folder / rng.choice([*listed(folder), "manifest.json", MANIFEST_SHA256])
    length = rng.choice([0, rng.randrange(path.stat().st_size)])
    os.truncate(path, length)
    return f"{path.name} at {length}"


def lengthen(rng: random.Random, folder: Path) -> str:
    path = folder / rng.choice([*listed(folder), "manifest.json", MANIFEST_SHA256])
    with path.open("ab") as opened:
        opened.write(rng.choice([b"\0", b" ", b"{}", b"\n\n", rng.randbytes(5000)]))
    return path.name


def swap(rng: random.Random, folder: Path) -> str:
    one, other = rng.sample([*listed(folder), "manifest.json"], 2)
    (folder / one).rename(folder / "between")
    (folder / other).rename(folder / one)
    (folder / "between").rename(folder / other)
    return f"{one} and {other}"


def delete(rng: random.Random, folder: Path) -> str:
    path = folder / rng.choice([*listed(folder), "manifest.json"])
    path.unlink()
    return path.name


def make_special(rng: random.Random, folder: Path) -> str:
    """A link to the right bytes, here or elsewhere, a linked folder, a pipe, a folder, a link to itself."""
    path = folder / rng.choice([*listed(folder), "manifest.json", MANIFEST_SHA256])
    kind = rng.choice(["link", "relative link", "linked folder", "pipe", "folder", "loop", "device"])
    elsewhere = folder.parent / "elsewhere"
    if kind == "linked folder":
        inside = folder / rng.choice(["parts", "golden"])
        inside.rename(elsewhere)
        inside.symlink_to(elsewhere)
        return f"{kind} {inside.name}"
    path.rename(elsewhere)
    if kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "relative link":
        path.symlink_to(os.path.relpath(elsewhere, path.parent))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to("/dev/zero")
    return f"{kind} {path.name}"


def add(rng: random.Random, folder: Path) -> str:
    name = rng.choice(
        ["added_tokens.json", "parts/x.onnx", "golden/.hidden", "a\nb", "\x1b[31mred", "new/x", "é"]
    )
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    kind = rng.choice(["file", "link", "folder"])
    if kind == "file":
        path.write_bytes(b"{}")
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    else:
        path.mkdir()
    return f"{kind} {name}"


# --- the manifest, its own hash made to fit ---------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every place in a JSON value, but those whose content is free."""
    yield path, value
    if path and path[-1] in ("messages", "generation", "benchmarks", "created_by"):
        return
    for key, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from places(inner, (*path, key))


def parent(manifest: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        manifest = manifest[key]
    return manifest


def edit(change: Callable[[random.Random, Any], str]) -> Damage:
    def damage(rng: random.Random, folder: Path) -> str:
        manifest = json.loads((folder / "manifest.json").read_text())
        told = change(rng, manifest)
        write_manifest(folder, json.dumps(manifest).encode())
        return told

    damage.__name__ = change.__name__
    return damage


@edit
def change_a_type(rng: random.Random, manifest: Any) -> str:
    path, value = rng.choice([(path, value) for path, value in places(manifest) if path])
    others: list[Any] = [{"x": [1]}, [[1]], [None]]
    if isinstance(value, str | bool):
        others += [5, 1.5, None]
    if isinstance(value, int | float) and not isinstance(value, bool):
        others += ["5", True, ""]
    others = [other for other in others if path[-1] not in ("prefix_before_image",) or other is not None]
    new = rng.choice(others)
    parent(manifest, path)[path[-1]] = new
    return f"{path}: {new!r}"


def required_places(model: BaseModel, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for name, field in type(model).model_fields.items():
        if field.is_required():
            yield (*path, name)
        value = getattr(model, name)
        inside = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
        )
        if isinstance(value, BaseModel):
            yield from required_places(value, (*path, name))
        for key, inner in inside:
            if isinstance(inner, BaseModel):
                yield from required_places(inner, (*path, name, key))


@edit
def drop_a_key(rng: random.Random, manifest: Any) -> str:
    path = rng.choice(list(required_places(Manifest.model_validate_json(json.dumps(manifest)))))
    del parent(manifest, path)[path[-1]]
    return str(path)


@edit
def add_a_key(rng: random.Random, manifest: Any) -> str:
    objects = [
        (path, value)
        for path, value in places(manifest)
        if isinstance(value, dict)
        and (not path or path[-1] not in ("parts", "created_by", "exceptions"))
        and "messages" not in path
    ]
    path, value = rng.choice(objects)
    value[rng.choice(["x", "", "__class__", "\x1b[2J", "a\nb", "k" * 5000, "Files"])] = rng.choice(
        [1, None, {}]
    )
    return str(path)


@edit
def change_a_number(rng: random.Random, manifest: Any) -> str:
    numbers = [path for path, value in places(manifest) if type(value) is int and "exceptions" not in path]
    path = rng.choice(numbers)
    new = rng.choice([-1, -(2**63), 2**31 + 1, 2**64, 10**30, 10**1000, 1.5])
    if path[-1] in ("parameters", "peak_memory"):
        new = rng.choice([-1, 2**64, 10**1000, 0.5])
    parent(manifest, path)[path[-1]] = new
    return f"{path}: {str(new)[:20]}"


@edit
def change_a_path(rng: random.Random, manifest: Any) -> str:
    """Everywhere that a file is named, so that only the path itself is wrong."""
    old = rng.choice([file["path"] for file in manifest["files"]])
    new = rng.choice(
        [
            "../" + old,
            "/etc/passwd",
            "C:\\x",
            "C:/x",
            "a\\b",
            "./" + old,
            "a//b",
            "parts/../" + old,
            old + "/",
            "",
            "a\0b",
            "~/x",
            "x:y",
            "é",
            "." + old,
            "a" * 201,
            "..",
            ".",
            "a/./b",
            "//host/x",
            "manifest.json",
            "Manifest.JSON",
            "manifest.json.sha256",
            old + ".",
            "a b",
            "a\nb",
            "%2e%2e/x/..",
            "\u202egnp",
            "nothing/there",
        ]
    )
    text = json.dumps(manifest).replace(json.dumps(old), json.dumps(new))
    manifest.clear()
    manifest.update(json.loads(text))
    return f"{old}: {new[:40]!r}"


@edit
def list_twice(rng: random.Random, manifest: Any) -> str:
    file = dict(rng.choice(manifest["files"]))
    file["path"] = rng.choice([file["path"], file["path"].upper(), file["path"].title()])
    manifest["files"].insert(rng.randrange(len(manifest["files"])), file)
    return str(file["path"])


@edit
def lie_about_a_file(rng: random.Random, manifest: Any) -> str:
    file = rng.choice(manifest["files"])
    match rng.randrange(3):
        case 0:
            file["bytes"] = max(0, file["bytes"] + rng.choice([-1, 1, 2**20, 2**39, -file["bytes"]]))
        case 1:
            file["sha256"] = f"{rng.getrandbits(256):064x}"
        case _:
            file["sha256"] = rng.choice(["", "0" * 63, file["sha256"].upper() + "G", "g" * 64, "0" * 65])
    return str(file)


@edit
def disagree(rng: random.Random, manifest: Any) -> str:
    model, parts = manifest["model"], manifest["parts"]
    changes: list[tuple[Any, Any, Any]] = [
        (manifest, "schema_version", rng.choice([0, 2, 99, -1, "1", 1.5, True, None, 2**70])),
        (manifest, "target", rng.choice(["ONNX", "tflite", ""])),
        (manifest, "image", None),
        (manifest["prompt"], "tokenizer", "golden/none.json"),
        (manifest["golden"][0], "part", "generator"),
        (manifest["conversations"][0], "image", "golden/none.png"),
        (manifest["conversations"][0], "answer_ids", [rng.choice([40, 2**31 - 1])]),
        (manifest["conversations"][0], "input_ids", [1] * 64),
        (manifest["prompt"]["examples"][0], "input_ids", [41]),
        (manifest["image"], "height", 8),
        (manifest["image"], "strategy", "crop"),
        (manifest["image"], "shortest_edge", 4),
        (manifest["image"], "pad_color", [0, 0, 256]),
        (manifest["image"], "position_grid", [3, 1]),
        (parts["decoder"], "file", "parts/embed.onnx"),
        (parts["decoder"], "file", "parts/decoder.onnx.data"),
        (parts["decoder"], "files", ["parts/decoder.onnx"]),
        (parts["decoder"], "files", ["parts/decoder.onnx"] * 2),
        (parts["vision"], "files", ["parts/vision.onnx", "golden/image.png"]),
        (parts["vision"]["inputs"][0], "dtype", rng.choice(["float32", "int64", "float64"])),
        (parts["vision"]["inputs"][0], "shape", rng.choice([[1, 3, 4, 4], ["n", 3, 5, 4], ["n", 3, 4], []])),
        (parts["decoder"]["outputs"][0], "shape", ["batch", "n", 41]),
        (parts["decoder"]["outputs"][0], "name", "logit"),
        (parts["decoder"]["inputs"][1], "name", "mask"),
        (parts["decoder"]["inputs"][3], "shape", ["batch", 2, "past", 9]),
        (parts["decoder"]["inputs"][4], "name", parts["decoder"]["inputs"][3]["name"]),
        (manifest, "parts", {name: parts[name] for name in rng.sample(list(parts), rng.randrange(3))}),
    ]
    changes += [
        (model, key, rng.choice(values))
        for key, values in {
            "num_layers": [1, 3, 1000],
            "hidden_size": [1, 31, 64],
            "vocab_size": [1, 41, 2**20],
            "num_key_value_heads": [1, 3, 4],
            "num_attention_heads": [3, 5],
            "head_dim": [1, 9],
            "num_image_tokens": [0, 64, 2**20],
            "context_length": [1, 4, 9],
            "eos_token_ids": [[40], [1, 2**31 - 1]],
            "bos_token_id": [40],
            "pad_token_id": [40, 2**31 - 1],
        }.items()
    ]
    where, key, value = rng.choice(changes)
    where[key] = value
    return f"{key}: {value!r}"


def garble(rng: random.Random, folder: Path) -> str:
    """A manifest that is no JSON, or another JSON than is meant."""
    path = folder / "manifest.json"
    data = path.read_bytes()
    text = data.decode()
    number = rng.choice(
        ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000, "0x1", "01", "1_0", "+1", "1."]
    )
    key = rng.choice(['"cosine": 0.99999', '"head_dim": 8', '"floor_db": 40.5'])
    pieces = {
        "number": text.replace(key, f"{key.split(':')[0]}: {number}").encode(),
        "free number": text.replace('"benchmarks": []', f'"benchmarks": [{{"x": {number}}}]').encode(),
        "twice": text.replace('"target"', '"target": "onnx", "target"').encode(),
        "twice inside": text.replace('"head_dim"', '"head_dim": 8, "head_dim"').encode(),
        "deep array": text.replace(
            '"benchmarks": []', '"benchmarks": [{"x": ' + "[" * 100_000 + "]" * 100_000 + "}]"
        ).encode(),
        "deep object": text.replace(
            '"benchmarks": []', '"benchmarks": [' + '{"a":' * 80 + "1" + "}" * 80 + "]"
        ).encode(),
        "only brackets": rng.choice([b"[", b'{"a":']) * 50_000,
        "utf-16": text.encode("utf-16"),
        "utf-32": text.encode("utf-32-le"),
        "utf-16 without mark": text.encode("utf-16-be"),
        "byte order mark": b"\xef\xbb\xbf" + data,
        "latin-1": text.replace("tiny", "tin\xfd").encode("latin-1"),
        "half a surrogate": text.replace("tiny", "\\ud800").encode(),
        "control character": text.replace("tiny", "ti\x07ny").encode(),
        "nul": data + b"\0",
        "nul first": b"\0" + data,
        "two values": data + data,
        "comment": b"// a comment\n" + data,
        "trailing comma": text.rstrip()[:-1].encode() + b",}",
        "single quotes": text.replace('"', "'").encode(),
        "another type": rng.choice([b"null", b"true", b"[]", b'"x"', b"5", b"{}", b"[{}]"]),
        "nothing": rng.choice([b"", b" ", b"\n" * 100]),
        "random": rng.randbytes(rng.randrange(1, 3000)),
        "too large": b"",
        "open string": b'{"a": "' + b'\\"' * 50_000,
    }
    name = rng.choice(list(pieces))
    assert pieces[name] != data, name
    write_manifest(folder, data + b" " * 2**24 if name == "too large" else pieces[name])
    return f"{name} {number[:20]}"


# --- ONNX parts, all hashes made to fit -------------------------------------------------------------------


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


ALL = ("vision", "embed", "decoder")
DAMAGES: list[tuple[Damage, int]] = [
    (flip_a_bit, 400),
    (cut, 150),
    (lengthen, 50),
    (swap, 60),
    (delete, 30),
    (make_special, 80),
    (add, 50),
    (change_a_type, 150),
    (drop_a_key, 100),
    (add_a_key, 60),
    (change_a_number, 120),
    (change_a_path, 120),
    (list_twice, 30),
    (lie_about_a_file, 60),
    (disagree, 110),
    (garble, 110),
    (rewrite(spoil_values, ALL), 80),
    (rewrite(spoil_hidden_values, ALL), 20),
    (rewrite(lead_outside, ("decoder",)), 40),
    (rewrite(misplace, ("decoder",)), 40),
    (rewrite(misshape, ALL), 40),
    (rewrite(retype, ALL), 20),
    (rewrite(misfit_quantized, ("decoder",)), 20),
    (rewrite(change_operators, ALL), 20),
    (rewrite(change_interface, ALL), 30),
    (spoil_protobuf, 20),
    (shorten_external_data, 10),
]


def test_there_are_two_thousand() -> None:
    assert sum(count for _, count in DAMAGES) >= 2000


@pytest.mark.parametrize(
    ("damage", "count"), DAMAGES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_damaged_bundles_are_refused_in_one_line(
    damage: Damage, count: int, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    rng = random.Random(damage.__name__)
    for number in range(count):
        folder = tmp_path / str(number) / "tiny-onnx"
        shutil.copytree(pristine, folder)
        told = damage(rng, folder)
        try:
            open_bundle(folder)
        except MobileMMError as error:
            line = str(error)
            assert line.isprintable(), (told, line)
            assert str(folder) in line, (told, line)
            assert len(line) - len(str(folder)) < 400, (told, line)
        else:
            pytest.fail(f"{damage.__name__} {number} was not refused: {told}")
        shutil.rmtree(tmp_path / str(number))


def test_what_damages_start_from_is_whole(pristine: Path) -> None:
    """Rehashing alone, which the hostile ones do last, changes nothing."""
    open_bundle(pristine)
    before = (pristine / "manifest.json").read_text()
    rehash(pristine)
    open_bundle(pristine)
    assert json.loads(before) == json.loads((pristine / "manifest.json").read_text())
