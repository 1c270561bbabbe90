"""A Core ML bundle's packages, and a run of them: what the Swift package's stand-in for Core ML answers.

    python -m tests.ios.recording BUNDLE PICTURES FOLDER [--short]

Interfaces and operations come from the packages' specifications; the run is a conversation about two
pictures, and a drawing where the bundle draws, by Python's session on the reference interpreter of MIL. Each
call is written down whole, into a folder of the bundle's name.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilemm.runtime.backends.coreml import CoreMLBackend, Package
from mobilemm.runtime.bundle import Bundle, open_bundle
from mobilemm.runtime.drawing import Drawn
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.session import Session
from tests.export.drawing_checkpoint import REQUEST

SEED = 7
TURNS: tuple[tuple[list[str], str], ...] = (
    (["0.png"], "What is in this picture?"),
    ([], "Why?"),
    (["1.png"], "And now?"),
)
SHORT: tuple[tuple[list[str], str], ...] = (
    (["0.png"], "What is in this picture?"),
    ([], "Write a long story about a dog."),
)
# Of FeatureTypes.proto and MIL.proto.
ARRAY_TYPES = {65568: "float32", 65552: "float16", 131104: "int32"}


def interfaces(bundle: Bundle) -> dict[str, list[dict[str, Any]]]:
    """Of each part's package the functions: inputs, outputs, states, and the types of operations."""
    import coremltools

    found = {}
    for name in bundle.manifest.parts:
        spec = coremltools.utils.load_spec(str(bundle.part_path(name)))
        description = spec.description
        functions = list(description.functions)
        found[name] = [
            {
                "name": one.name if functions else "main",
                "inputs": [feature(each) for each in one.input],
                "outputs": [feature(each) for each in one.output],
                "states": [feature(each) for each in one.state],
                "operations": operations(spec, one.name if functions else "main"),
            }
            for one in functions or [description]
        ]
    return found


def feature(of: Any) -> dict[str, Any]:
    kind = of.type.WhichOneof("Type")
    if kind == "imageType":
        shape = [1, 3, of.type.imageType.height, of.type.imageType.width]
        return {"name": of.name, "shape": shape, "dtype": "uint8", "image": True, "ranges": None}
    array = of.type.stateType.arrayType if kind == "stateType" else of.type.multiArrayType
    ranges = None
    if array.WhichOneof("ShapeFlexibility") == "shapeRange":
        ranges = [[size.lowerBound, size.upperBound] for size in array.shapeRange.sizeRanges]
    return {
        "name": of.name,
        "shape": list(array.shape),
        "dtype": ARRAY_TYPES[array.dataType],
        "image": False,
        "ranges": ranges,
    }


def operations(spec: Any, function: str) -> list[str]:
    blocks = spec.mlProgram.functions[function].block_specializations
    return [operation.type for block in blocks.values() for operation in block.operations]


class Recorder:
    """A package whose calls are kept, inputs in the types that its specification has."""

    def __init__(
        self,
        package: Package,
        part: str,
        types: Mapping[str, str],
        folder: Path,
        calls: list[dict[str, Any]],
    ) -> None:
        self._package, self._part, self._types = package, part, types
        self._folder, self._calls = folder, calls
        self.shape, self.make_state = package.shape, package.make_state

    @property
    def functions(self) -> tuple[str, ...]:
        return self._package.functions

    def run(
        self, inputs: Mapping[str, NDArray[Any]], function: str | None, state: Any
    ) -> dict[str, NDArray[Any]]:
        typed = {name: value.astype(self._types[name]) for name, value in inputs.items()}
        outputs = self._package.run(typed, function, state)
        kept = {side: self._keep(values) for side, values in (("inputs", typed), ("outputs", outputs))}
        self._calls.append({"part": self._part, "function": function, **kept})
        return outputs

    def _keep(self, values: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            file = f"{self._part}-{len(self._calls)}-{name}"
            (self._folder / file).write_bytes(np.ascontiguousarray(value).tobytes())
            found[name] = {"dtype": value.dtype.name, "shape": list(value.shape), "file": file}
        return found


class RecordingBackend(CoreMLBackend):
    def __init__(self, bundle: Bundle, folder: Path) -> None:
        super().__init__(bundle, 1)
        self.folder = folder
        self.calls: list[dict[str, Any]] = []

    def package(self, part: str) -> Package:
        if part not in self._packages:
            types = {tensor.name: tensor.dtype for tensor in self.bundle.manifest.parts[part].inputs}
            self._packages[part] = Recorder(super().package(part), part, types, self.folder, self.calls)
        return self._packages[part]


def record(bundle: Bundle, pictures: Path, folder: Path, short: bool) -> None:
    """One session's turns; `short` is one picture and few words."""
    (folder / "interfaces.json").write_text(json.dumps(interfaces(bundle)))
    most, least = (32, 8) if short else (65, 64)
    backend = RecordingBackend(bundle, folder)
    session = Session(bundle, backend, Sampling(max_new_tokens=most, seed=SEED))
    turns = [converse(session, *turn, pictures, folder) for turn in (SHORT if short else TURNS)]
    if bundle.manifest.generation is not None:
        session.reset()
        request = "Draw a red apple." if short else REQUEST
        turns.append({"reset": True, **converse(session, [], request, pictures, folder)})
        assert turns[-1]["drawings"]
    (folder / "calls.json").write_text(json.dumps(backend.calls))
    functions = [call["function"] for call in backend.calls if call["part"] == "decoder"]
    assert functions.count("decode") >= least
    assert any(name.startswith("prefill") for name in functions)
    run = {"max_new_tokens": most, "seed": SEED, "turns": turns}
    (folder / "run.json").write_text(json.dumps(run, ensure_ascii=False), encoding="utf-8")
    print(f"recording: {len(backend.calls)} calls in {folder}")


def converse(session: Session, images: list[str], text: str, pictures: Path, folder: Path) -> dict[str, Any]:
    for image in images:
        session.look_at(pictures / image)
    pieces = list(session.stream(text))
    drawings = []
    for drawn in (piece for piece in pieces if isinstance(piece, Drawn)):
        height, width, _ = drawn.picture.shape
        file = f"drawing-{sum(1 for _ in folder.glob('drawing-*'))}.rgb"
        (folder / file).write_bytes(drawn.picture.tobytes())
        drawings.append({"file": file, "width": width, "height": height})
    ids = session.answer_ids
    return {"images": images, "text": text, "ids": ids, "answer": "".join(pieces), "drawings": drawings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pictures", type=Path, help="a folder with 0.png and 1.png")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--short", action="store_true", help="one picture and few words, for large models")
    arguments = parser.parse_args()
    folder = arguments.folder / arguments.bundle.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    record(open_bundle(arguments.bundle), arguments.pictures, folder, arguments.short)


if __name__ == "__main__":
    main()
