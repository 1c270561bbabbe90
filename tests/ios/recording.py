"""A Core ML bundle's packages, and a run of them: what the Swift package's stand-in for Core ML answers.

    python -m tests.ios.recording BUNDLE PICTURES FOLDER

Interfaces and operations come from the packages' specifications; the run is a conversation about two
pictures, by Python's session on the reference interpreter of MIL. Each call is written down whole.
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
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.session import Session

ANSWER = 65
TURNS = (
    (["0.png"], "What is in this picture?"),
    ([], "Why?"),
    (["1.png"], "And now?"),
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
    """A package whose calls are kept."""

    def __init__(self, package: Package, part: str, folder: Path, calls: list[dict[str, Any]]) -> None:
        self._package, self._part, self._folder, self._calls = package, part, folder, calls
        self.shape, self.make_state = package.shape, package.make_state

    @property
    def functions(self) -> tuple[str, ...]:
        return self._package.functions

    def run(
        self, inputs: Mapping[str, NDArray[Any]], function: str | None, state: Any
    ) -> dict[str, NDArray[Any]]:
        outputs = self._package.run(inputs, function, state)
        kept = {side: self._keep(values) for side, values in (("inputs", inputs), ("outputs", outputs))}
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
            self._packages[part] = Recorder(super().package(part), part, self.folder, self.calls)
        return self._packages[part]


def record(bundle: Bundle, pictures: Path, folder: Path) -> None:
    (folder / "interfaces.json").write_text(json.dumps(interfaces(bundle)))
    backend = RecordingBackend(bundle, folder)
    session = Session(bundle, backend, Sampling(max_new_tokens=ANSWER))
    turns = []
    for images, text in TURNS:
        for image in images:
            session.look_at(pictures / image)
        answer = session.reply(text)
        turns.append({"images": images, "text": text, "ids": session.answer_ids, "answer": answer})
    (folder / "calls.json").write_text(json.dumps(backend.calls))
    functions = [call["function"] for call in backend.calls if call["part"] == "decoder"]
    assert functions.count("decode") >= 64
    assert any(name.startswith("prefill") for name in functions)
    (folder / "turns.json").write_text(json.dumps(turns, ensure_ascii=False), encoding="utf-8")
    print(f"recording: {len(backend.calls)} calls in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pictures", type=Path, help="a folder with 0.png and 1.png")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    record(open_bundle(arguments.bundle), arguments.pictures, arguments.folder)


if __name__ == "__main__":
    main()
