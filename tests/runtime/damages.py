"""What is done to a whole bundle: to its files, and to its manifest with a hash made to fit."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mobilemm.runtime.bundle import MANIFEST_SHA256
from mobilemm.runtime.manifest import Manifest
from tests.runtime.tiny_bundle import write_manifest

# Changes a bundle's folder as the generator draws, and says what it has changed.
Damage = Callable[[random.Random, Path], str]


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
