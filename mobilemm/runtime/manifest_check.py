"""From the bytes of a `manifest.json`, which may come from anyone, to a `Manifest` that holds together."""

from __future__ import annotations

import json
import math
import re
import struct
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mobilemm.errors import MobileMMError
from mobilemm.runtime.manifest import (
    PATH_PATTERN,
    SCHEMA_VERSION,
    Generation,
    Manifest,
    Part,
    Schedule,
    Tensor,
)

LARGEST_MANIFEST = 16 * 2**20
DEEPEST = 64
AGAIN = "export the bundle or pull it again"


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """The manifest in these bytes of the file `path`, checked for types, ranges, paths and agreement.

    Raises MobileMMError, one line that names the file, the key, what is wrong, and the way out.
    """
    value = _load_json(data, path)
    if not isinstance(value, dict):
        raise MobileMMError(f"{path}: must hold a JSON object, not {shown(value)}; {AGAIN}")
    version = value.get("schema_version")
    if type(version) is int and version > SCHEMA_VERSION:
        raise MobileMMError(
            f"{path}: key 'schema_version': format version {shown(version)} is newer than this mobilemm reads"
            f" ({SCHEMA_VERSION}); update it: pip install -U mobilemm"
        )
    if type(version) is int and version < SCHEMA_VERSION:
        raise MobileMMError(
            f"{path}: key 'schema_version': format version {shown(version)} is older than this mobilemm reads"
            f" ({SCHEMA_VERSION}); export the model again"
        )
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise MobileMMError(f"{path}: {_first_error(error)}; {AGAIN}") from None
    for key, wrong in _disagreements(manifest):
        raise MobileMMError(f"{path}: key {key!r}: {wrong}; {AGAIN}")
    return manifest


def shown(value: object, most: int = 60) -> str:
    """A stranger's value as part of a one-line message: short, and nothing in it that moves a terminal."""
    if isinstance(value, int) and abs(value) >= 10**most:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, dict | list):
        return {dict: "an object", list: "an array"}[type(value)]
    text = ascii(value[: most + 1] if isinstance(value, str) else value)
    return text if len(text) <= most else f"{text[:most]}…"


def _load_json(data: bytes, path: Path) -> Any:
    if len(data) > LARGEST_MANIFEST:
        raise MobileMMError(f"{path}: larger than {LARGEST_MANIFEST // 2**20} MB; {AGAIN}")
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise MobileMMError(f"{path}: begins with a byte order mark; it must be plain UTF-8; {AGAIN}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"key {shown(key)} stands there twice")
            found[key] = value
        return found

    def finite(text: str) -> float:
        if not math.isfinite(number := float(text)):
            raise ValueError(f"{shown(text)} is no finite number")
        return number

    try:
        text = data.decode()
        if _depth(text) > DEEPEST:
            raise ValueError(f"nested deeper than {DEEPEST} levels")
        return json.loads(text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
    except UnicodeDecodeError as error:
        raise MobileMMError(f"{path}: is not UTF-8 (byte {error.start}); {AGAIN}") from None
    except ValueError as error:  # JSONDecodeError is one too, and numbers of thousands of digits
        raise MobileMMError(f"{path}: is not valid JSON ({error}); {AGAIN}") from None


def _depth(text: str) -> int:
    """How deep brackets are nested, up to one over the limit and those in strings apart."""
    depth = deepest = 0
    for found in re.finditer(r'"(?:[^"\\]|\\.)*+"?|[\[{\]}]', text, flags=re.DOTALL):
        if found[0] in "[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > DEEPEST:
                break
        elif found[0] in "]}":
            depth -= 1
    return deepest


def _first_error(error: ValidationError) -> str:
    found = error.errors(include_url=False)
    first = found[0]
    # Of the branches of a union, pydantic names each, as a last component that is no key.
    keys = [str(key) for key in first["loc"] if not re.search(r"[\[(-]", str(key))]
    key = shown(".".join(keys) or "(the whole)", 100)
    value = first.get("input")
    match first["type"]:
        case "json_invalid":  # what Python's parser let pass: half a surrogate
            return f"is not valid JSON ({' '.join(first['msg'].split())[:120]})"
        case "missing":
            wrong = "is missing"
        case "extra_forbidden":
            wrong = "is not known in this format version"
        case "string_pattern_mismatch" if first.get("ctx", {}).get("pattern") == PATH_PATTERN:
            wrong = f"{shown(value)} is no plain path inside the bundle (letters, digits and . _ + - / only)"
        case "too_long" | "too_short":
            bounds = first["ctx"]
            least, most = bounds.get("min_length"), bounds.get("max_length")
            wanted = f"at most {most}" if least is None else f"at least {least}"
            wrong = f"has {bounds['actual_length']} elements, where {wanted} are expected"
        case _:
            message = first["msg"][:1].lower() + first["msg"][1:]
            wrong = f"{' '.join(message.split())[:120]}, not {shown(value)}"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"key {key}: {wrong}{more}"


def _disagreements(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Key and fault of what the types cannot say."""
    yield from _file_faults(manifest)
    yield from _model_faults(manifest)
    yield from _text_faults(manifest)
    yield from _drawing_faults(manifest)
    if manifest.target == "onnx":
        yield from _onnx_faults(manifest)
    elif manifest.target == "executorch":
        yield from _executorch_faults(manifest)


def _file_faults(manifest: Manifest) -> Iterator[tuple[str, str]]:
    listed: dict[str, str] = {}
    for index, file in enumerate(manifest.files):
        key = f"files.{index}.path"
        folded = unicodedata.normalize("NFC", file.path).casefold()
        if folded in ("manifest.json", "manifest.json.sha256"):
            yield key, "the manifest cannot list itself"
        if folded in listed:
            yield key, f"{shown(file.path)} and {shown(listed[folded])} are one file on some phones"
        listed[folded] = file.path
    sizes = {file.path: file.bytes for file in manifest.files}

    def known(key: str, path: str) -> Iterator[tuple[str, str]]:
        if path not in sizes:
            yield key, f"{shown(path)} is not listed under 'files'"

    if not manifest.parts:
        yield "parts", "there is none"
    for name, part in manifest.parts.items():
        key = f"parts.{shown(name)[1:-1]}"
        for index, path in enumerate(part.files):
            yield from known(f"{key}.files.{index}", path)
        if len(set(part.files)) < len(part.files):
            yield f"{key}.files", "a file stands there twice"
        # An .mlpackage is a folder, and all of its files must be the part's.
        package = manifest.target == "coreml" and all(path.startswith(f"{part.file}/") for path in part.files)
        if part.file not in part.files and not package:
            yield f"{key}.file", f"{shown(part.file)} is not among the part's 'files'"
        total = sum(sizes.get(path, 0) for path in part.files)
        if part.bytes != total:
            yield f"{key}.bytes", f"is {part.bytes}, but the part's files have {total}"
        for side, tensors in (("inputs", part.inputs), ("outputs", part.outputs)):
            if len({tensor.name for tensor in tensors}) < len(tensors):
                yield f"{key}.{side}", "two have one name"
    yield from known("prompt.tokenizer", manifest.prompt.tokenizer)
    for index, golden in enumerate(manifest.golden):
        yield from known(f"golden.{index}.file", golden.file)
        if golden.part not in manifest.parts:
            yield f"golden.{index}.part", f"there is no part {shown(golden.part)}"
    for index, conversation in enumerate(manifest.conversations):
        if conversation.image is not None:
            yield from known(f"conversations.{index}.image", conversation.image)
            if manifest.image is None:
                yield f"conversations.{index}.image", "the bundle takes no pictures (key 'image' is null)"


def _model_faults(manifest: Manifest) -> Iterator[tuple[str, str]]:
    model, image = manifest.model, manifest.image
    if model.num_attention_heads % model.num_key_value_heads:
        yield "model.num_key_value_heads", f"does not divide the {model.num_attention_heads} attention heads"
    if image is None:
        return
    if not 1 <= model.num_image_tokens < model.context_length:
        yield (
            "model.num_image_tokens",
            f"is {model.num_image_tokens}; a picture must leave room in a context of {model.context_length}",
        )
    if (image.strategy == "crop") != (image.shortest_edge is not None):
        yield "image.shortest_edge", 'must be given with the strategy "crop" and with no other'
    if image.shortest_edge is not None and image.shortest_edge < max(image.height, image.width):
        yield "image.shortest_edge", f"is less than what is cut out ({image.height} × {image.width})"
    if image.position_grid is not None and math.prod(image.position_grid) != model.num_image_tokens:
        yield "image.position_grid", f"is not that of {model.num_image_tokens} image tokens"


def _text_faults(manifest: Manifest) -> Iterator[tuple[str, str]]:
    model = manifest.model
    # A placeholder may stand outside of the vocabulary: `embed` replaces it by the picture's tokens.
    written = {model.image_token_id}
    tokens: list[tuple[str, list[int], set[int]]] = [
        ("model.bos_token_id", [] if model.bos_token_id is None else [model.bos_token_id], set()),
        ("model.eos_token_ids", model.eos_token_ids, set()),
        ("model.pad_token_id", [model.pad_token_id], set()),
    ]
    for index, example in enumerate(manifest.prompt.examples):
        tokens.append((f"prompt.examples.{index}.input_ids", example.input_ids, written))
    for index, conversation in enumerate(manifest.conversations):
        tokens.append((f"conversations.{index}.input_ids", conversation.input_ids, written))
        tokens.append((f"conversations.{index}.answer_ids", conversation.answer_ids, set()))
        length = len(conversation.input_ids) + len(conversation.answer_ids)
        if length > model.context_length:
            yield f"conversations.{index}", f"{length} tokens do not fit a context of {model.context_length}"
    for key, ids, others in tokens:
        for token in ids:
            if token >= model.vocab_size and token not in others:
                yield key, f"token {token} is not in a vocabulary of {model.vocab_size}"


def _onnx_faults(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Whether the parts' tensors are those of the ONNX contract, in the model's sizes."""
    model, image = manifest.model, manifest.image
    for name, part in manifest.parts.items():
        if not part.file.endswith(".onnx"):
            yield f"parts.{shown(name)[1:-1]}.file", "must be an .onnx file in a bundle for onnx"
    wanted = ["embed", "decoder"] if image is None else ["vision", "embed", "decoder"]
    for name in wanted:
        if name not in manifest.parts:
            yield "parts", f"the part {name!r} is missing"
            return
    if image is None and "vision" in manifest.parts:
        yield "image", "is null, but there is a part 'vision'"
    hidden = model.hidden_size
    if image is not None:
        vision = manifest.parts["vision"]
        pixels = (None, 3, image.height, image.width)
        yield from _tensor_faults("vision", vision, "inputs", "pixels", pixels, ("uint8",))
        yield from _tensor_faults("vision", vision, "outputs", "image_features", (None, hidden))
        yield from _tensor_faults(
            "embed", manifest.parts["embed"], "inputs", "image_features", (None, hidden)
        )
    embed, decoder = manifest.parts["embed"], manifest.parts["decoder"]
    yield from _tensor_faults("embed", embed, "inputs", "input_ids", (None, None), ("int64", "int32"))
    yield from _tensor_faults("embed", embed, "outputs", "inputs_embeds", (None, None, hidden))
    yield from _tensor_faults("decoder", decoder, "inputs", "inputs_embeds", (None, None, hidden))
    yield from _tensor_faults("decoder", decoder, "outputs", "logits", (None, None, model.vocab_size))
    cache = (None, model.num_key_value_heads, None, model.head_dim)
    for side, form in (("inputs", "past_key_values.{}.{}"), ("outputs", "present.{}.{}")):
        names = [form.format(layer, kind) for layer in range(model.num_layers) for kind in ("key", "value")]
        stem = form.split(".")[0] + "."
        found = {tensor.name for tensor in getattr(decoder, side) if tensor.name.startswith(stem)}
        if found != set(names):
            yield (
                f"parts.decoder.{side}",
                f"keys and values of {len(found) / 2:g} layers, where the model has {model.num_layers}",
            )
            return
        for name in names:
            yield from _tensor_faults("decoder", decoder, side, name, cache, (*FLOATS, "int8"))


def _drawing_faults(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Whether what draws is there, whole, and of one size throughout."""
    generation, model = manifest.generation, manifest.model
    if generation is None:
        return
    stepwise = generation.schedules is not None
    for name in ("output_projector", *(STEPWISE if stepwise else ("generator",))):
        if name not in manifest.parts:
            yield "generation", f"the part {name!r} is missing"
            return
    for name in ("generator",) if stepwise else STEPWISE:
        if name in manifest.parts:
            yield "generation.schedules", f"{'are' if stepwise else 'miss'}, but there is a part {name!r}"
    signals = generation.signal_token_ids
    if signals[-1] >= model.vocab_size or signals != list(range(signals[0], signals[0] + len(signals))):
        yield "generation.signal_token_ids", "must follow each other, inside the vocabulary"
    if math.prod(generation.noise.shape) > MOST_NOISE:
        yield "generation.noise.shape", f"has more than {MOST_NOISE:,} numbers"
    projector = manifest.parts["output_projector"]
    known = {tensor.name: tensor.shape for tensor in (*projector.inputs, *projector.outputs)}
    words = known.get("signal_logits", [])[-1:]
    if not words or not isinstance(words[0], int) or words[0] > model.vocab_size:
        yield (
            "parts.output_projector.inputs",
            "'signal_logits' must end in some of the vocabulary's words",
        )
        return
    condition = known.get("condition", [])
    if not condition or not all(isinstance(size, int) for size in condition):
        yield "parts.output_projector.outputs", "'condition' must have a fixed shape"
        return
    fixed = tuple(size for size in condition if isinstance(size, int))
    logits = {"signal_logits": (1, len(signals), words[0])}
    yield from _interface_faults(manifest, "output_projector", logits, {"condition": fixed})
    picture = {"picture": (1, 3, generation.height, generation.width)}
    if generation.schedules is None:
        inputs = {"condition": fixed, "noise": tuple(generation.noise.shape)}
        yield from _interface_faults(manifest, "generator", inputs, picture)
        return
    yield from _schedule_faults(generation, generation.schedules)
    latents = (1, *generation.noise.shape[2:])
    inputs = {"latents": latents, "condition": fixed, "noise": latents, "scales": (5,)}
    yield from _interface_faults(manifest, "denoiser", inputs, {"next_latents": latents})
    yield from _interface_faults(manifest, "image_decoder", {"latents": latents}, picture)


def _schedule_faults(generation: Generation, schedules: list[Schedule]) -> Iterator[tuple[str, str]]:
    """Whether there is one for each number of steps, and noise for all."""
    counts = [len(rows) for rows in schedules]
    if generation.steps not in counts or len(set(counts)) < len(counts):
        yield "generation.schedules", f"must be one for each number of steps, {generation.steps} among them"
        return
    # In float32, which is what sessions count in: a small number may be 0 there.
    noises = {len(rows): 1 + sum(_float32(row[4]) != 0 for row in rows) for rows in schedules}
    shape = generation.noise.shape
    if len(shape) != 5 or shape[:2] != [1, noises[generation.steps]]:
        wanted = f"(1, {noises[generation.steps]}, channels, height, width)"
        yield "generation.noise.shape", f"is {shown(str(tuple(shape)))}, where {wanted} is expected"
    elif max(noises.values()) * math.prod(shape[2:]) > MOST_NOISE:
        yield "generation.schedules", f"take more than {MOST_NOISE:,} numbers of noise"


def _float32(number: float) -> float:
    found: float = struct.unpack("f", struct.pack("f", number))[0]
    return found


def _executorch_faults(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Whether the parts' tensors are those of the ExecuTorch contract, in the model's sizes."""
    model, image = manifest.model, manifest.image
    for name, part in manifest.parts.items():
        if not part.file.endswith(".pte"):
            yield f"parts.{shown(name)[1:-1]}.file", "must be a .pte file in a bundle for executorch"
    wanted = ["embed", "decoder"] if image is None else ["vision", "embed", "decoder"]
    for name in wanted:
        if name not in manifest.parts:
            yield "parts", f"the part {name!r} is missing"
            return
    hidden, tokens = model.hidden_size, model.num_image_tokens
    if image is not None:
        vision = manifest.parts["vision"]
        yield from _tensor_faults(
            "vision", vision, "inputs", "image", (1, 3, image.height, image.width), ("uint8",)
        )
        yield from _tensor_faults("vision", vision, "outputs", "image_features", (1, tokens, hidden))
    embed, decoder = manifest.parts["embed"], manifest.parts["decoder"]
    yield from _tensor_faults("embed", embed, "inputs", "tokens", (1, None), ("int64",))
    yield from _tensor_faults("embed", embed, "outputs", "inputs_embeds", (1, None, hidden))
    yield from _tensor_faults("decoder", decoder, "inputs", "inputs_embeds", (1, None, hidden))
    yield from _tensor_faults("decoder", decoder, "inputs", "cache_position", (1,), ("int64",))
    if any(tensor.name == "position_ids" for tensor in decoder.inputs):
        yield from _tensor_faults("decoder", decoder, "inputs", "position_ids", (3, 1, None), ("int64",))
    yield from _tensor_faults("decoder", decoder, "outputs", "logits", (1, 1, model.vocab_size))


STEPWISE = ("denoiser", "image_decoder")
FLOATS = ("float32", "float16")
MOST_NOISE = 2**26
"""Numbers that a session makes for one picture; Stable Diffusion's takes 2**16 at 1024 pixels."""


def _interface_faults(
    manifest: Manifest,
    part_name: str,
    inputs: Mapping[str, tuple[int, ...]],
    outputs: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[str, str]]:
    """Whether a part has these tensors of floating-point numbers, and no other."""
    part = manifest.parts[part_name]
    for side, shapes in (("inputs", inputs), ("outputs", outputs)):
        for name, shape in shapes.items():
            yield from _tensor_faults(part_name, part, side, name, shape)
        for tensor in getattr(part, side):
            if tensor.name not in shapes:
                yield f"parts.{part_name}.{side}", f"{shown(tensor.name)} is none that a session knows"


def _tensor_faults(
    part_name: str,
    part: Part,
    side: str,
    name: str,
    sizes: tuple[int | None, ...],
    dtypes: tuple[str, ...] = FLOATS,
) -> Iterator[tuple[str, str]]:
    """Whether a part has this tensor, in this type and shape; None is any dimension."""
    tensors: list[Tensor] = getattr(part, side)
    key = f"parts.{part_name}.{side}"
    tensor = next((tensor for tensor in tensors if tensor.name == name), None)
    if tensor is None:
        yield key, f"{name!r} is missing"
        return
    if tensor.dtype not in dtypes:
        yield key, f"{name!r} is {tensor.dtype}, where {' or '.join(dtypes)} is expected"
    if len(tensor.shape) != len(sizes) or any(
        want is not None and isinstance(have, int) and have != want
        for have, want in zip(tensor.shape, sizes, strict=False)
    ):
        wanted = "(" + ", ".join("any" if size is None else str(size) for size in sizes) + ")"
        yield key, f"{name!r} has the shape {shown(str(tuple(tensor.shape)))}, where {wanted} is expected"
