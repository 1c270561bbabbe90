"""What is written and read in a .mlpackage beside its program: descriptions, metadata, signature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobilemm import __version__
from mobilemm.errors import MobileMMError
from mobilemm.export.decoder_spec import RopeTable
from mobilemm.export.mil_interpreter.features import Feature, read_signature, result_types
from mobilemm.export.mil_interpreter.package import Package
from mobilemm.export.mil_interpreter.program import Constant, read_functions
from mobilemm.runtime import manifest

SPEC_FILE = Path("Data/com.apple.CoreML/model.mlmodel")

PARTS = {
    "vision": "A picture to rows of the language model's embeddings.",
    "embed": "Token ids to the language model's embeddings, pictures' placeholders apart.",
    "decoder": "The language model: embeddings to logits of the next token. `prefill` takes many positions at"
    " once, `decode` one; both write keys and values into the same states.",
    "text": "A language model: token ids to logits of the next token of each, keys and values in states.",
}
VALUES = {
    "pixels": "The picture, RGB, turned upright and brought to this size as the bundle's manifest says.",
    "image_features": "A row for each placeholder of the picture, in reading order.",
    "input_ids": "Token ids; those of placeholders give rows that the picture's take the place of.",
    "inputs_embeds": "Embeddings of the tokens, a picture's features in its placeholders' places.",
    "position_ids": "Where in the cache these positions are written: consecutive, counted from 0.",
    "rope_position_ids": "Positions in time, height and width, by which attention turns queries and keys.",
    "last_index": "Whose logits are given, counted from this call's first row; rows behind it are padding.",
    "logits": "Of the token behind the last position.",
    "k_cache": "Keys (layers, heads, positions, head dimension).",
    "v_cache": "Values (layers, heads, positions, head dimension).",
    "inputIds": "Token ids.",
    "causalMask": "Zeros, one more than all tokens so far, these among them: only its width counts.",
    "keyCache": "Keys (layers, heads, positions, head dimension).",
    "valueCache": "Values (layers, heads, positions, head dimension).",
}


def read_spec(package: Path) -> Any:
    """The package's protobuf, without its weights."""
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model()
    spec.ParseFromString((package / SPEC_FILE).read_bytes())
    return spec


def describe(
    package: Path,
    part: str,
    facts: Mapping[str, str],
    author: str,
    license: str,
    others: Mapping[str, str] | None = None,
) -> None:
    """Writes a package's metadata: what Xcode shows of it.

    Args:
        facts: further keys, shown as they are, behind `mobilemm.`.
        others: keys of other programs.
    """
    spec = read_spec(package)
    metadata = spec.description.metadata
    metadata.shortDescription = PARTS.get(part, f"The part {part!r}.")
    metadata.author, metadata.license, metadata.versionString = author, license, __version__
    for key, value in facts.items():
        metadata.userDefined[f"mobilemm.{key}"] = value
    for key, value in (others or {}).items():
        metadata.userDefined[key] = value
    for _, values in _features(spec):
        for value in values:
            value.shortDescription = VALUES.get(value.name, "")
    (package / SPEC_FILE).write_bytes(spec.SerializeToString())


def signature(package: Path) -> tuple[tuple[manifest.Tensor, ...], tuple[manifest.Tensor, ...]]:
    """Inputs and outputs; a dimension that differs between functions, or is flexible, is called `length`."""
    read = Package(package)
    inputs: dict[str, manifest.Tensor] = {}
    outputs: dict[str, manifest.Tensor] = {}
    for function in read_functions(read).values():
        found = read_signature(read, function, result_types(read, function))
        for features, tensors in ((found.inputs, inputs), (found.outputs, outputs)):
            for feature in features:
                tensor = _tensor(feature)
                other = tensors.get(feature.name, tensor)
                pairs = zip(tensor.shape, other.shape, strict=True)
                shape = [a if a == b else "length" for a, b in pairs]
                tensors[feature.name] = tensor.model_copy(update={"shape": shape})
    return tuple(inputs.values()), tuple(outputs.values())


def require_states(package: Path, num_layers: int, wanted: tuple[str, str] = ("k_cache", "v_cache")) -> None:
    """Raises MobileMMError when a decoder has lost its states, or a layer does not write into them.

    coremltools converts both without a word: states become constants, updates are left out.
    """
    spec = read_spec(package)
    names = sorted(state.name for state in spec.description.state)
    blocks = [
        block
        for function in spec.mlProgram.functions.values()
        for block in function.block_specializations.values()
    ]
    writes = sum(op.type == "write_state" for block in blocks for op in block.operations)
    if names != sorted(wanted) or writes != 2 * num_layers:
        raise MobileMMError(
            f"part 'decoder': coremltools has kept states {names} and {writes} writes into them, where"
            f" {', '.join(wanted)} and {2 * num_layers} are wanted"
        )


def require_rotary(package: Path, tables: Sequence[RopeTable]) -> None:
    """Raises MobileMMError unless a decoder's cosines and sines are stored, and right, for all positions.

    An export runs the first few hundred positions only: phases in float16 are well there, and wrong behind.
    """
    for function in read_functions(Package(package)).values():
        operations = function.block.operations
        constants = {
            operation.outputs[0][0]: operation.operand("val")
            for operation in operations
            if operation.type == "const"
        }
        for index, table in enumerate(tables):
            frequencies = table.inverse_frequencies.double().numpy()
            for kind, turn in (("cos", np.cos), ("sin", np.sin)):
                stored = constants.get(f"rope_{kind}_{index}_weight")
                if not isinstance(stored, Constant):
                    raise MobileMMError(f"part 'decoder': its rotary {kind} is computed or compressed")
                values = stored.array().astype(np.float64)
                wanted = turn(np.outer(np.arange(len(values)), frequencies)) * table.scaling
                # float16 is off by 0.0005, angles in float32 by their size's last digit.
                allowed = (0.001 + 2e-7 * len(values)) * table.scaling
                if not np.abs(values - wanted).max() <= allowed:
                    raise MobileMMError(f"part 'decoder': phases of its rotary {kind} are lost on the way")


def _features(spec: Any) -> Iterator[tuple[str, Any]]:
    """("input", "output" or "state", descriptions), of each function."""
    for owner in spec.description.functions or [spec.description]:
        for kind in ("input", "output", "state"):
            yield kind, getattr(owner, kind)


def _tensor(feature: Feature) -> manifest.Tensor:
    ranges = feature.ranges or [(size, size) for size in feature.shape]
    shape = ["length" if low is None or low != high else low for low, high in ranges]
    dtype = "uint8" if feature.image else feature.dtype
    return manifest.Tensor(name=feature.name, dtype=dtype, shape=shape)  # type: ignore[arg-type]
