"""GGUF files against llama.cpp itself: its tokenizer, its logits, its image embeddings."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

import mobilemm
from mobilemm.data.templates import find_template
from mobilemm.errors import MobileMMError
from mobilemm.export.targets.gguf import (
    CHAT_TEMPLATES,
    LLAMA3_SPLIT,
    PRE_TOKENIZERS,
    add_tokenizer,
    write_gguf,
)
from mobilemm.models import MobileMMConfig, MobileMMForConditionalGeneration
from mobilemm.models.checkpoints import Loaded, save
from mobilemm.models.checkpoints.processors import make_processor, read_tokenizer
from tests.export.targets.llama_cpp_judge import (
    ENGLISH,
    TEXTS,
    llama_cpp_image_embeddings,
    llama_cpp_logits,
    opened,
)
from tests.sentencepiece_model import train_sentencepiece

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
VOCABULARY = 400
# Once a release of llama.cpp has issue 25814 mended, this is False, and the same files give the same tokens.
LLAMA_CPP_PUTS_CLASS_TOKEN_LAST = True


# --- MobileVLM and LLaVA at tiny width --------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA's kind of tokenizer.model: BPE with byte fallback, no normalization."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(ENGLISH.splitlines() * 4, VOCABULARY))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def tiny(sentencepiece_folder: Path) -> Callable[..., Loaded]:
    """A function that makes a model shaped like MobileVLM, with random weights that show in the output."""

    def make(projector: dict[str, Any], text: Any = None, **options: Any) -> Loaded:
        text = text or LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY + 16,  # rows behind the tokenizer's, as padded tables have
            max_position_embeddings=1024,
            rms_norm_eps=1e-6,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=options.pop("image_size", 336),
            patch_size=14,
            projection_dim=24,
            hidden_act=options.pop("hidden_act", "quick_gelu"),
        )
        config = MobileMMConfig(vision_config=vision, text_config=text, projector=projector, **options)
        model = MobileMMForConditionalGeneration(config).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, value in model.named_parameters():
                noise = torch.randn(value.shape, generator=generator)
                if value.ndim > 1 and "embed" not in name:
                    noise /= value[0].numel() ** 0.5
                elif value.ndim == 1:
                    noise = 0.2 * noise + name.endswith("weight")
                value.copy_(noise)
        return Loaded(
            model, make_processor(model, read_tokenizer(sentencepiece_folder, text), CLIP_MEAN, CLIP_STD)
        )

    return make


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """336×336 with large shapes and fine noise, so that neither side may resize it."""
    rows, columns = np.mgrid[0:336, 0:336] / 336
    noise = np.random.default_rng(0).integers(-40, 40, (336, 336, 3))
    waves = np.stack([np.sin(9 * rows), np.cos(7 * columns), np.sin(5 * (rows + columns))], -1)
    return Image.fromarray(np.clip(128 + 85 * waves + noise, 0, 255).astype(np.uint8))


def image_embeddings(model: Any, pixels: Tensor, *, class_token_last: bool) -> Tensor:
    """Our image features; with `class_token_last` as they become when encoder and token order are at odds.

    llama.cpp puts the class token behind the patches, adds the positions and drops the first token as if it
    stood before them (ggml-org/llama.cpp issue 25814, since pull request 13321).
    """
    if not class_token_last:
        return model.get_image_features(pixels)[0]
    vision = model.vision_encoder.model
    embeddings = vision.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).mT
    tokens = torch.cat([patches, embeddings.class_embedding.expand(1, 1, -1)], 1)
    tokens = vision.pre_layrnorm(tokens + embeddings.position_embedding.weight)
    features = vision.encoder(inputs_embeds=tokens).last_hidden_state[:, 1:]
    return model.projector(features)[0]


def likeness(found: Tensor, wanted: Tensor) -> float:
    """The least cosine of any token, without what all tokens share, so that exchanged tokens show."""
    centre = wanted.mean(0)
    return float(torch.cosine_similarity(found - centre, wanted - centre, -1).min())


def compare(loaded: Loaded, files: Any, picture: Image.Image) -> None:
    model, processor = loaded
    pixels = processor.image_processor([picture], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = image_embeddings(model, pixels, class_token_last=LLAMA_CPP_PUTS_CLASS_TOKEN_LAST)
    found = llama_cpp_image_embeddings(files.llm, files.mmproj, picture, wanted.shape[1])
    assert found.shape == wanted.shape == (model.num_image_tokens, 64)
    assert likeness(found, wanted) >= 0.999
    assert (found - wanted).norm() / wanted.norm() < 0.01


PROJECTORS = ["ldpnetv2", "ldpnet", "mlp2x_gelu", "linear"]


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("kind", PROJECTORS)
def test_image_embeddings(
    tiny: Callable[..., Loaded], tmp_path: Path, picture: Image.Image, kind: str, dtype: Any
) -> None:
    loaded = tiny({"type": kind})
    compare(loaded, write_gguf(*loaded, tmp_path, dtype, mmproj=True), picture)


@pytest.mark.parametrize(
    "options", [{"vision_feature_layer": -1}, {"vision_feature_layer": 2}, {"hidden_act": "gelu"}]
)
def test_selected_layer_and_activation(
    tiny: Callable[..., Loaded], tmp_path: Path, picture: Image.Image, options: dict[str, Any]
) -> None:
    loaded = tiny({"type": "mlp2x_gelu"}, **options)
    compare(loaded, write_gguf(*loaded, tmp_path), picture)


@pytest.mark.parametrize(
    ("kind", "layout"), [("ldpnetv2", "mobilevlm"), ("ldpnet", "mobilevlm"), ("mlp2x_gelu", "llava")]
)
def test_official_checkpoint_from_disk(
    tiny: Callable[..., Loaded], tmp_path: Path, picture: Image.Image, kind: str, layout: str
) -> None:
    made = tiny({"type": kind}, keep_unused_layers=True)
    save(made.model.to(torch.bfloat16), tmp_path / "checkpoint", made.processor, layout=layout)
    tower = made.model.config.vision_config
    tower.architectures = ["CLIPVisionModel"]
    tower.save_pretrained(tmp_path / "checkpoint" / "vision_tower")
    loaded = mobilemm.load(tmp_path / "checkpoint")
    files = write_gguf(*loaded, tmp_path, "f32")
    reference = mobilemm.load(tmp_path / "checkpoint", dtype="float32")
    compare(reference, files, picture)
    check_text(reference, files.llm, 1e-3)


def check_text(loaded: Loaded, path: Path, tolerance: float) -> None:
    tokenizer = loaded.processor.tokenizer
    ids = tokenizer(ENGLISH[:300])["input_ids"]
    with torch.no_grad():
        wanted = loaded.model.language_model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(llama_cpp_logits(path, ids), wanted, atol=tolerance, rtol=tolerance)


LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "options",
    [
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32},
    ],
    ids=lambda options: "-".join(options),
)
def test_logits_of_llama_variants(
    tiny: Callable[..., Loaded], tmp_path: Path, options: dict[str, Any]
) -> None:
    loaded = tiny({"type": "linear"}, LlamaConfig(**LLAMA | options))
    path = write_gguf(*loaded, tmp_path, "f32", mmproj=False).llm
    check_text(loaded, path, 1e-3)
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert ("output.weight" in names) == (not options.get("tie_word_embeddings", False))


def test_matrices_that_do_not_divide_stay_f16(tiny: Callable[..., Loaded], tmp_path: Path) -> None:
    loaded = tiny({"type": "linear"}, LlamaConfig(**LLAMA | {"intermediate_size": 100}))
    path = write_gguf(*loaded, tmp_path, "q4_0", mmproj=False).llm
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q4_0"
    assert (types["token_embd.weight"], types["output.weight"]) == ("Q4_0", "Q8_0")
    assert types["blk.0.attn_norm.weight"] == "F32"


# --- tokenizers ------------------------------------------------------------------------------------------


def test_sentencepiece_is_tokenized_alike(
    tiny: Callable[..., Loaded], tmp_path: Path, sentencepiece_folder: Path
) -> None:
    loaded = tiny({"type": "linear"})
    path = write_gguf(*loaded, tmp_path, mmproj=False).llm
    original = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    with opened(path, vocab_only=True) as model:
        assert model.n_vocab() == VOCABULARY + 16
        assert (model.token_bos(), model.token_eos()) == (1, 2)
        for text in TEXTS:
            found = model.tokenize(text.encode(), add_bos=True, special=True)
            assert found == loaded.processor.tokenizer(text)["input_ids"]
            assert found == [1, *original.encode(text)]
        spoken = "USER: Hi ASSISTANT: Yes.</s>USER: More"
        assert (
            model.tokenize(spoken.encode(), add_bos=True, special=True)
            == loaded.processor.tokenizer(spoken)["input_ids"]
        )


def byte_level_bpe(pre_tokenizer: Any, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bpe.pre_tokenizer = pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([ENGLISH, *TEXTS * 3], trainer)
    bpe.add_tokens([AddedToken("<note>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


def byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


BYTE_LEVEL_TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt-2": lambda: byte_level_bpe(byte_level()),
    "smollm": lambda: byte_level_bpe(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])
    ),
    "llama-bpe": lambda: byte_level_bpe(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(_regex(LLAMA3_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        ignore_merges=True,
    ),
}


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_bpe_is_tokenized_alike(tiny: Callable[..., Loaded], tmp_path: Path, name: str) -> None:
    tokenizer = BYTE_LEVEL_TOKENIZERS[name]()
    loaded = tiny({"type": "linear"}, LlamaConfig(**LLAMA | {"vocab_size": len(tokenizer) + 5}))
    processor = make_processor(loaded.model, tokenizer, CLIP_MEAN, CLIP_STD)
    path = write_gguf(loaded.model, processor, tmp_path, mmproj=False).llm
    with opened(path, vocab_only=True) as model:
        assert model.metadata["tokenizer.ggml.pre"] == name
        for text in [*TEXTS, "<|im_start|>user\nHi <note> 12<|im_end|>\n"]:
            assert model.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"]


def test_the_pre_tokenizers_differ() -> None:
    """The texts above tell the three ways of cutting apart; otherwise the test proves nothing."""
    cuts = {
        name: str([pre_tokenizer.pre_tokenize_str(text) for text in TEXTS])
        for name, make in BYTE_LEVEL_TOKENIZERS.items()
        if (pre_tokenizer := make().backend_tokenizer.pre_tokenizer)
    }
    assert all(one != other for one, other in itertools.combinations(cuts.values(), 2))


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_chat_templates_render_as_ours(name: str) -> None:
    jinja = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATES[name])
    turns = [("user", "Who's there?"), ("assistant", "Me."), ("user", "Who?"), ("assistant", "I.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    system = {"role": "system", "content": "Be brief."}
    for count, begin, prompt in itertools.product(range(1, 5), ([], [system]), (False, True)):
        conversation = [*begin, *messages[:count]]
        segments = find_template(name).render(conversation, prompt)
        wanted = "".join(segment.text for segment in segments)
        assert jinja.render(messages=conversation, add_generation_prompt=prompt) == wanted


# --- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("projector", "options", "message"),
    [
        ({"type": "ldpnetv2"}, {"image_size": 224}, "144 tokens of a 24×24 grid, not 64 of 16×16"),
        ({"type": "ldpnetv2", "num_tokens": 64}, {}, "144 tokens of a 24×24 grid, not 64 of 24×24"),
        ({"type": "pixel_shuffle"}, {}, "no projector 'pixel_shuffle'"),
        ({"type": "mlp3x_gelu"}, {}, "no projector 'mlp3x_gelu'"),
        ({"type": "linear"}, {"vision_feature_select_strategy": "full"}, "class token"),
        ({"type": "linear"}, {"hidden_act": "relu"}, "no activation 'relu'"),
    ],
)
def test_vision_parts_that_llama_cpp_lacks(
    tiny: Callable[..., Loaded], tmp_path: Path, projector: Any, options: Any, message: str
) -> None:
    with pytest.raises(MobileMMError, match=message):
        write_gguf(*tiny(projector, **options), tmp_path / "out", mmproj=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (Qwen2Config(**LLAMA), "language model 'qwen2'"),
        (LlamaConfig(**LLAMA, hidden_act="gelu"), "no activation 'gelu'"),
        (
            LlamaConfig(**LLAMA, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
            "RoPE of the type 'yarn'",
        ),
    ],
)
def test_language_models_that_are_not_written(
    tiny: Callable[..., Loaded], tmp_path: Path, text: Any, message: str
) -> None:
    with pytest.raises(MobileMMError, match=message):
        write_gguf(*tiny({"type": "linear"}, text), tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_dtype_and_foreign_model(tiny: Callable[..., Loaded], tmp_path: Path) -> None:
    loaded = tiny({"type": "linear"})
    with pytest.raises(MobileMMError, match="no dtype 'q2_k' here; known: f32, f16"):
        write_gguf(*loaded, tmp_path, "q2_k")  # type: ignore[arg-type]
    with pytest.raises(MobileMMError, match="not of LlamaForCausalLM"):
        write_gguf(loaded.model.language_model, loaded.processor, tmp_path)


def test_unknown_pre_tokenizer(tiny: Callable[..., Loaded]) -> None:
    loaded = tiny({"type": "linear"})
    tokenizer = byte_level_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True))
    processor = make_processor(loaded.model, tokenizer, CLIP_MEAN, CLIP_STD)
    with pytest.raises(MobileMMError, match="none of gpt-2, smollm, llama-bpe"):
        add_tokenizer(gguf.GGUFWriter(None, "llama"), processor, 600)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "f32"), (1e6, "f16"), (float("inf"), "q8_0")])
def test_values_that_do_not_fit_leave_no_file(
    tiny: Callable[..., Loaded], tmp_path: Path, value: float, dtype: Any
) -> None:
    loaded = tiny({"type": "linear"})
    with torch.no_grad():
        loaded.model.language_model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(MobileMMError, match=r"blk\.1\.ffn_up\.weight"):
        write_gguf(*loaded, tmp_path, dtype, mmproj=False)
    assert not list(tmp_path.iterdir())
