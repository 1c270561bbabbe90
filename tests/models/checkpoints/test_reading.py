"""Wrong input, from typing errors to hostile files: one MobileMMError each, naming the file or tensor."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mobilemm
from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints.inspection import inspect_model

Make = Callable[..., Any]


def refusal(folder: Any, **options: Any) -> str:
    """The one clear line of what is refused; any other exception fails the test."""
    with pytest.raises(MobileMMError) as error:
        mobilemm.load(folder, **options)
    text = str(error.value)
    assert text
    assert "\n" not in text
    assert len(text) < 1000
    return text


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize(
    "path", ["no/such", "./no/such", "/no/such/folder", "no-such", "", "~/no/such", "a b/c", "../x"]
)
def test_a_path_that_is_not_there(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refusal(path)


def test_a_hub_id_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "neither a folder here nor to be had from the hub" in refusal("mtgv/MobileVLM_V2-1.7B")


def test_a_file_where_a_folder_is_expected(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    assert str(file) in refusal(file)


def test_an_unknown_dtype(official_checkpoint: Make) -> None:
    official = official_checkpoint("ldpnetv2")
    assert "unknown dtype 'float99'" in refusal(official.folder, dtype="float99")
    assert "unknown dtype 'nn'" in refusal(official.folder, dtype="nn")


def test_a_folder_without_config(official_checkpoint: Make) -> None:
    official = official_checkpoint("ldpnetv2")
    (official.folder / "config.json").unlink()
    assert "config.json: there is no such file" in refusal(official.folder)
    with pytest.raises(MobileMMError, match=r"config\.json: there is no such file"):
        inspect_model(official.folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "not json", '{"model_type": ', "\x00"])
def test_a_config_that_is_no_json_object(official_checkpoint: Make, text: str) -> None:
    official = official_checkpoint("ldpnetv2")
    (official.folder / "config.json").write_text(text, encoding="utf-8")
    assert "config.json" in refusal(official.folder)


@pytest.mark.parametrize(
    "key", ["model_type", "mm_vision_tower", "hidden_size", "vocab_size", "num_hidden_layers"]
)
def test_a_missing_key_is_named(official_checkpoint: Make, key: str) -> None:
    official = official_checkpoint("ldpnetv2")
    edit(official.folder / "config.json", lambda config: config.pop(key))
    text = refusal(official.folder)
    assert "config.json" in text
    assert f"key {key!r} is missing" in text


WRONG_VALUES = [
    ("hidden_size", "abc"),
    ("hidden_size", -32),
    ("hidden_size", 0),
    ("hidden_size", 32.5),
    ("hidden_size", [32]),
    ("hidden_size", 10**15),
    ("hidden_size", 31),
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", -1),
    ("num_hidden_layers", "2"),
    ("num_attention_heads", 0),
    ("num_attention_heads", 5),
    ("num_key_value_heads", 3),
    ("intermediate_size", -5),
    ("vocab_size", {}),
    ("vocab_size", -1),
    ("vocab_size", 10**14),
    ("hidden_act", "no-such"),
    ("hidden_act", 3),
    ("rms_norm_eps", "small"),
    ("rope_scaling", "linear"),
    ("rope_theta", "x"),
    ("max_position_embeddings", -1),
    ("tie_word_embeddings", "maybe"),
    ("pad_token_id", "x"),
    ("mm_projector_type", "no-such"),
    ("mm_projector_type", 3),
    ("mm_projector_type", "mlp0x_gelu"),
    ("mm_vision_select_layer", "last"),
    ("mm_vision_select_layer", 99),
    ("mm_vision_select_layer", -99),
    ("mm_vision_tower", 3),
    ("mm_vision_tower", "no/such-tower"),
    ("mm_vision_tower", "../.."),
    ("mm_vision_tower", "a\x00b"),
    ("mm_vision_tower", {"a": 1}),
    ("model_type", 3),
    ("model_type", ["mobilevlm"]),
    ("model_type", "no-such"),
    ("model_type", "llama"),
]


@pytest.mark.parametrize(("key", "value"), WRONG_VALUES)
def test_a_wrong_value_in_the_config(official_checkpoint: Make, key: str, value: Any) -> None:
    official = official_checkpoint("ldpnetv2")
    edit(official.folder / "config.json", lambda config: config.update({key: value}))
    text = refusal(official.folder)
    assert str(official.folder) in text


def test_an_unknown_projector_lists_the_known(official_checkpoint: Make) -> None:
    official = official_checkpoint("ldpnetv2", config={"mm_projector_type": "ldpnetv9"})
    text = refusal(official.folder)
    assert "config.json" in text
    assert "'ldpnetv9'" in text
    assert all(name in text for name in ("ldpnet", "ldpnetv2", "linear", "mlpNx_gelu"))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vision_config", "patch_size", 0),
        ("vision_config", "image_size", -24),
        ("vision_config", "image_size", 10**9),
        ("vision_config", "num_hidden_layers", 10**9),
        ("vision_config", "num_attention_heads", 5),
        ("vision_config", "model_type", "no-such"),
        ("vision_config", "hidden_size", "x"),
        ("text_config", "model_type", "no-such"),
        ("text_config", "model_type", "clip_vision_model"),
        ("text_config", "hidden_size", "x"),
        ("text_config", "vocab_size", 5),
    ],
)
def test_a_wrong_value_in_a_part(official_checkpoint: Make, part: str, key: str, value: Any) -> None:
    official = official_checkpoint("llava-hf")
    edit(official.folder / "config.json", lambda config: config[part].update({key: value}))
    assert str(official.folder) in refusal(official.folder)


@pytest.mark.parametrize(
    "change",
    [
        {"vision_config": 3},
        {"text_config": []},
        {"vision_feature_layer": [1, 2]},
        {"projector_hidden_act": "relu"},
        {"image_token_index": "x"},
        {"multimodal_projector_bias": False},
    ],
)
def test_a_wrong_llava_hf_config(official_checkpoint: Make, change: dict[str, Any]) -> None:
    official = official_checkpoint("llava-hf")
    edit(official.folder / "config.json", lambda config: config.update(change))
    assert str(official.folder) in refusal(official.folder)


def test_tensors_missing_unexpected_or_of_another_shape(official_checkpoint: Make) -> None:
    official = official_checkpoint("ldpnetv2", form="safetensors")
    file = official.folder / "model.safetensors"
    name = "model.mm_projector.peg.peg.0.weight"

    def write(**changes: Any) -> None:
        tensors = {**official.tensors, **changes}
        save_file({key: value for key, value in tensors.items() if value is not None}, file)

    write(**{name: None})
    assert refusal(official.folder).endswith(f"tensor {name!r} missing from the weights")
    write(**{"model.mm_projector.extra": torch.ones(1)})
    text = refusal(official.folder)
    assert "'model.mm_projector.extra'" in text
    assert "no place for" in text
    write(**{name: torch.ones(32, 1, 5, 5)})
    text = refusal(official.folder)
    assert str(file) in text
    assert all(part in text for part in (name, "(32, 1, 5, 5)", "(32, 1, 3, 3)"))
    write(**{name: torch.ones(32, 1, 3, 3, dtype=torch.int64)})
    text = refusal(official.folder)
    assert name in text
    assert "int64" in text


def test_many_missing_tensors_are_counted(official_checkpoint: Make) -> None:
    official = official_checkpoint("ldpnetv2", form="safetensors")
    tensors = {name: value for name, value in official.tensors.items() if "mm_projector" not in name}
    save_file(tensors, official.folder / "model.safetensors")
    text = refusal(official.folder)
    assert "6 tensors (" in text
    assert "…" in text


def test_weights_of_another_projector(official_checkpoint: Make) -> None:
    official = official_checkpoint("ldpnetv2", config={"mm_projector_type": "ldpnet"})
    assert "missing from the weights" in refusal(official.folder)


def test_a_missing_tokenizer(official_checkpoint: Make) -> None:
    official = official_checkpoint("ldpnetv2")
    (official.folder / "tokenizer.model").unlink()
    assert "no tokenizer here" in refusal(official.folder)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\xff" * 1000])
def test_a_damaged_tokenizer(official_checkpoint: Make, content: bytes) -> None:
    official = official_checkpoint("ldpnetv2")
    (official.folder / "tokenizer.model").write_bytes(content)
    assert str(official.folder) in refusal(official.folder)


@pytest.mark.parametrize(
    "settings",
    [
        "{",
        "[]",
        '{"size": "x"}',
        '{"size": {"shortest_edge": 0}}',
        '{"size": {"shortest_edge": 100000}}',
        '{"image_mean": "x"}',
        '{"image_std": [1, 2]}',
        '{"crop_size": -1}',
        '{"crop_size": {"height": 48, "width": 48}}',
        '{"resample": 99}',
        '{"image_processor": {"resample": 99}}',
    ],
)
def test_damaged_image_settings(official_checkpoint: Make, settings: str) -> None:
    official = official_checkpoint("ldpnetv2")
    (official.folder / "preprocessor_config.json").write_text(settings, encoding="utf-8")
    assert "preprocessor_config.json" in refusal(official.folder)


def test_image_settings_as_older_files_have_them(official_checkpoint: Make) -> None:
    """CLIP's first preprocessor files give sizes as plain numbers."""
    official = official_checkpoint("ldpnetv2")
    size = official.tower_config["image_size"]
    settings = json.dumps({"size": size, "crop_size": size, "resample": 3, "do_center_crop": True})
    (official.folder / "preprocessor_config.json").write_text(settings, encoding="utf-8")
    image_processor = mobilemm.load(official.folder).processor.image_processor
    assert dict(image_processor.crop_size)["height"] == size
    assert image_processor.do_pad  # from config.json's image_aspect_ratio


def test_code_in_a_checkpoint_is_not_run(official_checkpoint: Make) -> None:
    """`auto_map` names Python files; with or without them nothing of the folder is imported."""
    official = official_checkpoint("ldpnetv2")
    victim = official.folder / "victim"
    (official.folder / "evil.py").write_text(f"open({str(victim)!r}, 'w').write('owned')\n", encoding="utf-8")
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.T", "evil.T"]}
    for file in ("config.json", "tokenizer_config.json", "tower/config.json"):
        edit(official.folder / file, lambda value: value.update({"auto_map": auto_map}))
    with suppress(MobileMMError):
        mobilemm.load(official.folder)
    assert not victim.exists()


FUZZED = {
    "ldpnetv2": ("config.json", "tower/config.json", "model.safetensors.index.json"),
    "llava-hf": ("config.json", "model.safetensors.index.json"),
}


@pytest.mark.parametrize("kind", sorted(FUZZED))
def test_damage_to_the_small_files(official_checkpoint: Make, kind: str) -> None:
    """Cut, flipped and swapped bytes: a model, or a MobileMMError, and nothing else."""
    official = official_checkpoint(kind, form="sharded-safetensors")
    rng = random.Random(f"{kind}")
    refused = 0
    for file in FUZZED[kind]:
        path = official.folder / file
        whole = path.read_bytes()
        for _ in range(20):
            path.write_bytes(damaged(whole, rng))
            refused += attempt(official.folder)
        path.write_bytes(whole)
    assert refused > 10
    mobilemm.load(official.folder)


def test_damage_to_safetensors_headers(official_checkpoint: Make) -> None:
    official = official_checkpoint("ldpnetv2", form="safetensors")
    path = official.folder / "model.safetensors"
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(1)
    refused = 0
    for _ in range(40):
        path.write_bytes(damaged(whole[:length], rng, keep_length=rng.random() < 0.8) + whole[length:])
        refused += attempt(official.folder)
    assert refused > 30


def damaged(whole: bytes, rng: random.Random, keep_length: bool = False) -> bytes:
    data = bytearray(whole)
    kind = (
        rng.choice(("flip", "byte", "digit"))
        if keep_length
        else rng.choice(("cut", "flip", "byte", "digit", "drop"))
    )
    at = rng.randrange(len(data))
    if kind == "cut":
        return bytes(data[:at])
    if kind == "drop":
        del data[at : at + rng.randint(1, 8)]
    elif kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[at] = rng.choice(b'{}[]",:0-9e\\ \x00\xff')
    else:
        digits = [index for index, byte in enumerate(data) if chr(byte).isdigit()]
        data[rng.choice(digits)] = rng.choice(b"0123456789")
    return bytes(data)


def attempt(folder: Path) -> bool:
    """Whether the folder is refused; any exception but MobileMMError goes through."""
    with suppress(MobileMMError):
        mobilemm.load(folder)
        return False
    return True


def test_the_tower_of_its_own_is_checked(official_checkpoint: Make) -> None:
    official = official_checkpoint("llava")
    file = official.tower_folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    assert "tower" in refusal(official.folder)
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    assert "encoder.layers.1.mlp.fc1.weight" in refusal(official.folder)
    save_file({**tensors, name: torch.ones(3, 3)}, file)
    assert "encoder.layers.1.mlp.fc1.weight" in refusal(official.folder)
    file.write_bytes(b"\0" * 100)
    assert str(file) in refusal(official.folder)
