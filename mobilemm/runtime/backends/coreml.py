"""Core ML bundles: on Core ML itself where it is (macOS), elsewhere on the reference interpreter of MIL.

Both run the same packages: `vision` takes one picture a call, `embed` ids alone, and `decoder` has two
functions over one state, `prefill` for a fixed number of positions and `decode` for one.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mobilemm.errors import MobileMMError, one_line
from mobilemm.runtime.backends import Array, refuse_overflow
from mobilemm.runtime.embedding import embed_with_images

if TYPE_CHECKING:
    from mobilemm.runtime.bundle import Bundle

PREFILL, DECODE = "prefill", "decode"
# From as many positions on, a call of `prefill`, which always computes its full length, is worth it.
PREFILL_FROM = 6


class Package(Protocol):
    """A loaded .mlpackage."""

    @property
    def functions(self) -> tuple[str, ...]:
        """Their names."""

    def shape(self, function: str | None, name: str) -> tuple[tuple[int, int | None], ...]:
        """Of an input, the least and the largest size of each dimension; KeyError when there is none."""

    def run(self, inputs: Mapping[str, Array], function: str | None, state: Any) -> dict[str, Array]:
        """Runs a function, the only one when None."""

    def make_state(self) -> Any:
        """An empty state, for all functions."""


class CoreMLBackend:
    """A `Backend` of Core ML bundles.

    Attributes:
        runtime: what runs the bundle here.

    Raises MobileMMError when coremltools is missing, or this macOS is older than the bundle asks for.
    """

    prefills_in_pieces = False

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.bundle, self.threads = bundle, threads
        self._native = sys.platform == "darwin"
        self._packages: dict[str, Package] = {}
        if self._native:
            _check_macos(bundle)
            self.runtime = f"Core ML of macOS {platform.mac_ver()[0]}"
        else:
            self.runtime = "mobilemm's reference interpreter of Core ML programs, on PyTorch"

    def load(self, part: str) -> None:
        self.package(part)

    def release(self, part: str) -> None:
        self._packages.pop(part, None)

    def run(self, part: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        package = self.package(part)
        if part == "embed":
            return {"inputs_embeds": self._embed(package, inputs["input_ids"], inputs["image_features"])}
        if part != "vision":
            return package.run(inputs, None, None)
        rows = [package.run({"pixels": picture[None]}, None, None) for picture in inputs["pixels"]]
        if not rows:
            raise MobileMMError(f"{self.bundle.part_path(part)}: no picture to look at")
        features = [row["image_features"].reshape(-1, row["image_features"].shape[-1]) for row in rows]
        return {"image_features": np.concatenate(features).astype(np.float32)}

    def decoder(self) -> CoreMLDecoder:
        path = self.bundle.part_path("decoder")
        return CoreMLDecoder(self.package("decoder"), self.bundle.manifest.model.context_length, path)

    def package(self, part: str) -> Package:
        """A part, loaded if it was not."""
        if part not in self._packages:
            path = self.bundle.part_path(part)
            if self._native:
                self._packages[part] = _NativePackage(path)
            else:
                self._packages[part] = _InterpretedPackage(path, self.threads)
        return self._packages[part]

    def _embed(self, package: Package, ids: Array, features: Array) -> Array:
        model = self.bundle.manifest.model
        longest = package.shape(None, "input_ids")[1][1] or ids.shape[1]

        def lookup(known: Array) -> Array:
            pieces = [
                package.run({"input_ids": known[:, start : start + longest].astype(np.int32)}, None, None)
                for start in range(0, known.shape[1], longest)
            ]
            return np.concatenate([piece["inputs_embeds"] for piece in pieces], 1).astype(np.float32)

        return embed_with_images(lookup, ids, features, model.image_token_id, model.vocab_size)


class CoreMLDecoder:
    """A `Decoder`: the package, and one conversation's states.

    Long inputs go through `prefill` in pieces of its length; where there are several of it, the smallest that
    holds what is left is taken. Rows behind a shorter piece are padding: what they write lies behind the
    cache's end, where it is overwritten before anything sees it.
    """

    def __init__(self, package: Package, context_length: int, file: Path) -> None:
        self.context_length = context_length
        self._package, self._file = package, file
        self._state = package.make_state()
        self._length = 0
        try:
            lengths = {name: package.shape(name, "inputs_embeds")[1][0] for name in package.functions}
        except KeyError as error:
            raise MobileMMError(f"{file}: not a decoder, it has no input {error}") from None
        self._prefill = sorted((lengths[name], name) for name in lengths if name.startswith(PREFILL))
        if DECODE not in lengths or not self._prefill:
            raise MobileMMError(f"{file}: not a decoder, it has the functions {', '.join(package.functions)}")
        self._rope = _has(package, DECODE, "rope_position_ids")

    @property
    def length(self) -> int:
        return self._length

    def decode(
        self, inputs_embeds: Array, position_ids: Array | None = None, logits_positions: Array | None = None
    ) -> Array:
        count = inputs_embeds.shape[1]
        total = self._length + count
        refuse_overflow(total, self.context_length)
        if position_ids is None and self._rope:
            position_ids = np.broadcast_to(np.arange(self._length, total), (3, 1, count))
        wanted = [count - 1] if logits_positions is None else [int(i) % count for i in logits_positions]
        logits: dict[int, Array] = {}
        start = 0
        while start < count:
            chosen = self._choose(count - start, self._length + start)
            stop = min(start + chosen[0], count) if chosen else count
            inside = sorted({place for place in wanted if start <= place < stop})
            # `prefill` gives one position's logits.
            if chosen is None or stop - start < PREFILL_FROM or len(inside) > 1:
                for place in range(start, stop):
                    logits[place] = self._call(inputs_embeds, position_ids, place, place + 1, (1, DECODE))
            else:
                place = inside[0] if inside else stop - 1
                logits[place] = self._call(inputs_embeds, position_ids, start, stop, chosen, place)
            start = stop
        self._length = total
        return np.concatenate([logits[place] for place in wanted], 1)

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise ValueError(f"a cache of {self._length} positions cannot be cut to {length}")
        self._length = length

    def _choose(self, count: int, first: int) -> tuple[int, str] | None:
        """The function for `count` positions from `first` on; its whole length must fit into the states."""
        fitting = [one for one in self._prefill if first + one[0] <= self.context_length]
        return next((one for one in fitting if one[0] >= count), fitting[-1] if fitting else None)

    def _call(
        self,
        embeds: Array,
        rope: Array | None,
        start: int,
        stop: int,
        chosen: tuple[int, str],
        last: int | None = None,
    ) -> Array:
        """Logits (1, 1, vocabulary) of position `last` of a piece, or of the only one, by `decode`."""
        width, function = chosen
        rows = np.minimum(np.arange(start, start + width), stop - 1)
        first = self._length + start
        inputs: dict[str, Array] = {
            "inputs_embeds": embeds[:, rows].astype(np.float16),
            "position_ids": np.arange(first, first + width, dtype=np.int32)[None],
        }
        if self._rope and rope is not None:
            inputs["rope_position_ids"] = rope[..., rows].astype(np.int32)
        if last is not None:
            inputs["last_index"] = np.array([last - start], np.int32)
        return self._package.run(inputs, function, self._state)["logits"].astype(np.float32)


class _InterpretedPackage:
    """On the reference interpreter, in the program's own precision.

    Unless a number of threads is asked for, `decode` runs on one: hundreds of small operations that wait for
    memory gain little from more, and lose much where other processes have the cores.
    """

    def __init__(self, path: Path, threads: int | None) -> None:
        try:
            import torch

            from mobilemm.export import mil_interpreter
        except ImportError as error:
            raise MobileMMError(
                "running a Core ML bundle here needs torch: pip install 'mobilemm[coreml]'"
            ) from error
        self.torch, self.threads = torch, threads
        self.model = mil_interpreter.load(path)

    @property
    def functions(self) -> tuple[str, ...]:
        return self.model.functions

    def shape(self, function: str | None, name: str) -> tuple[tuple[int, int | None], ...]:
        for feature in self.model.inputs(function):
            if feature.name == name:
                if feature.ranges is not None:
                    return feature.ranges
                return tuple((size or 1, size) for size in feature.shape)
        raise KeyError(name)

    def run(self, inputs: Mapping[str, Array], function: str | None, state: Any) -> dict[str, Array]:
        before = self.torch.get_num_threads()
        self.torch.set_num_threads(self.threads or (1 if function == DECODE else before))
        try:
            return self.model(inputs, function, state)
        finally:
            self.torch.set_num_threads(before)

    def make_state(self) -> Any:
        return self.model.make_state()


class _NativePackage:
    """On Core ML, one MLModel for each function; a state of one serves all of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._models: dict[str | None, Any] = {}

    @property
    def functions(self) -> tuple[str, ...]:
        return tuple(each.name for each in self._model(DECODE).get_spec().description.functions)

    def shape(self, function: str | None, name: str) -> tuple[tuple[int, int | None], ...]:
        description = self._model(function).get_spec().description
        inputs = next(
            (each.input for each in description.functions if each.name == function), description.input
        )
        for feature in inputs:
            if feature.name == name:
                array = feature.type.multiArrayType
                if array.WhichOneof("ShapeFlexibility") == "shapeRange":
                    return tuple(
                        (size.lowerBound, None if size.upperBound < 0 else size.upperBound)
                        for size in array.shapeRange.sizeRanges
                    )
                return tuple((size, size) for size in array.shape)
        raise KeyError(name)

    def run(self, inputs: Mapping[str, Array], function: str | None, state: Any) -> dict[str, Array]:
        model = self._model(function)
        given: dict[str, Any] = dict(inputs)
        if "pixels" in given:
            from PIL import Image

            given["pixels"] = Image.fromarray(given["pixels"][0].transpose(1, 2, 0).astype(np.uint8))
        try:
            return dict(model.predict(given) if state is None else model.predict(given, state))
        except Exception as error:
            raise MobileMMError(f"{self.path}: Core ML failed ({one_line(error)})") from error

    def make_state(self) -> Any:
        return self._model(DECODE).make_state()

    def _model(self, function: str | None) -> Any:
        if function not in self._models:
            try:
                import coremltools
            except ImportError as error:
                raise MobileMMError(
                    "running a Core ML bundle needs coremltools: pip install 'mobilemm[coreml]'"
                ) from error
            try:
                self._models[function] = coremltools.models.MLModel(str(self.path), function_name=function)
            except Exception as error:
                raise MobileMMError(
                    f"{self.path}: cannot be loaded by Core ML ({one_line(error)})"
                ) from error
        return self._models[function]


def _has(package: Package, function: str, name: str) -> bool:
    try:
        package.shape(function, name)
    except KeyError:
        return False
    return True


def _check_macos(bundle: Bundle) -> None:
    """iOS 18 and macOS 15 are of one year, from iOS 26 on both have the same number."""
    wanted = bundle.manifest.runtime.min_version.split(".")[0]
    least = int(wanted) if wanted.isdecimal() else 18
    least = least - 3 if least < 26 else least
    if int(platform.mac_ver()[0].split(".")[0]) < least:
        raise MobileMMError(
            f"{bundle.folder}: needs macOS {least} or newer, this is {platform.mac_ver()[0]}; update it"
        )
