"""Weight files as an enemy or a broken download leaves them: one clear line each, and nothing is run."""

from __future__ import annotations

import json
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints.weights import open_weights, read_json

TENSORS = {f"layer.{index}": torch.arange(12.0).reshape(3, 4) + index for index in range(6)}


def one_line(error: pytest.ExceptionInfo[MobileMMError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def write_index(folder: Path, weight_map: Any, stem: str = "model.safetensors") -> None:
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_values_come_back(tmp_path: Path, form: str) -> None:
    tensors = {
        **TENSORS,
        "half": torch.rand(3).bfloat16(),
        "flag": torch.tensor([True]),
        "empty": torch.rand(0, 3),
    }
    if form == "safetensors":
        save_file(tensors, tmp_path / "model.safetensors")
    else:
        torch.save(
            OrderedDict(tensors),
            tmp_path / "pytorch_model.bin",
            _use_new_zipfile_serialization=form == "zip",
        )
    weights = open_weights(tmp_path)
    assert sorted(weights) == sorted(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(weights[name], tensor)
        assert (weights.infos[name].shape, weights.infos[name].dtype) == (tuple(tensor.shape), tensor.dtype)


def test_parameters_and_shared_storage_are_tensors_too(tmp_path: Path) -> None:
    table = torch.rand(4, 4)
    state = {"a": torch.nn.Parameter(table), "b": table[1:], "c": table.T}
    torch.save(state, tmp_path / "pytorch_model.bin")
    weights = open_weights(tmp_path)
    for name, tensor in state.items():
        assert torch.equal(weights[name], tensor)


def test_safetensors_go_before_bin(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert open_weights(tmp_path)["a"] == 1


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(MobileMMError, match=r"no weights here; expected model\.safetensors") as error:
        open_weights(tmp_path)
    assert str(tmp_path) in one_line(error)


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_files_cut_short_at_any_place(tmp_path: Path, form: str) -> None:
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "pytorch_model.bin")
    if form == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for length in [*range(0, len(whole) - 1, max(1, len(whole) // 60)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(MobileMMError) as error:
            open_weights(tmp_path)
        assert path.name in one_line(error)


def test_a_safetensors_header_that_lies(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    def header(value: Any, length: int | None = None, data: bytes = b"\0" * 16) -> bytes:
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    save = header({"a": entry})
    path.write_bytes(save)
    open_weights(tmp_path)
    lies = [
        header({"a": entry}, length=2**63),
        header({"a": entry}, length=2**64 - 1),
        header({"a": entry}, length=10**9),
        header(b"[" * 5000),
        header(b"\xff\xfe"),
        header([1, 2]),
        header({"a": 3}),
        header({"a": entry | {"dtype": "F7"}}),
        header({"a": entry | {"dtype": "F8_E4M3", "shape": [16]}}),
        header({"a": entry | {"shape": [5]}}),
        header({"a": entry | {"shape": [-4]}}),
        header({"a": entry | {"shape": [2**40, 2**40]}}),
        header({"a": entry | {"data_offsets": [0, 2**60]}}),
        header({"a": entry | {"data_offsets": [16, 0]}}),
        header({"a": entry, "b": entry}),
        b"",
        b"\0" * 7,
        b"\0" * 4096,
    ]
    for lie in lies:
        path.write_bytes(lie)
        with pytest.raises(MobileMMError, match=r"model\.safetensors") as error:
            open_weights(tmp_path)
        one_line(error)


class Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.victim)!r}, 'w').write('owned')",))


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    victim = tmp_path / "victim"
    state = {"a": torch.ones(2), "b": Malicious(victim)}
    path = tmp_path / "pytorch_model.bin"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps({"b": Malicious(victim)}))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(MobileMMError, match=r"pytorch_model\.bin: refused, nothing was run") as error:
        open_weights(tmp_path)
    one_line(error)
    assert not victim.exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"a": 3},
        lambda: {"a": [torch.ones(1)]},
        lambda: {1: torch.ones(1)},
        lambda: [torch.ones(1)],
        lambda: torch.ones(1),
        lambda: {"state_dict": {"a": torch.ones(1)}},
        lambda: None,
        lambda: {"a": torch.sparse_coo_tensor([[0]], [1.0], (2,))},
        lambda: {"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
        lambda: {"a": torch.ones(2, device="meta")},
        lambda: {"a": torch.ones(2, dtype=torch.complex64)},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_pickle_of_something_else(tmp_path: Path, make: Callable[[], Any]) -> None:
    torch.save(make(), tmp_path / "pytorch_model.bin")
    with pytest.raises(MobileMMError, match=r"pytorch_model\.bin") as error:
        open_weights(tmp_path)
    one_line(error)


@pytest.mark.parametrize("suffix", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "name",
    ["../secret.bin", "/etc/passwd", "sub/part.bin", "..", ".", "", "a\\..\\b", "x\0y", None, 3, ["x"]],
)
def test_an_index_that_leaves_the_folder(tmp_path: Path, suffix: str, name: Any) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(b"secret")
    write_index(folder, {"a": name}, suffix)
    with pytest.raises(MobileMMError) as error:
        open_weights(folder)
    one_line(error)


@pytest.mark.parametrize("weight_map", [{}, [], None, "x", 3])
def test_an_index_without_a_map(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(MobileMMError, match=r"index\.json: key 'weight_map' is missing or empty"):
        open_weights(tmp_path)


def test_a_missing_shard_and_a_promised_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(MobileMMError, match=r"two\.safetensors: this weight file is missing"):
        open_weights(tmp_path)
    save_file({"c": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(MobileMMError, match=r"two\.safetensors: tensor 'b'.*promises"):
        open_weights(tmp_path)


def test_a_folder_where_a_file_is_expected(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(MobileMMError, match=r"config\.json: cannot be read"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[1]", b"3", b"null", b'"x"', b"{'a': 1}", b"\xff\xfe{}", b"[" * 100_000, b'{"a": 1}x'],
)
def test_json_that_is_none(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(MobileMMError, match=r"config\.json") as error:
        read_json(path)
    one_line(error)


def test_a_file_on_a_symlink_that_leads_nowhere(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "one.safetensors"})
    (tmp_path / "one.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(MobileMMError, match=r"one\.safetensors: this weight file is missing"):
        open_weights(tmp_path)
