"""The published sizes, from a checkpoint of full size whose weights are a hole in the file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mobilemm.models.checkpoints.inspection import inspect_model
from mobilemm.models.checkpoints.layouts import find_layout
from mobilemm.models.checkpoints.reading import read_empty_model

Make = Callable[..., Any]
CLIP_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
COMMON = {
    "model_type": "mobilevlm",
    "architectures": ["MobileLlamaForCausalLM"],
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_hidden_size": 1024,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad",
    "vision_tower_type": "clip",
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SIZE_1_7B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
SIZE_3B = {
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "n_head": 16,
    "n_embd": 1234,
    "n_query_groups": 16,
    "name": "huggy_llama_3b",
}


def full_size_shapes(sizes: dict[str, int]) -> dict[str, list[int]]:
    """Names and shapes of MobileVLM V2, from transformers' own classes and the projector's six tensors."""
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32000))
        tower = CLIPVisionModel(CLIPVisionConfig(**CLIP_336))
    hidden = sizes["hidden_size"]
    projector = {
        "mlp.mlp.0.weight": [hidden, 1024],
        "mlp.mlp.0.bias": [hidden],
        "mlp.mlp.2.weight": [hidden, hidden],
        "mlp.mlp.2.bias": [hidden],
        "peg.peg.0.weight": [hidden, 1, 3, 3],
        "peg.peg.0.bias": [hidden],
    }
    return {
        **{name: list(tensor.shape) for name, tensor in llama.state_dict().items()},
        **{f"model.mm_projector.{name}": shape for name, shape in projector.items()},
        **{
            f"model.vision_tower.vision_tower.vision_model.{name}": list(tensor.shape)
            for name, tensor in tower.state_dict().items()
        },
    }


def write_hollow_safetensors(path: Path, shapes: dict[str, list[int]]) -> int:
    """A file with a true header and no data: its length is set, its blocks are never written."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def test_mobilevlm_v2_1_7b_has_its_published_size(tmp_path: Path) -> None:
    config = COMMON | SIZE_1_7B | {"mm_projector_type": "ldpnetv2"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = full_size_shapes(SIZE_1_7B)
    assert len(shapes) == 219 + 391 + 6
    data = write_hollow_safetensors(tmp_path / "model.safetensors", shapes)
    inspection = inspect_model(tmp_path)
    sizes = {part.name: part.parameters for part in inspection.parts}
    assert sizes == {
        "vision_encoder": 303_507_456,
        "projector": 6_316_032,
        "language_model": 1_364_297_728,
    }
    assert inspection.image_tokens == 144
    assert inspection.image_size == 336
    assert inspection.context == 2048
    assert inspection.vocabulary == 32000
    assert inspection.template == "v1"
    assert inspection.layout == "mobilevlm"
    assert inspection.dtype == "bfloat16"
    assert inspection.weights_bytes == data == 2 * sum(sizes.values())
    assert inspection.kv_cache_bytes_per_token == 2 * 24 * 2048 * 2
    assert inspection.notes == []


@pytest.mark.parametrize(
    ("sizes", "kind", "projector", "language_model"),
    [
        (SIZE_1_7B, "ldpnet", 18_936_832, 1_364_297_728),
        (SIZE_3B, "ldpnet", 28_913_920, 2_701_560_320),
        (SIZE_3B, "ldpnetv2", 9_205_760, 2_701_560_320),
    ],
)
def test_the_other_sizes(
    tmp_path: Path, sizes: dict[str, Any], kind: str, projector: int, language_model: int
) -> None:
    """The tower is named by hub id and known without network."""
    foreign = COMMON | sizes | {"mm_projector_type": kind}
    layout = find_layout(foreign)
    assert layout is not None
    model, _ = read_empty_model(layout, foreign, tmp_path)

    def count(part: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    assert count(model.projector) == projector
    assert count(model.language_model) == language_model
    assert count(model.vision_encoder) == 303_507_456
    assert len(model.vision_encoder.state_dict()) == 391
    assert model.num_image_tokens == 144


@pytest.mark.parametrize("kind", ["ldpnet", "llava", "llava-embedded", "llava-hf"])
def test_inspection_agrees_with_the_files(official_checkpoint: Make, kind: str) -> None:
    official = official_checkpoint(kind)
    inspection = inspect_model(official.folder)
    stored = sum(tensor.numel() for tensor in official.tensors.values())
    elsewhere = sum(tensor.numel() for tensor in official.tower.values()) if kind == "llava" else 0
    assert inspection.parameters == stored + elsewhere
    assert inspection.image_tokens == (9 if kind == "ldpnet" else 36)
    assert inspection.dtype == "float32"
    assert bool(inspection.notes) == (kind == "llava")
