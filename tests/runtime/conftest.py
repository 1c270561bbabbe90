"""A tiny random model of mobilemm's own, with a tokenizer of the LLaMA kind (metaspace, byte fallback)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from mobilemm.models import MobileMMConfig, MobileMMForConditionalGeneration
from mobilemm.models.checkpoints import Loaded
from mobilemm.models.checkpoints.parts import make_processor
from mobilemm.runtime.bundle import Bundle, open_bundle
from tests.runtime.bundles import write_bundle

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'.,:?!\n▁"
SPECIAL = ["<unk>", "<s>", "</s>"]


def llama_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """Letters, all bytes, and these whole words; a text's first space is its tokenizer's own."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    bpe = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


@pytest.fixture(scope="session")
def llama_kind() -> PreTrainedTokenizerFast:
    return llama_tokenizer("▁What", "▁is", "▁this", "▁a", "▁line")


@pytest.fixture(scope="session")
def loaded(llama_kind: PreTrainedTokenizerFast) -> Loaded:
    """CLIP → LDPv2 (4 image tokens) → LLaMA with a context of 512, template `v1`."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = MobileMMConfig(
        vision_config=CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=32, patch_size=8),
        text_config=LlamaConfig(
            **sizes,
            num_attention_heads=2,
            vocab_size=len(llama_kind),
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.3,
        ),
        template="v1",
    )
    model = MobileMMForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    # A random model's bytes are no UTF-8; let it say letters and words.
    model.generation_config.suppress_tokens = [2, *range(3, 3 + 256)]
    return Loaded(model, make_processor(model, llama_kind, [0.5] * 3, [0.5] * 3))


@pytest.fixture(scope="session")
def shared_folder(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(loaded.model, loaded.processor, tmp_path_factory.mktemp("bundles") / "shared")


@pytest.fixture(scope="session")
def bundle(shared_folder: Path) -> Bundle:
    """`loaded` as an ONNX bundle, whose decoder keeps its cache in shared buffers."""
    return open_bundle(shared_folder)


@pytest.fixture(scope="session")
def coreml_bundle(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """`loaded` as a Core ML bundle in float16, with a prefill of 16 positions."""
    folder = tmp_path_factory.mktemp("bundles") / "coreml"
    return open_bundle(write_bundle(loaded.model, loaded.processor, folder, "coreml", prefill=16))


@pytest.fixture(scope="session")
def concatenated(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same in standard operators, with a cache that is concatenated."""
    folder = tmp_path_factory.mktemp("bundles") / "concatenated"
    return open_bundle(write_bundle(loaded.model, loaded.processor, folder, standard_ops=True))
