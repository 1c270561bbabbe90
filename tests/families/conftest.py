"""Tiny random models of each family that `mobilemm` reads through transformers' own classes, as folders.

Each has its family's real model, processor and image processor classes, the shape of its chat template, and
a byte-level tokenizer trained here that knows the family's special tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = ["What is this? A red square on a white ground. The user asks, the assistant answers.", "Und das? 😀"]
WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CONTEXT = {"max_position_embeddings": 1024}


@dataclass(frozen=True)
class Family:
    """A family's name, the folder of its tiny model, and what it takes."""

    name: str
    folder: Path
    several_pictures: bool = True
    needs_picture: bool = False
    several_turns: bool = True
    image_size: int | None = None
    image_tokens: int | None = None


def tokenizer(*special: str, eos: str, bos: str | None = None, **named: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with these special tokens; `named` ones become its attributes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokens = list(dict.fromkeys(["<pad>", eos, *([bos] if bos else []), *special, *named.values()]))
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(tokens),
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token=eos,
        bos_token=bos,
        extra_special_tokens=named or None,
    )


def save(folder: Path, config: Any, processor: Any) -> None:
    """The processor, and a random model whose answers depend on what it is shown."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Large enough that the answer is not the same token over and over.
                parameter.normal_(0, 0.05 if "embed_tokens" in name else 0.4)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def ids(processor: Any) -> dict[str, int]:
    text = processor.tokenizer if hasattr(processor, "tokenizer") else processor
    return {
        "bos_token_id": text.bos_token_id if text.bos_token_id is not None else text.eos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": text.pad_token_id,
    }


def smolvlm(folder: Path) -> Family:
    return _idefics3_like(folder, "smolvlm")


def idefics3(folder: Path) -> Family:
    return _idefics3_like(folder, "idefics3")


def _idefics3_like(folder: Path, name: str) -> Family:
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    text = tokenizer(
        *[
            "<fake_token_around_image>",
            "<image>",
            "<global-img>",
            "<end_of_utterance>",
            "<|im_start|>",
            *rows,
        ],
        eos="<end_of_utterance>",
        bos="<|im_start|>",
    )
    template = (
        "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
        "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
        "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
        "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )
    prefix = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[name]
    images = getattr(transformers, f"{prefix}ImageProcessor")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    parts = [images, text]
    if name == "smolvlm":
        parts.append(
            transformers.SmolVLMVideoProcessor(
                size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, num_frames=4, fps=1
            )
        )
    processor = getattr(transformers, f"{prefix}Processor")(*parts, image_seq_len=4, chat_template=template)
    config = getattr(transformers, f"{prefix}Config")(
        vision_config={**WIDTHS, "image_size": 32, "patch_size": 8},
        text_config={
            **WIDTHS,
            **CONTEXT,
            **ids(text),
            "model_type": "llama",
            "num_key_value_heads": 1,
            "vocab_size": len(text),
        },
        scale_factor=2,
        image_token_id=text.convert_tokens_to_ids("<image>"),
        pad_token_id=text.pad_token_id,
    )
    save(folder, config, processor)
    return Family(name, folder, image_size=32)


def fast_vlm(folder: Path) -> Family:
    text = tokenizer("<image>", "<|im_start|>", "<|im_end|>", eos="<|im_end|>")
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(
            size={"shortest_edge": 128},
            crop_size={"height": 128, "width": 128},
            image_mean=[0.0] * 3,
            image_std=[1.0] * 3,
        ),
        text,
        patch_size=64,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "<image>\n"),
    )
    config = transformers.FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "global_pool": "avg",
            "model_args": {
                "inference_mode": True,
                "layers": [1, 1, 1, 1, 1],
                "embed_dims": [8, 8, 16, 32, 32],
            },
            "hidden_size": 64,
        },
        text_config={**WIDTHS, **CONTEXT, **ids(text), "model_type": "qwen2", "num_key_value_heads": 1}
        | {"vocab_size": len(text)},
        image_token_index=text.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    save(folder, config, processor)
    return Family("fast_vlm", folder, image_size=128, image_tokens=4)


def internvl(folder: Path) -> Family:
    text = tokenizer(
        "<|im_start|>",
        "<|im_end|>",
        eos="<|im_end|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(
            size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=2
        ),
        text,
        transformers.InternVLVideoProcessor(size={"height": 56, "width": 56}),
        image_seq_length=4,
        chat_template=CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )
    config = transformers.InternVLConfig(
        vision_config={**WIDTHS, "image_size": [56, 56], "patch_size": [14, 14]},
        text_config={**WIDTHS, **CONTEXT, **ids(text), "model_type": "qwen2", "num_key_value_heads": 1}
        | {"vocab_size": len(text)},
        image_token_id=text.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    save(folder, config, processor)
    return Family("internvl", folder, image_size=56)


def qwen2_vl(folder: Path) -> Family:
    return _qwen(folder, "qwen2_vl", "Qwen2VL", {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2})


def qwen2_5_vl(folder: Path) -> Family:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    return _qwen(folder, "qwen2_5_vl", "Qwen2_5_VL", vision)


def qwen3_vl(folder: Path) -> Family:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return _qwen(folder, "qwen3_vl", "Qwen3VL", vision)


def _qwen(folder: Path, name: str, prefix: str, vision: dict[str, Any]) -> Family:
    marks = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
    text = tokenizer("<|im_start|>", "<|im_end|>", *marks, eos="<|im_end|>")
    pixels = {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}}
    videos = "Qwen3VLVideoProcessor" if name == "qwen3_vl" else "Qwen2VLVideoProcessor"
    processor = getattr(transformers, f"{prefix}Processor")(
        transformers.Qwen2VLImageProcessor(**pixels, patch_size=14, merge_size=2),
        text,
        getattr(transformers, videos)(patch_size=14, merge_size=2),
        chat_template=CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    token = dict(zip(marks, text.convert_tokens_to_ids(marks), strict=True))
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = getattr(transformers, f"{prefix}Config")(
        vision_config={"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, **vision},
        text_config={**WIDTHS, **CONTEXT, **ids(text), "num_key_value_heads": 1, "vocab_size": len(text)}
        | {"rope_parameters": rope, "head_dim": 16},
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
    )
    save(folder, config, processor)
    return Family(name, folder)


def lfm2_vl(folder: Path) -> Family:
    rows = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 4) for column in range(1, 4)]
    text = tokenizer(
        "<|im_start|>",
        "<|im_end|>",
        *rows,
        eos="<|im_end|>",
        bos="<|startoftext|>",
        image_token="<image>",
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail="<|img_thumbnail|>",
    )
    processor = transformers.Lfm2VlProcessor(
        transformers.Lfm2VlImageProcessor(
            tile_size=32,
            encoder_patch_size=8,
            downsample_factor=2,
            min_image_tokens=1,
            max_image_tokens=4,
            max_num_patches=16,
            min_tiles=2,
            max_tiles=4,
        ),
        text,
        chat_template="{{ bos_token }}" + CHATML.replace("IMAGE", "<image>"),
    )
    config = transformers.Lfm2VlConfig(
        vision_config={**WIDTHS, "patch_size": 8, "num_patches": 16},
        text_config={**WIDTHS, **CONTEXT, **ids(text), "num_key_value_heads": 1, "vocab_size": len(text)}
        | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        image_token_id=text.convert_tokens_to_ids("<image>"),
        projector_hidden_size=32,
        downsample_factor=2,
    )
    save(folder, config, processor)
    return Family("lfm2_vl", folder)


def paligemma(folder: Path) -> Family:
    text = tokenizer("<image>", eos="<eos>", bos="<bos>")
    images = transformers.SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(images, text)
    config = transformers.PaliGemmaConfig(
        vision_config={**WIDTHS, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14},
        text_config={**WIDTHS, **CONTEXT, **ids(text), "model_type": "gemma", "num_key_value_heads": 1}
        | {"head_dim": 16, "vocab_size": len(text)},
        image_token_index=text.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    save(folder, config, processor)
    return Family("paligemma", folder, needs_picture=True, several_turns=False, image_size=28, image_tokens=4)


def gemma3(folder: Path) -> Family:
    text = tokenizer(
        "<start_of_turn>",
        "<end_of_turn>",
        eos="<end_of_turn>",
        bos="<bos>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    template = (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
        "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        text,
        image_seq_length=4,
        chat_template=template,
    )
    config = transformers.Gemma3Config(
        vision_config={**WIDTHS, "model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14},
        text_config={**WIDTHS, **CONTEXT, **ids(text), "num_key_value_heads": 1, "head_dim": 16}
        | {"vocab_size": len(text), "sliding_window": 64, "query_pre_attn_scalar": 16},
        mm_tokens_per_image=4,
        boi_token_index=text.boi_token_id,
        eoi_token_index=text.eoi_token_id,
        image_token_index=text.image_token_id,
    )
    save(folder, config, processor)
    return Family("gemma3", folder, image_size=56, image_tokens=4)


def llava_onevision(folder: Path) -> Family:
    text = tokenizer("<|im_start|>", "<|im_end|>", "<image>", "<video>", eos="<|im_end|>")
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(
            size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]]
        ),
        text,
        transformers.LlavaOnevisionVideoProcessor(size={"height": 28, "width": 28}),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "<image>\n"),
    )
    config = transformers.LlavaOnevisionConfig(
        vision_config={**WIDTHS, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
        | {"vision_use_head": False},
        text_config={**WIDTHS, **CONTEXT, **ids(text), "model_type": "qwen2", "num_key_value_heads": 1}
        | {"vocab_size": len(text)},
        image_token_index=text.convert_tokens_to_ids("<image>"),
        video_token_index=text.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]],
    )
    save(folder, config, processor)
    return Family("llava_onevision", folder, image_size=28)


BUILDERS: tuple[Callable[[Path], Family], ...] = (
    smolvlm,
    fast_vlm,
    internvl,
    qwen2_vl,
    qwen2_5_vl,
    qwen3_vl,
    lfm2_vl,
    paligemma,
    idefics3,
    gemma3,
    llava_onevision,
)


@pytest.fixture(scope="session", params=BUILDERS, ids=lambda build: build.__name__)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return request.param(tmp_path_factory.mktemp(request.param.__name__))


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return idefics3(tmp_path_factory.mktemp("pristine")).folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """One family's folder, to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))
