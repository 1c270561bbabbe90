"""llama.cpp's GGUF: the language model as one file, vision encoder and projector as a second (mmproj).

Unlike the other targets this one takes the whole model: llama.cpp has its own graphs, and what a file must
give it is settings, tokenizer, and weights under its names.
Sources: the GGUF specification (ggml, docs/gguf.md); llama.cpp, tools/mtmd (clip-impl.h, models/llava.cpp).
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Storage
from torch import Tensor

from mobilemm.data.templates import VicunaTemplate
from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints.layouts import LDP_NAMES
from mobilemm.models.modeling import MobileMMForConditionalGeneration

logger = logging.getLogger(__name__)

DType = Literal["f32", "f16", "q8_0", "q4_0"]

STORAGE = {"f32": Storage.F32, "f16": Storage.F16, "q8_0": Storage.Q8_0, "q4_0": Storage.Q4_0}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
# The side of the patch grid that llama.cpp's graphs of both LDP projectors are written for: 336 px / 14.
LDP_GRID = 24
LDPV2_NAMES = {"mlp.": "model.mlp.", "position.": "model.peg.0."}


class GGUFFiles(NamedTuple):
    """What was written; `mmproj` is None where llama.cpp has no such vision encoder or projector."""

    llm: Path
    mmproj: Path | None


def export_gguf(
    loaded: Any, destination: str | Path, dtype: DType = "f16", *, mmproj: bool | None = None
) -> GGUFFiles:
    """`write_gguf` for what `mobilemm.load` returned."""
    model, processor = loaded
    return write_gguf(model, processor, destination, dtype, mmproj=mmproj)


def write_gguf(
    model: Any, processor: Any, folder: str | Path, dtype: DType = "f16", *, mmproj: bool | None = None
) -> GGUFFiles:
    """Writes `llm-DTYPE.gguf` and `mmproj-f16.gguf` (`mmproj-f32.gguf` with "f32") into a folder.

    Matrices of the language model are stored as `dtype` says, vectors as f32. With "q4_0" the head, tied or
    not, takes 8 bits; a matrix whose rows are no multiple of 32 stays f16. Tensors are converted one at a
    time, and a file appears when it is whole.

    `mmproj=None` writes the second file where llama.cpp can run these parts, and logs why where it cannot;
    False leaves it out; True makes that an error. llama.cpp pads pictures to a square whatever the processor
    does, and releases with its issue 25814 confuse the order of CLIP's tokens; the file is right for those
    without.

    Raises MobileMMError naming the part that llama.cpp, or this writer, does not have.
    """
    if dtype not in get_args(DType):
        raise MobileMMError(f"GGUF has no dtype {dtype!r} here; known: {', '.join(get_args(DType))}")
    if not isinstance(model, MobileMMForConditionalGeneration):
        raise MobileMMError(
            f"GGUF is written of MobileVLM, LLaVA and mobilemm models, not of {type(model).__name__};"
            " llama.cpp's own convert_hf_to_gguf.py reads checkpoints of transformers"
        )
    folder = Path(folder)
    llm = language_model_file(model, processor, dtype)
    vision = None
    if mmproj is not False:
        try:
            vision = mmproj_file(model, processor, dtype)
        except MobileMMError as error:
            if mmproj:
                raise
            logger.warning("no mmproj is written, the GGUF chats without pictures: %s", error)
    folder.mkdir(parents=True, exist_ok=True)
    llm_path = folder / f"llm-{dtype}.gguf"
    llm.write(llm_path)
    if vision is None:
        return GGUFFiles(llm_path, None)
    vision_path = folder / f"mmproj-{'f32' if dtype == 'f32' else 'f16'}.gguf"
    vision.write(vision_path)
    return GGUFFiles(llm_path, vision_path)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its name there, its values (perhaps on disk still), and how they are stored.

    `rotary_heads` is set for query and key projections: their rows are reordered from transformers' RoPE,
    which turns the halves of a head against each other, to llama.cpp's, which turns neighbours.
    """

    name: str
    tensor: Tensor
    storage: Storage
    rotary_heads: int = 0

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.storage]
        return self.tensor.numel() // block * size

    def values(self) -> np.ndarray[Any, Any]:
        """The bytes to write, as an array; MobileMMError for NaN and for what float16 cannot hold."""
        tensor = self.tensor.detach().to("cpu", torch.float32)
        limit = torch.finfo(torch.float32 if self.storage == Storage.F32 else torch.float16).max
        if not float(tensor.abs().max()) <= limit:
            raise MobileMMError(
                f"tensor {self.name!r}: its values are not finite or exceed {self.storage.name}; use f32"
            )
        if self.rotary_heads:
            halves = tensor.unflatten(0, (self.rotary_heads, 2, -1))
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        return gguf.quantize(tensor.contiguous().numpy(), self.storage)


@dataclass(frozen=True)
class GGUFFile:
    """A file to be written: a writer that holds its settings, and its tensors."""

    writer: gguf.GGUFWriter
    entries: list[Entry]

    def write(self, path: Path) -> None:
        """Writes tensor by tensor to a temporary name beside `path`, then renames."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        for entry in self.entries:
            self.writer.add_tensor_info(
                entry.name, tuple(entry.tensor.shape), np.dtype(np.float32), entry.nbytes, entry.storage
            )
        try:
            self.writer.write_header_to_file(partial)
            self.writer.write_kv_data_to_file()
            self.writer.write_ti_data_to_file()
            for entry in self.entries:
                self.writer.write_tensor_data(entry.values())
            self.writer.close()
            os.replace(partial, path)
        except OSError as error:
            raise MobileMMError(f"{path}: cannot be written: {error.strerror or error}") from error
        finally:
            partial.unlink(missing_ok=True)


# --- the language model ----------------------------------------------------------------------------------


def language_model_file(model: MobileMMForConditionalGeneration, processor: Any, dtype: DType) -> GGUFFile:
    """The language model under llama.cpp's architecture "llama".

    Raises MobileMMError for another architecture than llama and mistral, and for options that it lacks.
    """
    text = model.config.text_config
    if text.model_type not in ("llama", "mistral"):
        raise MobileMMError(
            f"GGUF: language model {text.model_type!r} is not supported; supported: llama, mistral"
        )
    if text.hidden_act != "silu":
        raise MobileMMError(f"GGUF: llama.cpp's llama has no activation {text.hidden_act!r}, only 'silu'")
    heads = text.num_attention_heads
    kv_heads = text.num_key_value_heads or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_name(Path(str(model.config._name_or_path or "mobilemm")).name)
    writer.add_file_type(FILE_TYPES[dtype])
    if dtype in ("q8_0", "q4_0"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    # llama.cpp's llama attends to everything: true to a sliding window only as far as that reaches.
    writer.add_context_length(
        min(text.max_position_embeddings, getattr(text, "sliding_window", None) or math.inf)
    )
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    writer.add_rope_dimension_count(head_dim)
    entries = [*_rope(writer, text, head_dim)]
    add_tokenizer(writer, processor, text.vocab_size)

    language_model = model.language_model
    tied = language_model.get_output_embeddings().weight is language_model.get_input_embeddings().weight
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, text.num_hidden_layers)
    rotary = {"q_proj": heads, "k_proj": kv_heads}
    for ours, tensor in language_model.state_dict().items():
        if tied and ours == "lm_head.weight":
            continue
        name = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise MobileMMError(f"GGUF: llama.cpp's llama has no place for the tensor {ours!r}")
        module = ours.split(".")[-2]
        is_head = module == "lm_head" or (tied and module == "embed_tokens")
        storage = _storage(tensor, Storage.Q8_0 if is_head and dtype == "q4_0" else STORAGE[dtype])
        entries.append(Entry(name, tensor, storage, rotary.get(module, 0)))
    return GGUFFile(writer, entries)


def _storage(tensor: Tensor, wanted: Storage) -> Storage:
    if tensor.ndim < 2:
        return Storage.F32
    return wanted if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else Storage.F16


def _rope(writer: gguf.GGUFWriter, text: Any, head_dim: int) -> Iterator[Entry]:
    """The rotary embedding's settings, and for "llama3" the factors that divide its frequencies."""
    rope = dict(text.rope_parameters)
    kind, theta = rope.get("rope_type", "default"), float(rope["rope_theta"])
    writer.add_rope_freq_base(theta)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](text, torch.device("cpu"))
        plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        yield Entry("rope_freqs.weight", plain / scaled, Storage.F32)
    elif kind != "default":
        raise MobileMMError(
            f"GGUF: RoPE of the type {kind!r} is not supported; supported: default, linear, llama3"
        )


# --- the tokenizer ---------------------------------------------------------------------------------------

GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How byte-level BPE cuts a text before it merges: llama.cpp knows each way by a name.
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": GPT2_SPLIT,
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2_SPLIT],
    },
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False},
            {**GPT2_SPLIT, "use_regex": False},
        ],
    },
}
CHAT_TEMPLATES = {
    "v1": (
        "{% set ns = namespace(before=' ') %}"
        "{% if messages[0]['role'] != 'system' %}{{ '" + VicunaTemplate.system.replace("'", "\\'") + "' }}"
        "{% endif %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}"
        "{% elif message['role'] == 'user' %}{{ ns.before + 'USER: ' + message['content'] }}"
        "{% set ns.before = ' ' %}"
        "{% else %}{{ ' ASSISTANT: ' + message['content'] + '</s>' }}{% set ns.before = '' %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
        " + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


def add_tokenizer(writer: gguf.GGUFWriter, processor: Any, rows: int) -> None:
    """The tokenizer's pieces, one for each of the embedding's `rows`, special ids and chat template.

    LLaMA's SentencePiece tokenizers (BPE over characters with byte fallback) and byte-level BPE are written;
    MobileMMError names what another one has that llama.cpp lacks.
    """
    tokenizer = processor.tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = backend["model"]
    if bpe["type"] != "BPE":
        raise MobileMMError(f"GGUF: a tokenizer of the type {bpe['type']!r} is not supported, only BPE")
    added = {token["id"]: token for token in backend["added_tokens"]}
    pieces = {index: piece for piece, index in bpe["vocab"].items()}
    pieces |= {index: token["content"] for index, token in added.items()}

    def kind(index: int) -> gguf.TokenType:
        if index not in pieces:
            return gguf.TokenType.UNUSED  # rows that only pad the table
        if bpe["byte_fallback"] and pieces[index] == bpe["unk_token"]:
            return gguf.TokenType.UNKNOWN
        if index in added:
            return gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED
        if bpe["byte_fallback"] and re.fullmatch(r"<0x[0-9A-F]{2}>", pieces[index]):
            return gguf.TokenType.BYTE
        return gguf.TokenType.NORMAL

    tokens = [pieces.get(index, f"[PAD{index}]") for index in range(rows)]
    if bpe["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, bpe["merges"]))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith("▁"))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(backend))
        writer.add_token_list(tokens)
        writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_token_types([kind(index) for index in range(rows)])
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None and index < rows:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
    template = tokenizer.chat_template if processor.template == "tokenizer" else None
    template = template or CHAT_TEMPLATES.get(processor.template)
    if isinstance(template, str):
        writer.add_chat_template(template)


def _scores(tokens: Iterable[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece's score of each piece: the higher, the earlier it is merged."""
    rank: dict[str, int] = {}
    for index, pair in enumerate(merges):
        rank.setdefault("".join(pair), index)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _pre_tokenizer(backend: dict[str, Any]) -> str:
    if backend["normalizer"] is not None:
        raise MobileMMError(
            f"GGUF: llama.cpp's byte-level BPE has no normalizer {backend['normalizer'].get('type')!r}"
        )
    for name, known in PRE_TOKENIZERS.items():
        # llama.cpp takes whole words from the vocabulary, unmerged, for "llama-bpe" alone.
        ignores_merges = name == "llama-bpe"
        if backend["pre_tokenizer"] == known and backend["model"]["ignore_merges"] == ignores_merges:
            return name
    raise MobileMMError(
        f"GGUF: this tokenizer's pre_tokenizer is none of {', '.join(PRE_TOKENIZERS)}:"
        f" {json.dumps(backend['pre_tokenizer'])[:200]}"
    )


# --- vision encoder and projector ------------------------------------------------------------------------


def mmproj_file(model: MobileMMForConditionalGeneration, processor: Any, dtype: DType) -> GGUFFile:
    """CLIP up to the selected layer, and the projector, as llama.cpp's architecture "clip".

    Raises MobileMMError naming the encoder, projector or option that llama.cpp has no graph for.
    """
    config = model.config
    vision = config.vision_config
    if vision.model_type != "clip_vision_model":
        name = getattr(vision, "architecture", None) or vision.model_type
        raise MobileMMError(f"GGUF: llama.cpp has no vision encoder {name!r} here; supported: CLIP")
    if vision.hidden_act not in ("quick_gelu", "gelu"):
        raise MobileMMError(f"GGUF: llama.cpp's CLIP has no activation {vision.hidden_act!r}")
    if config.vision_feature_select_strategy != "default":
        raise MobileMMError("GGUF: llama.cpp drops the class token, which this model's projector takes")
    matrices = Storage.F32 if dtype == "f32" else Storage.F16
    kind, entries = _projector(model, matrices)
    encoder: Any = model.vision_encoder.model
    layers = len(encoder.encoder.layers)
    writer = gguf.GGUFWriter(None, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_file_type(FILE_TYPES["f32" if dtype == "f32" else "f16"])
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type(kind)
    writer.add_vision_image_size(config.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_block_count(layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    # Left out, llama.cpp would stop one layer before the last of those in the file.
    writer.add_array("clip.vision.feature_layer", [layers])
    writer.add_vision_image_mean(list(processor.image_processor.image_mean))
    writer.add_vision_image_std(list(processor.image_processor.image_std))
    writer.add_vision_use_gelu(vision.hidden_act == "gelu")

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, layers)
    for ours, tensor in encoder.state_dict().items():
        if ours.startswith("post_layernorm."):  # it feeds the pooled output alone, here as in CLIP
            continue
        name = names.get_name(f"vision_tower.vision_model.{ours}", try_suffixes=(".weight", ".bias"))
        if name is None:
            raise MobileMMError(f"GGUF: llama.cpp's CLIP has no place for the tensor {ours!r}")
        is_vector = tensor.ndim < 2 or "position_embedding" in ours
        entries.append(Entry(name, tensor, Storage.F32 if is_vector else matrices))
    return GGUFFile(writer, entries)


def _projector(model: MobileMMForConditionalGeneration, matrices: Storage) -> tuple[str, list[Entry]]:
    """llama.cpp's name of the projector's type, and the projector's tensors."""
    config, projector = model.config, model.projector
    kind = str(config.projector["type"])
    state = projector.state_dict()
    if kind in ("ldpnet", "ldpnetv2"):
        grid = model.vision_encoder.grid
        if grid != (LDP_GRID, LDP_GRID) or projector.num_tokens != LDP_GRID**2 // 4:
            raise MobileMMError(
                f"GGUF: llama.cpp's {kind} makes 144 tokens of a 24×24 grid, not"
                f" {projector.num_tokens} of {grid[0]}×{grid[1]}"
            )
        table, kind = (LDP_NAMES, "ldp") if kind == "ldpnet" else (LDPV2_NAMES, "ldpv2")
        named = {}
        for ours, tensor in state.items():
            prefix = next(prefix for prefix in table if ours.startswith(prefix))
            named[f"mm.{table[prefix]}{ours[len(prefix) :]}"] = tensor
    elif kind in ("linear", "mlp1x_gelu"):
        # llama.cpp always has a GELU behind the first layer; gelu(x) - gelu(-x) = x takes it out again.
        weight, bias = (state[name] for name in sorted(state, reverse=True))
        one = torch.eye(len(weight), dtype=weight.dtype)
        named = {
            "mm.0.weight": torch.cat([weight, -weight]),
            "mm.0.bias": torch.cat([bias, -bias]),
            "mm.2.weight": torch.cat([one, -one], 1),
            "mm.2.bias": torch.zeros_like(bias),
        }
        kind = "mlp"
    elif kind == "mlp2x_gelu":
        named, kind = {f"mm.{ours}": tensor for ours, tensor in state.items()}, "mlp"
    else:
        raise MobileMMError(
            f"GGUF: llama.cpp has no projector {kind!r} here; supported: linear, mlp2x_gelu, ldpnet, ldpnetv2"
        )
    entries = []
    for name, tensor in named.items():
        # llama.cpp's depthwise convolution takes float16 alone.
        depthwise = tensor.ndim == 4 and tensor.shape[-1] > 1
        storage = Storage.F32 if tensor.ndim < 2 else Storage.F16 if depthwise else matrices
        pointwise = tensor.ndim == 4 and not depthwise
        entries.append(Entry(name, tensor[:, :, 0, 0] if pointwise else tensor, storage))
    return kind, entries
