"""Damages packages in every way and lets the interpreter read and run them; a process of its own.

    python -m tests.export.mil_interpreter.damage GOOD_PACKAGE FOLDER

prints one JSON object: how many were refused, how many still are programs, what else was raised, how long the
slowest took, and by how many bytes the process grew.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mobilemm.errors import MobileMMError
from mobilemm.export import mil_interpreter
from mobilemm.export.mil_interpreter import compiler
from mobilemm.export.mil_interpreter.protobuf import coreml_protobuf

SPECIFICATION = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
Damage = Callable[[Path], None]
MODEL, MIL = coreml_protobuf()
BILLION = 10**9


def rewrite(relative: str, change: Callable[[bytearray], bytes | bytearray | None]) -> Damage:
    """A change of a file's bytes."""

    def damage(package: Path) -> None:
        data = bytearray((package / relative).read_bytes())
        changed = change(data)
        (package / relative).write_bytes(data if changed is None else changed)

    return damage


def flips(rng: np.random.Generator, relative: str, size: int, count: int, first: int = 0) -> Iterator[Damage]:
    """One to four bits of a file, from byte `first` on."""
    for _ in range(count):
        places = rng.integers(first, size, rng.integers(1, 5)).tolist()
        bits = rng.integers(0, 8, len(places)).tolist()

        def flip(data: bytearray, places: list[int] = places, bits: list[int] = bits) -> None:
            for place, bit in zip(places, bits, strict=True):
                data[place] ^= 1 << bit

        yield rewrite(relative, flip)


def cuts(rng: np.random.Generator, relative: str, size: int, count: int) -> Iterator[Damage]:
    for length in rng.integers(0, size, count).tolist():
        yield rewrite(relative, lambda data, length=length: data[:length])


def edit(change: Callable[[Any], None]) -> Damage:
    """A change of the parsed specification."""

    def damage(package: Path) -> None:
        model = MODEL.Model.FromString((package / SPECIFICATION).read_bytes())
        change(model)
        (package / SPECIFICATION).write_bytes(model.SerializeToString(deterministic=True))

    return damage


def block_of(model: Any) -> Any:
    function = model.mlProgram.functions["main"]
    return function.block_specializations[function.opset]


def found(model: Any, kind: str) -> Any:
    return next(operation for operation in block_of(model).operations if operation.type == kind)


def tensor_type(kind: Any, dtype: str, sizes: tuple[int, ...]) -> None:
    kind.Clear()
    kind.tensorType.dataType = MIL.DataType.Value(dtype)
    kind.tensorType.rank = len(sizes)
    for size in sizes:
        kind.tensorType.dimensions.add().constant.size = size


def constant(value: Any, data: Any) -> None:
    """A constant in the specification itself."""
    if isinstance(data, str):
        tensor_type(value.type, "STRING", ())
        value.immediateValue.tensor.strings.values.append(data)
        return
    array = np.asarray(data)
    dtype = {"i": "INT32", "f": "FLOAT32", "b": "BOOL"}[array.dtype.kind]
    tensor_type(value.type, dtype, array.shape)
    field = {"i": "ints", "f": "floats", "b": "bools"}[array.dtype.kind]
    getattr(value.immediateValue.tensor, field).values.extend(array.reshape(-1).tolist())


def appended(kind: str, declared: tuple[int, ...] = (1,), given: str = "FLOAT32", **arguments: Any) -> Damage:
    """An operation in front of all others; strings that begin with @ are names."""

    def change(model: Any) -> None:
        block = block_of(model)
        operation = MIL.Operation(type=kind)
        for name, data in arguments.items():
            for one in data if isinstance(data, tuple) else (data,):
                binding = operation.inputs[name].arguments.add()
                if isinstance(one, str) and one.startswith("@"):
                    binding.name = one[1:]
                else:
                    constant(binding.value, one)
        output = operation.outputs.add()
        output.name = "bomb"
        tensor_type(output.type, given, declared)
        others = list(block.operations)
        del block.operations[:]
        block.operations.extend([operation, *others])

    return edit(change)


def bombs() -> Iterator[Damage]:
    """Operations whose outputs would be enormous, or that might end a process."""
    row = np.ones(70_000, np.float32)
    picture = np.ones((1, 1, 4, 4), np.float32)
    many = np.array([BILLION, 1], np.int32)
    yield appended("tile", x=np.ones((2, 1), np.float32), reps=many)
    yield appended("fill", shape=many, value=1.0)
    yield appended("fill", (BILLION,), shape=np.array([BILLION], np.int32), value=1.0)
    yield appended("range_1d", start=0, end=BILLION, step=1)
    yield appended("range_1d", start=0.0, end=1e30, step=1e-30)
    yield appended("range_1d", start=0, end=5, step=0)
    yield appended("pad", x=picture, pad=np.array([BILLION, 0], np.int32), mode="constant", constant_val=0.0)
    yield appended(
        "pad", x=picture, pad=np.array([2**30, 2**30], np.int32), mode="replicate", constant_val=0.0
    )
    yield appended("pad", x=picture, pad=np.array([-9, 0], np.int32), mode="constant", constant_val=0.0)
    yield appended("one_hot", indices=np.array([1], np.int32), one_hot_vector_size=BILLION)
    yield appended("upsample_nearest_neighbor", x=picture, scale_factor_height=1e8, scale_factor_width=1e8)
    yield appended("upsample_nearest_neighbor", x=picture, scale_factor_height=float("nan"))
    yield appended("upsample_nearest_neighbor", x=picture, scale_factor_height=0.0)
    yield appended("upsample_bilinear", x=picture, scale_factor_height=1e8, align_corners=True)
    yield appended("resize_bilinear", x=picture, target_size_height=BILLION, target_size_width=1)
    yield appended("resize_bilinear", x=picture, target_size_height=-1, target_size_width=1)
    yield appended("add", x=row[:, None], y=row[None])
    yield appended("select", cond=np.array(True), a=row[:, None], b=row[None])
    yield appended("matmul", x=row[:, None], y=row[None], transpose_x=False, transpose_y=False)
    yield appended("einsum", values=(row, row), equation="a,b->ab")
    yield appended(
        "scaled_dot_product_attention",
        query=row[None, :, None],
        key=row[None, :, None],
        value=row[None, :, None],
    )
    yield appended("gather", x=np.ones((1, 9000), np.float32), indices=np.zeros(20_000, np.int32), axis=0)
    yield appended("gather", x=row, indices=np.array([2**31 - 1], np.int32), axis=0)
    yield appended("gather", x=row, indices=np.array([-(2**31)], np.int32), axis=0)
    yield appended("gather", x=row, indices=np.array([0], np.int32), axis=99)
    yield appended("gather_nd", x=row, indices=np.array([[2**31 - 1]], np.int32))
    yield appended(
        "scatter_nd", data=row, indices=np.array([[2**31 - 1]], np.int32), updates=row[:1], mode="add"
    )
    yield appended("scatter", data=row, indices=np.array([-99_999], np.int32), updates=row[:1], axis=0)
    for name, value in (("strides", 0), ("dilations", 0), ("dilations", BILLION), ("strides", -1)):
        wrong = np.array([value, value], np.int32)
        yield appended("conv", x=picture, weight=np.ones((1, 1, 2, 2), np.float32), **{name: wrong})
        yield appended("conv_transpose", x=picture, weight=np.ones((1, 1, 2, 2), np.float32), **{name: wrong})
    for groups in (0, -1, 7, BILLION):
        yield appended("conv", x=picture, weight=np.ones((1, 1, 2, 2), np.float32), groups=groups)
    for pad in ([BILLION] * 4, [-5] * 4, [1]):
        wrong = np.array(pad, np.int32)
        yield appended(
            "conv", x=picture, weight=np.ones((1, 1, 2, 2), np.float32), pad_type="custom", pad=wrong
        )
        for pool in ("avg_pool", "max_pool", "l2_pool"):
            kernel = np.array([2, 2], np.int32)
            yield appended(pool, x=picture, kernel_sizes=kernel, pad_type="custom", pad=wrong)
    for kernel in ([0, 0], [-1, 2], [BILLION, BILLION], [2]):
        for pool in ("avg_pool", "max_pool", "l2_pool"):
            yield appended(pool, x=picture, kernel_sizes=np.array(kernel, np.int32), pad_type="valid")
    longest = np.array([1, 1, BILLION, BILLION], np.int32)
    yield appended(
        "conv_transpose", x=picture, weight=np.ones((1, 1, 2, 2), np.float32), output_shape=longest
    )
    for name in ("real_div", "floor_div", "mod"):
        yield appended(name, given="INT32", x=np.array([-(2**31)], np.int32), y=np.array([0], np.int32))
    yield appended("pixel_shuffle", x=picture, upscale_factor=0)
    yield appended("pixel_unshuffle", x=picture, downscale_factor=0)
    yield appended("depth_to_space", x=picture, block_size=0)
    yield appended("space_to_depth", x=picture, block_size=0)
    blocks = np.array([2, 2], np.int32)
    yield appended(
        "space_to_batch", x=picture, block_shape=blocks, paddings=np.full((2, 2), BILLION, np.int32)
    )
    yield appended("batch_to_space", x=picture, block_shape=blocks * 0, crops=np.zeros((2, 2), np.int32))
    yield appended("sliding_windows", x=np.ones((1, 30_000), np.float32), axis=1, size=15_000, stride=1)
    yield appended("sliding_windows", x=picture, axis=1, size=-1, stride=0)
    yield appended("reshape", x=row, shape=np.array([-1, -1], np.int32))
    yield appended("reshape", x=row, shape=np.array([2**31 - 1] * 8, np.int32))
    yield appended("expand_dims", x=row, axes=np.arange(200, dtype=np.int32))
    yield appended("transpose", x=picture, perm=np.array([0, 0, 1, 9], np.int32))
    yield appended("split", x=row, num_splits=0, axis=0)
    yield appended("split", x=row, split_sizes=np.array([BILLION], np.int32), axis=0)
    yield appended("concat", values=(), axis=0)
    yield appended("stack", values=(row, picture), axis=0)
    yield appended("topk", x=row, k=BILLION, axis=0)
    yield appended("topk", x=row, k=-1, axis=0)
    yield appended("make_list", init_length=BILLION, elem_shape=np.array([1], np.int32), dtype="fp32")
    yield appended("softmax", x=row, axis=BILLION)
    yield appended("cumsum", x=row, axis=-9)
    yield appended("linear", x=row, weight=picture)
    yield appended("layer_norm", x=picture, axes=np.array([7], np.int32))
    yield appended("batch_norm", x=picture, mean=row, variance=row)
    yield appended("local_response_norm", x=picture, size=BILLION)
    yield appended(
        "slice_by_size", x=row, begin=np.array([2**31 - 1], np.int32), size=np.array([5], np.int32)
    )
    yield appended("slice_by_index", x=row, begin=np.array([0], np.int32), end=np.array([5, 5], np.int32))
    yield appended(
        "slice_by_index",
        x=row,
        begin=np.array([0], np.int32),
        end=np.array([5], np.int32),
        stride=np.array([0], np.int32),
    )
    yield appended(
        "slice_update", x=row, update=picture, begin=np.array([0], np.int32), end=np.array([5], np.int32)
    )
    yield appended(
        "crop", x=picture, crop_height=np.array([9, 9], np.int32), crop_width=np.array([1], np.int32)
    )
    yield appended("reverse_sequence", x=picture, lengths=np.array([BILLION], np.int32))
    yield appended("quantize", x=row, scale=0.0, output_dtype="int8")
    yield appended("quantize", input=row, scale=row[:5], output_dtype="float")
    yield appended("cast", x=row, dtype="complex")
    yield appended("gelu", x=row, mode="NO SUCH")
    yield appended(
        "constexpr_lut_to_dense", indices=np.array([5], np.int32), lut=np.ones((1, 2, 1), np.float32)
    )
    yield appended("constexpr_blockwise_shift_scale", data=row, scale=row[:33])
    yield appended("constexpr_cast", source_val="@x", output_dtype="fp32")
    yield appended(
        "resample",
        x=picture,
        coordinates=np.ones((1, 1, 1, 9), np.float32),
        sampling_mode="bilinear",
        padding_mode="constant",
        padding_value=0.0,
        coordinates_mode="unnormalized",
        align_corners=True,
    )


def doubled(model: Any) -> None:
    """A value joined with itself forty times."""
    block = block_of(model)
    last, new = "x", []
    for i in range(40):
        operation = MIL.Operation(type="concat")
        for _ in range(2):
            operation.inputs["values"].arguments.add().name = last
        constant(operation.inputs["axis"].arguments.add().value, np.int32(0))
        constant(operation.inputs["interleave"].arguments.add().value, np.bool_(False))
        last = f"double_{i}"
        output = operation.outputs.add()
        output.name = last
        output.type.tensorType.dataType = MIL.DataType.Value("FLOAT16")
        output.type.tensorType.rank = 2
        output.type.tensorType.dimensions.add().unknown.variadic = False
        output.type.tensorType.dimensions.add().constant.size = 64
        new.append(operation)
    block.operations.extend(new)


def hoarded(model: Any) -> None:
    """Many large values, all of them alive to the end."""
    block = block_of(model)
    for i in range(40):
        operation = MIL.Operation(type="fill")
        constant(operation.inputs["shape"].arguments.add().value, np.array([2**23], np.int32))
        constant(operation.inputs["value"].arguments.add().value, np.float32(1))
        output = operation.outputs.add()
        output.name = f"hoard_{i}"
        tensor_type(output.type, "FLOAT32", (2**23,))
        block.operations.append(operation)
    last = MIL.Operation(type="concat")
    for i in range(40):
        last.inputs["values"].arguments.add().name = f"hoard_{i}"
    constant(last.inputs["axis"].arguments.add().value, np.int32(0))
    tensor_type(last.outputs.add(name="all").type, "FLOAT32", (40 * 2**23,))
    block.operations.append(last)


def endless(model: Any) -> None:
    operation = MIL.Operation(type="while_loop")
    constant(operation.inputs["loop_vars"].arguments.add().value, np.int32(0))
    for name in ("condition", "body"):
        block = operation.blocks.add()
        value = block.inputs.add(name=f"{name}_input")
        tensor_type(value.type, "INT32", ())
        made = block.operations.add(type="equal" if name == "condition" else "add")
        made.inputs["x"].arguments.add().name = value.name
        made.inputs["y"].arguments.add().name = value.name
        tensor_type(
            made.outputs.add(name=f"{name}_output").type, "BOOL" if name == "condition" else "INT32", ()
        )
        block.outputs.append(f"{name}_output")
    tensor_type(operation.outputs.add(name="never").type, "INT32", ())
    block_of(model).operations.append(operation)


def structures() -> Iterator[Damage]:
    """Programs that do not hold together."""

    def set_to(path: str, kind: str, value: Any) -> Damage:
        def change(model: Any) -> None:
            *steps, last = path.split(".")
            target = found(model, kind)
            for step in steps:
                target = target[int(step)] if step.isdecimal() else getattr(target, step)
            setattr(target, last, value)

        return edit(change)

    def blob(change: Callable[[Any], None]) -> Damage:
        def apply(model: Any) -> None:
            for operation in block_of(model).operations:
                if operation.attributes["val"].WhichOneof("value") == "blobFileValue":
                    change(operation.attributes["val"])
                    return

        return edit(apply)

    for offset in (0, 1, 63, 100, 64 * 10**6, 2**40, 2**63, 2**64 - 64, 2**64 - 1):
        yield blob(lambda value, offset=offset: setattr(value.blobFileValue, "offset", offset))
    for name in (
        "",
        "/etc/passwd",
        "@model_path/../../../../../etc/passwd",
        "@model_path/weights",
        "weight.bin",
        "@model_path/weights/none.bin",
        "@model_path//etc/passwd",
        "@model_path/./weights/weight.bin",
        "@model_path/weights/weight.bin\0",
        "@model_path/model.mlmodel",
        "a" * 10_000,
    ):
        yield blob(lambda value, name=name: setattr(value.blobFileValue, "fileName", name))
    for sizes in ((2**31,), (2**62, 4), (2**63,), (65536, 65536), (BILLION,), (3, 3), (0,), (1,) * 40):
        yield blob(lambda value, sizes=sizes: tensor_type(value.type, "FLOAT16", sizes))
    for dtype in ("FLOAT32", "INT8", "STRING", "INT64", "BFLOAT16", "UINT1"):
        yield blob(
            lambda value, dtype=dtype: setattr(value.type.tensorType, "dataType", MIL.DataType.Value(dtype))
        )
    yield blob(lambda value: setattr(value.type.tensorType, "dataType", 999))
    yield blob(lambda value: value.type.Clear())
    yield blob(lambda value: value.ClearField("blobFileValue"))
    yield set_to("type", "linear", "no_such_operation")
    yield set_to("type", "linear", "random_normal")
    yield set_to("type", "linear", "")
    yield set_to("type", "linear", "x\n\x1b[31m" * 50)
    yield set_to("type", "read_state", "write_state")
    yield set_to("type", "write_state", "read_state")
    yield edit(
        lambda model: found(model, "linear").inputs["no_such"].CopyFrom(found(model, "linear").inputs["x"])
    )
    for name in ("x", "weight"):
        yield edit(lambda model, name=name: found(model, "linear").inputs.pop(name))
        yield edit(lambda model, name=name: found(model, "linear").inputs[name].arguments.add())
    yield edit(lambda model: setattr(found(model, "linear").inputs["x"].arguments[0], "name", "undefined"))
    yield edit(lambda model: setattr(found(model, "linear").inputs["x"].arguments[0], "name", "memory"))
    yield edit(  # its own output
        lambda model: setattr(
            found(model, "linear").inputs["x"].arguments[0], "name", found(model, "linear").outputs[0].name
        )
    )
    yield edit(  # what only comes later
        lambda model: setattr(
            found(model, "linear").inputs["x"].arguments[0], "name", block_of(model).outputs[0]
        )
    )
    yield edit(lambda model: setattr(found(model, "linear").outputs[0], "name", "x"))
    yield edit(lambda model: setattr(found(model, "linear").outputs[0], "name", ""))
    yield edit(lambda model: found(model, "linear").outputs.add())
    yield edit(lambda model: found(model, "linear").outputs.pop())
    yield edit(lambda model: tensor_type(found(model, "linear").outputs[0].type, "FLOAT16", (BILLION, 7)))
    yield edit(lambda model: tensor_type(found(model, "linear").outputs[0].type, "FLOAT16", (1, 2**33)))
    yield edit(lambda model: tensor_type(found(model, "linear").outputs[0].type, "STRING", (1, 64)))
    yield edit(lambda model: block_of(model).outputs.append("undefined"))
    yield edit(lambda model: block_of(model).outputs.pop())
    yield edit(lambda model: block_of(model).ClearField("operations"))
    yield edit(lambda model: block_of(model).inputs.add(name="more"))
    yield edit(lambda model: model.mlProgram.functions.pop("main"))
    yield edit(lambda model: setattr(model.mlProgram.functions["main"], "opset", "none"))
    yield edit(lambda model: model.mlProgram.functions["other"].CopyFrom(model.mlProgram.functions["main"]))
    yield edit(lambda model: model.mlProgram.functions["main"].inputs.pop())
    yield edit(lambda model: model.mlProgram.functions["main"].inputs.add(name="more"))
    for side in ("input", "output", "state"):
        yield edit(lambda model, side=side: getattr(model.description, side).pop())
        yield edit(lambda model, side=side: setattr(getattr(model.description, side)[0], "name", "other"))
    yield edit(lambda model: model.description.input[0].type.dictionaryType.SetInParent())
    yield edit(lambda model: model.neuralNetwork.SetInParent())
    yield edit(lambda model: model.ClearField("mlProgram"))
    for sizes in ((2**40, 2**40), (2**63, 2), (BILLION, 64), (0, 64)):
        yield edit(
            lambda model, sizes=sizes: [
                tensor_type(one.type.stateType.wrappedType, "FLOAT16", sizes)
                for one in model.mlProgram.functions["main"].inputs
                if one.name == "memory"
            ]
        )
    yield edit(doubled)
    yield edit(hoarded)
    yield edit(endless)
    for blocks in (0, 1, 3):

        def branches(model: Any, blocks: int = blocks) -> None:
            operation = block_of(model).operations.add(type="cond")
            constant(operation.inputs["pred"].arguments.add().value, np.bool_(True))
            for _ in range(blocks):
                operation.blocks.add()

        yield edit(branches)


def files() -> Iterator[Damage]:
    """Missing files, links, and other things in their places; manifests."""
    everything = ("Manifest.json", SPECIFICATION, WEIGHTS)
    for relative in everything:
        yield lambda package, relative=relative: (package / relative).unlink()
        yield rewrite(relative, lambda data: b"")
        yield rewrite(relative, lambda data: bytes(np.random.default_rng(len(data)).bytes(len(data))))

        def link(package: Path, relative: str = relative) -> None:
            moved = package.parent / "moved"
            shutil.move(package / relative, moved)
            (package / relative).symlink_to(moved)

        yield link

        def folder(package: Path, relative: str = relative) -> None:
            (package / relative).unlink()
            (package / relative).mkdir()

        yield folder

        def pipe(package: Path, relative: str = relative) -> None:
            (package / relative).unlink()
            os.mkfifo(package / relative)

        yield pipe

        def enormous(package: Path, relative: str = relative) -> None:
            with (package / relative).open("r+b") as opened:
                opened.seek(0)
                opened.write(b"\0" * 512)
                opened.truncate(2**33)

        yield enormous
    for relative in ("Data", "Data/com.apple.CoreML", "Data/com.apple.CoreML/weights"):

        def linked(package: Path, relative: str = relative) -> None:
            moved = package.parent / "moved"
            shutil.move(package / relative, moved)
            (package / relative).symlink_to(moved)

        yield linked
    for path in (
        "../../etc/passwd",
        "/etc/passwd",
        "",
        ".",
        "a/../b",
        "com.apple.CoreML",
        7,
        None,
        [],
        "x\0y",
        "com.apple.CoreML/weights/weight.bin",
    ):

        def other(data: bytearray, path: object = path) -> bytes:
            manifest = json.loads(data)
            manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = path
            return json.dumps(manifest).encode()

        yield rewrite("Manifest.json", other)
    for text in (
        "[]",
        "{}",
        "null",
        "1",
        '"x"',
        "[" * 100_000,
        '{"rootModelIdentifier": []}',
        "\xff",
        "{" * 5000,
    ):
        yield rewrite("Manifest.json", lambda data, text=text: text.encode("latin-1"))
    # Fields nested deeper than any program, and millions of empty operations.
    nested = b""
    for _ in range(3000):
        nested = field(3, nested)
    yield rewrite(SPECIFICATION, lambda data: nested)

    block = b"\x1a\x00" * 4_000_000
    function = field(2, b"CoreML8") + field(3, field(1, b"CoreML8") + field(2, block))
    flood = b"\x08\x09" + field(502, field(2, field(1, b"main") + field(2, function)))
    yield rewrite(SPECIFICATION, lambda data: flood)


def field(number: int, content: bytes) -> bytes:
    """A protobuf field of bytes."""
    head = b""
    for value in (number << 3 | 2, len(content)):
        while value > 127:
            head, value = head + bytes([value & 127 | 128]), value >> 7
        head += bytes([value])
    return head + content


def damages(good: Path) -> Iterator[Damage]:
    rng = np.random.default_rng(0)
    specification, weights = ((good / name).stat().st_size for name in (SPECIFICATION, WEIGHTS))
    yield from files()
    yield from structures()
    yield from bombs()
    yield from cuts(rng, SPECIFICATION, specification, 120)
    yield from cuts(rng, WEIGHTS, weights - 64, 40)
    yield from cuts(rng, "Manifest.json", (good / "Manifest.json").stat().st_size, 30)
    yield from flips(rng, SPECIFICATION, specification, 300)
    yield from flips(rng, WEIGHTS, 64 + 32, 60, first=64)  # the header of the first weight


def main(good: Path, folder: Path) -> dict[str, Any]:
    compiler.MOST_LOOPED_OPERATIONS = 20_000
    edit(lambda model: None)(good)  # which puts it in an order that is the same each time
    run(good)  # so that what PyTorch takes at first is not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, sound, wrong, slowest = 0, 0, [], 0.0
    for number, damage in enumerate(damages(good)):
        package = folder / str(number) / "m.mlpackage"
        shutil.copytree(good, package)
        begun = time.perf_counter()
        try:
            damage(package)
            begun = time.perf_counter()
            run(package)
            sound += 1
        except MobileMMError as error:
            refused += 1
            if "\n" in str(error) or not str(error):
                wrong.append(f"{number}: not one line: {error!r}")
        except Exception as error:
            wrong.append(f"{number}: {type(error).__name__}: {error}")
        slowest = max(slowest, time.perf_counter() - begun)
        shutil.rmtree(package.parent)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"refused": refused, "sound": sound, "wrong": wrong, "slowest": slowest, "grown": grown}


def run(package: Path) -> None:
    """Loads a package and runs its functions once, with whatever inputs it asks for."""
    model = mil_interpreter.load(package)
    for function in model.functions:
        inputs = {
            feature.name: np.ones([size or 1 for size in feature.shape], feature.dtype)
            for feature in model.inputs(function)
            if np.prod([size or 1 for size in feature.shape], dtype=float) < 1e6
        }
        model(inputs, function, model.make_state())


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
