"""Tiny official checkpoints with random weights: key names and config.json written out by hand.

Nothing here comes from mobilemm's own tables, so that a wrong name there cannot hide.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.sentencepiece_model import train_sentencepiece

HIDDEN, FFN, LAYERS, HEADS, VOCABULARY = 32, 40, 2, 4, 320
VISION, VISION_FFN, VISION_LAYERS, VISION_HEADS = 12, 20, 4, 3
SIZE, PATCH = 24, 4
GRID = SIZE // PATCH

OFFICIAL_KINDS = ("ldpnet", "ldpnetv2", "llava", "llava-embedded")
ALL_KINDS = (*OFFICIAL_KINDS, "llava-hf")


@dataclass
class Official:
    """A checkpoint on disk, and what is in it."""

    folder: Path
    kind: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    tower: dict[str, Tensor]
    tower_config: dict[str, Any]
    tower_folder: Path | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    @property
    def language_model(self) -> dict[str, Tensor]:
        if self.kind == "llava-hf":
            return self.part("language_model.")
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if not name.startswith(("model.vision_tower.", "model.mm_projector."))
        }


def language_model_shapes(vocabulary: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for projection in "qkvo":
            shapes[f"{at}.self_attn.{projection}_proj.weight"] = (HIDDEN, HIDDEN)
        shapes |= {
            f"{at}.mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{at}.mlp.up_proj.weight": (FFN, HIDDEN),
            f"{at}.mlp.down_proj.weight": (HIDDEN, FFN),
            f"{at}.input_layernorm.weight": (HIDDEN,),
            f"{at}.post_attention_layernorm.weight": (HIDDEN,),
        }
    return {**shapes, "model.norm.weight": (HIDDEN,), "lm_head.weight": (vocabulary, HIDDEN)}


def tower_shapes() -> dict[str, tuple[int, ...]]:
    """Names as in `openai/clip-vit-*`, behind `vision_model.`."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (VISION,),
        "embeddings.patch_embedding.weight": (VISION, 3, PATCH, PATCH),
        "embeddings.position_embedding.weight": (GRID * GRID + 1, VISION),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{norm}.weight": (VISION,), f"{norm}.bias": (VISION,)}
    for layer in range(VISION_LAYERS):
        at = f"encoder.layers.{layer}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"):
            shapes |= {f"{at}.{name}.weight": (VISION, VISION), f"{at}.{name}.bias": (VISION,)}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{at}.{norm}.weight": (VISION,), f"{at}.{norm}.bias": (VISION,)}
        shapes |= {
            f"{at}.mlp.fc1.weight": (VISION_FFN, VISION),
            f"{at}.mlp.fc1.bias": (VISION_FFN,),
            f"{at}.mlp.fc2.weight": (VISION, VISION_FFN),
            f"{at}.mlp.fc2.bias": (VISION,),
        }
    return shapes


def projector_shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Names behind `model.mm_projector.`"""
    if kind == "ldpnet":
        shapes: dict[str, tuple[int, ...]] = {
            "model.mlp.1.weight": (HIDDEN, VISION),
            "model.mlp.1.bias": (HIDDEN,),
            "model.mlp.3.weight": (HIDDEN, HIDDEN),
            "model.mlp.3.bias": (HIDDEN,),
        }
        for block in (1, 2):
            at = f"model.mb_block.{block}.block"
            shapes |= {
                f"{at}.0.0.weight": (HIDDEN, 1, 3, 3),
                f"{at}.0.1.weight": (HIDDEN,),
                f"{at}.0.1.bias": (HIDDEN,),
                f"{at}.1.fc1.weight": (HIDDEN // 4, HIDDEN, 1, 1),
                f"{at}.1.fc1.bias": (HIDDEN // 4,),
                f"{at}.1.fc2.weight": (HIDDEN, HIDDEN // 4, 1, 1),
                f"{at}.1.fc2.bias": (HIDDEN,),
                f"{at}.2.0.weight": (HIDDEN, HIDDEN, 1, 1),
                f"{at}.2.1.weight": (HIDDEN,),
                f"{at}.2.1.bias": (HIDDEN,),
            }
        return shapes
    if kind == "ldpnetv2":
        return {
            "mlp.mlp.0.weight": (HIDDEN, VISION),
            "mlp.mlp.0.bias": (HIDDEN,),
            "mlp.mlp.2.weight": (HIDDEN, HIDDEN),
            "mlp.mlp.2.bias": (HIDDEN,),
            "peg.peg.0.weight": (HIDDEN, 1, 3, 3),
            "peg.peg.0.bias": (HIDDEN,),
        }
    first, second = ("linear_1", "linear_2") if kind == "llava-hf" else ("0", "2")
    return {
        f"{first}.weight": (HIDDEN, VISION),
        f"{first}.bias": (HIDDEN,),
        f"{second}.weight": (HIDDEN, HIDDEN),
        f"{second}.bias": (HIDDEN,),
    }


def random_tensors(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """Weights large enough that every tensor shows in the logits."""
    tensors = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        if len(shape) == 1 and name.endswith("weight"):
            value = 1 + 0.2 * value
        elif len(shape) > 1:
            fan_in = math.prod(shape[1:]) if "embed" not in name else 1
            value = value / math.sqrt(fan_in)
        else:
            value = 0.2 * value
        tensors[name] = value.to(dtype)
    return tensors


CLIP_CONFIG = {
    "hidden_size": VISION,
    "intermediate_size": VISION_FFN,
    "num_hidden_layers": VISION_LAYERS,
    "num_attention_heads": VISION_HEADS,
    "image_size": SIZE,
    "patch_size": PATCH,
    "projection_dim": 8,
}
LLAMA_CONFIG = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCABULARY,
}


def official_config(kind: str) -> dict[str, Any]:
    """config.json with every key that the published files of this kind have."""
    if kind == "llava-hf":
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": -100,
            "image_token_index": VOCABULARY,
            "model_type": "llava",
            "pad_token_id": VOCABULARY + 1,
            "projector_hidden_act": "gelu",
            "text_config": {
                "_name_or_path": "lmsys/vicuna-7b-v1.5",
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "torch_dtype": "float16",
                **LLAMA_CONFIG,
                "vocab_size": VOCABULARY + 8,
            },
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.36.0.dev0",
            "vision_config": {"model_type": "clip_vision_model", "vocab_size": 32000, **CLIP_CONFIG},
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        }
    common = {
        **LLAMA_CONFIG,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": 0.02,
        "mm_hidden_size": VISION,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "tower",
        "pretraining_tp": 1,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
    }
    if kind.startswith("llava"):
        return {
            **common,
            "_name_or_path": "llava-v1.5-7b",
            "architectures": ["LlavaLlamaForCausalLM"],
            "freeze_mm_vision_resampler": False,
            "max_length": 4096,
            "mm_projector_type": "mlp2x_gelu",
            "mm_resampler_type": None,
            "model_type": "llava",
            "rms_norm_eps": 1e-5,
            "torch_dtype": "float16",
            "transformers_version": "4.31.0",
            "tune_mm_vision_resampler": False,
            "unfreeze_mm_vision_tower": False,
        }
    return {
        **common,
        "_name_or_path": "mtgv/MobileLLaMA-1.4B-Chat",
        "architectures": ["MobileLlamaForCausalLM"],
        "max_sequence_length": 2048,
        "mm_projector_lr": None,
        "mm_projector_type": kind,
        "model_type": "mobilevlm",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "vision_tower_type": "clip",
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_weights(folder: Path, tensors: dict[str, Tensor], form: str = "bin") -> None:
    """`form`: bin, legacy-bin, sharded-bin, safetensors or sharded-safetensors."""
    suffix = ".safetensors" if form.endswith("safetensors") else ".bin"
    stem = "model" if suffix == ".safetensors" else "pytorch_model"

    def write(path: Path, part: dict[str, Tensor]) -> None:
        if suffix == ".safetensors":
            save_file(part, path, metadata={"format": "pt"})
        else:
            torch.save(part, path, _use_new_zipfile_serialization=form != "legacy-bin")

    if not form.startswith("sharded"):
        write(folder / f"{stem}{suffix}", tensors)
        return
    names = list(tensors)
    weight_map = {}
    for index in range(3):
        file = f"{stem}-{index + 1:05}-of-00003{suffix}"
        part = {name: tensors[name] for name in names[index::3]}
        write(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        folder / f"{stem}{suffix}.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
    )


def added_token(content: str) -> dict[str, Any]:
    return {
        "__type": "AddedToken",
        "content": content,
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    """A LLaMA-like tokenizer.model: BPE with byte fallback, <unk> 0, <s> 1, </s> 2, no normalization."""
    sentences = [
        "A chat between a curious user and an artificial intelligence assistant.",
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        "USER: What is this? ASSISTANT: A cat on the grass.",
    ] * 10
    return train_sentencepiece(sentences, VOCABULARY)


def write_tokenizer(folder: Path, model: bytes, *, image_tokens: bool = False, **settings: Any) -> None:
    """tokenizer.model and its settings, as the official folders hold them (pad is <unk>).

    With `image_tokens` the two tokens that llava-hf adds.
    """
    (folder / "tokenizer.model").write_bytes(model)
    specials = {
        "bos_token": added_token("<s>"),
        "eos_token": added_token("</s>"),
        "unk_token": added_token("<unk>"),
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            **specials,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
            "pad_token": None,
            "padding_side": "right",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
            **settings,
        },
    )
    if image_tokens:
        write_json(folder / "added_tokens.json", {"<image>": VOCABULARY, "<pad>": VOCABULARY + 1})
    pad = "<pad>" if image_tokens else "<unk>"
    plain = {name: {**token} for name, token in specials.items()}
    for token in plain.values():
        del token["__type"]
    write_json(folder / "special_tokens_map.json", {**plain, "pad_token": pad})


@pytest.fixture
def official_checkpoint(tmp_path: Path, sentencepiece_model: bytes) -> Callable[..., Official]:
    """A function that writes an official checkpoint of a kind, and says what is in it.

    kind: ldpnet and ldpnetv2 (MobileVLM V1 and V2), llava (tower in a folder of its own), llava-embedded,
    llava-hf (published names). `config` overrides keys of config.json, None takes one out.
    """

    def make(
        kind: str,
        *,
        form: str = "bin",
        dtype: torch.dtype = torch.float32,
        config: dict[str, Any] | None = None,
        extra: dict[str, Tensor] | None = None,
        name: str = "checkpoint",
        seed: int = 0,
    ) -> Official:
        folder = tmp_path / name
        folder.mkdir()
        generator = torch.Generator().manual_seed(seed)
        settings = official_config(kind) | (config or {})
        vocabulary = VOCABULARY + 8 if kind == "llava-hf" else VOCABULARY
        text = random_tensors(language_model_shapes(vocabulary), dtype, generator)
        tower = random_tensors(tower_shapes(), dtype, generator)
        projector = random_tensors(projector_shapes(kind), dtype, generator)
        if kind == "llava-hf":
            tensors = {
                **{f"vision_tower.vision_model.{name}": tensor for name, tensor in tower.items()},
                **{f"multi_modal_projector.{name}": tensor for name, tensor in projector.items()},
                **{f"language_model.{name}": tensor for name, tensor in text.items()},
            }
        else:
            tensors = {**text, **{f"model.mm_projector.{name}": value for name, value in projector.items()}}
            if kind != "llava":
                prefix = "model.vision_tower.vision_tower.vision_model."
                tensors |= {f"{prefix}{name}": tensor for name, tensor in tower.items()}
        tower_config = {"model_type": "clip_vision_model", **CLIP_CONFIG}
        tower_folder = None
        if kind != "llava-hf":
            tower_folder = folder / "tower"
            tower_folder.mkdir()
            write_json(tower_folder / "config.json", tower_config | {"architectures": ["CLIPVisionModel"]})
            if kind == "llava":
                stored = {f"vision_model.{name}": tensor for name, tensor in tower.items()}
                save_file(stored, tower_folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", settings)
        write_weights(folder, {**tensors, **(extra or {})}, form)
        write_tokenizer(folder, sentencepiece_model, image_tokens=kind == "llava-hf")
        return Official(folder, kind, settings, tensors, tower, tower_config, tower_folder, dict(extra or {}))

    return make


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches a hub, and none waits for one."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
