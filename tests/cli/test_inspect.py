"""`mobilemm inspect`: the card as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mobilemm

Run = Callable[..., Any]


def test_json(run: Run, pristine: Path) -> None:
    ended = run("inspect", pristine, "--json")
    assert (ended.code, ended.stderr) == (0, "")
    card = json.loads(ended.stdout)
    model, _ = mobilemm.load(pristine)
    sizes = {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in model.named_children()
    }
    assert {part["name"]: part["parameters"] for part in card["parts"]} == sizes
    assert card["parameters"] == sum(sizes.values())
    assert card["weights_bytes"] == 4 * card["parameters"]
    assert card["image_size"] == 32
    assert card["image_tokens"] == 4
    assert card["context"] == 256
    assert card["template"] == "chatml"
    # Keys and values: two layers, two heads of 16, float32.
    assert card["kv_cache_bytes_per_token"] == 2 * 2 * 32 * 4
    assert card["memory_bytes"] == card["weights_bytes"] + 256 * card["kv_cache_bytes_per_token"]
    assert card["files_bytes"] == sum(path.stat().st_size for path in pristine.glob("*.safetensors"))


def test_table(run: Run, pristine: Path) -> None:
    ended = run("inspect", pristine)
    assert (ended.code, ended.stderr) == (0, "")
    for text in ("vision_encoder", "ldpnetv2", "LlamaForCausalLM", "32 px, 4 tokens", "256 tokens", "chatml"):
        assert text in ended.stdout


def test_the_default_model_needs_no_weights(run: Run, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("MOBILEMM_CACHE", str(tmp_path / "cache"))
    card = json.loads(run("inspect", "--json").stdout)
    assert [part["name"] for part in card["parts"]] == ["vision_encoder", "projector", "language_model"]
    assert card["image_tokens"] == 16
    assert not (tmp_path / "cache").exists()
