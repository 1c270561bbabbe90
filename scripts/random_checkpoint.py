"""Writes a checkpoint with random weights in Meituan's MobileVLM V2 layout, to try exports at full size.

    python scripts/random_checkpoint.py FOLDER [--size 1.7B] [--dtype bfloat16]

"1.7B" has every dimension of the published MobileVLM_V2-1.7B: CLIP-L at 336 pixels, LDPv2, and a LLaMA of 24
layers, 2048 wide, with 32,000 tokens. "tiny" is the same in small. The SentencePiece tokenizer is trained on
the calibration set's words and made-up ones. One shard of weights is in memory at a time.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mobilemm.errors import MobileMMError
from mobilemm.export.calibration import read_calibration

SHARD_BYTES = 512 * 2**20
TOWER = "model.vision_tower.vision_tower.vision_model."
# Standard deviation of the language model's matrices, as LLaMA's are initialized; behind its blocks smaller,
# so that the residual stream of a deep model does not drown what it began with.
INITIALIZER_RANGE = 0.02


@dataclass(frozen=True)
class Size:
    """A model's dimensions: `v_` those of the vision tower."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    context: int
    v_hidden: int
    v_intermediate: int
    v_layers: int
    v_heads: int
    image: int
    patch: int


SIZES = {
    "1.7B": Size(2048, 5632, 24, 16, 32_000, 2048, 1024, 4096, 24, 16, 336, 14),
    "tiny": Size(64, 160, 2, 4, 2_000, 512, 32, 64, 3, 2, 56, 14),
}


def write_checkpoint(folder: Path, size: Size, dtype: torch.dtype, seed: int = 0) -> None:
    """Weights in safetensors shards, config, tower's config, tokenizer. Raises MobileMMError if it exists."""
    if folder.exists():
        raise MobileMMError(f"{folder}: exists already; remove it, or name another folder")
    (folder / "tower").mkdir(parents=True)
    _write_json(folder / "config.json", config(size, dtype))
    _write_json(folder / "tower" / "config.json", tower_config(size))
    write_tokenizer(folder, size)
    generator = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(size)
    shards = list(_shards(shapes, dtype))
    places: dict[str, str] = {}
    total = 0
    for index, names in enumerate(shards, 1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        tensors = {name: random_tensor(name, shapes[name], size, generator).to(dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors  # before the next shard's are made
    index_file = {"metadata": {"total_size": total}, "weight_map": places}
    _write_json(folder / "model.safetensors.index.json", index_file)


def _shards(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if names and held + nbytes > SHARD_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += nbytes
    yield names


def random_tensor(name: str, shape: tuple[int, ...], size: Size, generator: torch.Generator) -> Tensor:
    """Float32. Matrices keep their inputs' scale; norms are near 1, biases near 0."""
    value = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return value.mul_(0.02).add_(1.0) if _is_norm_weight(name) else value.mul_(0.02)
    if name.startswith(("model.vision_tower", "model.mm_projector")):
        fan_in = math.prod(shape[1:]) if "embedding.weight" not in name or len(shape) == 4 else size.v_hidden
        return value.div_(math.sqrt(fan_in))
    behind_block = name.endswith(("o_proj.weight", "down_proj.weight"))
    return value.mul_(INITIALIZER_RANGE / (math.sqrt(2 * size.layers) if behind_block else 1.0))


def _is_norm_weight(name: str) -> bool:
    return name.endswith("weight") and "norm" in name


def tensor_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published checkpoint's tensors."""
    wide, narrow, ffn, v_ffn = size.hidden, size.v_hidden, size.intermediate, size.v_intermediate
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocabulary, wide)}
    for layer in range(size.layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{part}_proj.weight": (wide, wide) for part in "qkvo"}
        shapes |= {
            f"{at}.mlp.gate_proj.weight": (ffn, wide),
            f"{at}.mlp.up_proj.weight": (ffn, wide),
            f"{at}.mlp.down_proj.weight": (wide, ffn),
            f"{at}.input_layernorm.weight": (wide,),
            f"{at}.post_attention_layernorm.weight": (wide,),
        }
    shapes |= {"model.norm.weight": (wide,), "lm_head.weight": (size.vocabulary, wide)}
    tokens = (size.image // size.patch) ** 2
    shapes |= {
        f"{TOWER}embeddings.class_embedding": (narrow,),
        f"{TOWER}embeddings.patch_embedding.weight": (narrow, 3, size.patch, size.patch),
        f"{TOWER}embeddings.position_embedding.weight": (tokens + 1, narrow),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{TOWER}{norm}.weight": (narrow,), f"{TOWER}{norm}.bias": (narrow,)}
    linears = {f"self_attn.{part}_proj": (narrow, narrow) for part in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (v_ffn, narrow), "mlp.fc2": (narrow, v_ffn)}
    for layer in range(size.v_layers):
        at = f"{TOWER}encoder.layers.{layer}"
        for name, shape in linears.items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": (shape[0],)}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{at}.{norm}.weight": (narrow,), f"{at}.{norm}.bias": (narrow,)}
    projector = "model.mm_projector"
    return shapes | {
        f"{projector}.mlp.mlp.0.weight": (wide, narrow),
        f"{projector}.mlp.mlp.0.bias": (wide,),
        f"{projector}.mlp.mlp.2.weight": (wide, wide),
        f"{projector}.mlp.mlp.2.bias": (wide,),
        f"{projector}.peg.peg.0.weight": (wide, 1, 3, 3),
        f"{projector}.peg.peg.0.bias": (wide,),
    }


def config(size: Size, dtype: torch.dtype) -> dict[str, Any]:
    """config.json with the keys of the published one; the tower is a folder beside it."""
    return {
        "_name_or_path": "mtgv/MobileLLaMA-1.4B-Chat",
        "architectures": ["MobileLlamaForCausalLM"],
        "model_type": "mobilevlm",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "hidden_act": "silu",
        "max_position_embeddings": size.context,
        "max_sequence_length": size.context,
        "rms_norm_eps": 1e-6,
        "vocab_size": size.vocabulary,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None,
        "initializer_range": INITIALIZER_RANGE,
        "mm_hidden_size": size.v_hidden,
        "mm_projector_lr": None,
        "mm_projector_type": "ldpnetv2",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "tower",
        "vision_tower_type": "clip",
        "pretraining_tp": 1,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.33.1",
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
    }


def tower_config(size: Size) -> dict[str, Any]:
    """The config.json of `openai/clip-vit-large-patch14-336`, but for its dimensions."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": size.v_hidden,
        "intermediate_size": size.v_intermediate,
        "num_hidden_layers": size.v_layers,
        "num_attention_heads": size.v_heads,
        "image_size": size.image,
        "patch_size": size.patch,
        "projection_dim": min(768, size.v_hidden),
    }


def write_tokenizer(folder: Path, size: Size) -> None:
    """tokenizer.model, LLaMA's kind: BPE with byte fallback; and the settings of the published folders."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_sentences(size.vocabulary)),
        model_writer=model,
        vocab_size=size.vocabulary,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    specials = {
        f"{name}_token": {"content": content, **flags}
        for name, content in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))
    }
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            **{name: {"__type": "AddedToken", **token} for name, token in specials.items()},
            "clean_up_tokenization_spaces": False,
            "model_max_length": size.context,
            "pad_token": None,
            "padding_side": "right",
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
        },
    )
    _write_json(folder / "special_tokens_map.json", {**specials, "pad_token": "<unk>"})


def _sentences(vocabulary: int) -> Iterator[str]:
    """The calibration set's words, many times, so that they get pieces first; and as many made-up words."""
    for sample in read_calibration():
        for message in sample.messages:
            for part in message["content"]:
                for line in part.get("text", "").splitlines():
                    yield from [line] * 5
    draw = random.Random(0)
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
    for _ in range(vocabulary // 4):
        yield " ".join("".join(draw.choices(syllables, k=draw.randint(2, 4))) for _ in range(8))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1.7B")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_checkpoint(given.folder, SIZES[given.size], getattr(torch, given.dtype), given.seed)


if __name__ == "__main__":
    try:
        main()
    except MobileMMError as error:
        sys.exit(f"error: {error}")
