"""A checkpoint's weight files, read lazily and as hostile: safetensors, or `.bin` with no pickle run."""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mobilemm.errors import MobileMMError

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's place and form, without its values."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass
class CheckpointWeights:
    """Names → tensors of one folder. Headers are read and checked at once, values when asked for."""

    folder: Path
    infos: dict[str, TensorInfo] = field(default_factory=dict)
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor; from safetensors and zip `.bin` files it is mapped from disk, not copied."""
        path = self.infos[name].file
        opened = self._open[path]
        return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)

    def read(self, path: Path) -> None:
        """Adds one file's tensors. Raises MobileMMError naming the file when it is missing or damaged."""
        if not path.is_file():
            raise MobileMMError(f"{path}: this weight file is missing; download the checkpoint again")
        if path.suffix == ".safetensors":
            tensors = _open_safetensors(path)
            self._open[path] = tensors
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                part = tensors.get_slice(name)
                dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise MobileMMError(
                        f"{path}: tensor {name!r} has the unsupported type {part.get_dtype()}"
                    )
                self.infos[name] = TensorInfo(path, tuple(part.get_shape()), dtype)
        else:
            loaded = _load_bin(path)
            self._open[path] = loaded
            for name, tensor in loaded.items():
                self.infos[name] = TensorInfo(path, tuple(tensor.shape), tensor.dtype)


def open_weights(folder: Path) -> CheckpointWeights:
    """The weights of a checkpoint folder: sharded or not, safetensors before `.bin`.

    Raises MobileMMError when there are none, or when a shard is missing, cut short, or not what it says.
    """
    weights = CheckpointWeights(folder)
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if (folder / f"{stem}{suffix}").is_file():
            weights.read(folder / f"{stem}{suffix}")
            return weights
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise MobileMMError(f"{index}: key 'weight_map' is missing or empty")
            for name in sorted({str(file) for file in weight_map.values()}):
                if Path(name).name != name:
                    raise MobileMMError(f"{index}: key 'weight_map' names {name!r}, which leaves the folder")
                weights.read(folder / name)
            for tensor, file in weight_map.items():
                if tensor not in weights:
                    raise MobileMMError(
                        f"{folder / file}: tensor {tensor!r}, which {index.name} promises, is missing"
                    )
            return weights
    raise MobileMMError(
        f"{folder}: no weights here; expected model.safetensors, pytorch_model.bin, or their .index.json"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; MobileMMError names the file, and the line when it does not parse."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MobileMMError(f"{path}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise MobileMMError(f"{path}: cannot be read: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise MobileMMError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise MobileMMError(f"{path}: a JSON object is expected, not a {type(value).__name__}")
    return value


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> MobileMMError:
    reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
    return MobileMMError(f"{path}: cut short or damaged ({reason}); download the checkpoint again")


def _load_bin(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "WeightsUnpickler" in str(error) or "GLOBAL" in str(error):
            raise MobileMMError(
                f"{path}: refused, nothing was run: this pickle holds more than tensors. If you trust its"
                " origin, convert it to safetensors on a machine apart"
            ) from error
        raise _damaged(path, error) from error
    except Exception as error:  # torch raises nearly anything on damaged data
        raise _damaged(path, error) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        raise MobileMMError(f"{path}: a table of names and tensors is expected")
    for name, tensor in loaded.items():
        known = tensor.dtype in SAFETENSORS_DTYPES.values()
        if not known or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise MobileMMError(
                f"{path}: tensor {name!r} has the unsupported type {tensor.dtype}, {tensor.layout} on"
                f" {tensor.device}"
            )
    return loaded


def count_tensors(names: list[str]) -> str:
    """ "tensor 'a'", or how many and the first three."""
    shown = ", ".join(repr(name) for name in names[:3])
    return (
        f"{len(names)} tensors ({shown}{', …' if len(names) > 3 else ''})"
        if len(names) > 1
        else f"tensor {shown}"
    )
