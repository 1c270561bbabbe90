"""`mobilemm inspect`: the card of a model, and of a bundle, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mobilemm
from tests.runtime.tiny_bundle import BLOCK, rehash, tiny_manifest, write_parts

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
    assert [part["name"] for part in card["parts"]] == [
        *("vision_encoder", "projector", "language_model"),
        *("signal_tokens", "output_projector", "generator/unet", "generator/vae"),
    ]
    unet = card["parts"][-2]
    assert unet["kind"] == "UNet2DConditionModel"
    assert unet["bytes"] == 2 * unet["parameters"]  # float16
    assert card["image_tokens"] == 16
    assert not (tmp_path / "cache").exists()


def test_a_bundle(run: Run, tmp_path: Path) -> None:
    write_parts(tmp_path)
    draft = tiny_manifest().model_dump(mode="json")
    paths = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    draft["files"] = [
        {"path": path.relative_to(tmp_path).as_posix(), "bytes": 0, "sha256": ""} for path in paths
    ]
    (tmp_path / "manifest.json").write_text(json.dumps(draft))
    rehash(tmp_path)
    ended = run("inspect", tmp_path)
    assert (ended.code, ended.stderr) == (0, "")
    decoder = next(line for line in ended.stdout.splitlines() if line.startswith("│ decoder"))
    size = sum(path.stat().st_size for path in paths if path.name.startswith("decoder.onnx"))
    for text in (f"4 / {BLOCK}", f"{size / 1e6:,.1f}", "0.99900", "30.2 dB", "98.0%", "KL 0.002"):
        assert text in decoder
    embed = next(line for line in ended.stdout.splitlines() if line.startswith("│ embed"))
    assert "not verified" in embed
    for text in ("onnxruntime 1.24.0", "4 × 4 px (pad), 4 tokens", "64 tokens", "apache-2.0"):
        assert text in ended.stdout
    card = json.loads(run("inspect", tmp_path, "--json").stdout)
    assert card == json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "parts" / "vision.onnx").unlink()
    assert "vision.onnx" in run("inspect", tmp_path).error
