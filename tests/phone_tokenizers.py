"""Generated strings through several kinds of tokenizers: ids, and texts as they stream."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mobilemm.runtime.manifest import Prompt, Turn
from mobilemm.runtime.prompt import PromptTokenizer
from mobilemm.runtime.streaming import TextStream

STRINGS = 1000
ENGLISH = Path(__file__).parent / "assets" / "english.txt"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


SCRIPTS = [
    (0x20, 0x7E),  # ASCII
    (0xA0, 0x24F),  # Latin
    (0x300, 0x36F),  # combining marks
    (0x370, 0x5FF),  # Greek, Cyrillic, Hebrew
    (0x600, 0x6FF),  # Arabic, its digits too
    (0x900, 0x97F),  # Devanagari
    (0x1100, 0x11FF),  # Hangul's parts
    (0x2000, 0x206F),  # spaces, joiners, directions
    (0x2070, 0x218F),  # numbers above, below and in fractions
    (0x3040, 0x30FF),  # kana
    (0x4E00, 0x9FFF),  # CJK
    (0xFE00, 0xFE0F),  # variation selectors
    (0xFF00, 0xFFEF),  # full width
    (0x1F300, 0x1FAFF),  # emoji
    (0x1D400, 0x1D7FF),  # mathematical letters and digits
    (0x20000, 0x323AF),  # CJK of later Unicode versions
    (0x0, 0x1F),  # control characters
    (0x80, 0x9F),
    (0xE000, 0xE0FF),  # private use
    (0x11DE0, 0x11DE9),  # digits of Unicode 17
]
WORDS = [
    "the",
    " house",
    "  ",
    "\n\n",
    "\t",
    "don't",
    "WE'LL",
    "ſ",
    "12345",
    "3.14",
    "👩‍🚀",
    "👨‍👩‍👧‍👦",
    "🇩🇪",
    "e\u0301",
    "日本語",
    "مرحبا",
    "नमस्ते",
    "…",
    "\u200b",
    "\ufeff",
    "\u0000",
    "<|im_end|>",
    "<|im_start|>user",
    "<|endoftext|",
    "<s>",
    "</s>",
    "▁",
    "<0xE4>",
    "a" * 300,
]


def strings(count: int, seed: int = 0) -> list[str]:
    """Texts such as no person types: every script, emoji, marks, control characters, tokens' own names."""
    draw = random.Random(seed)
    english = ENGLISH.read_text(encoding="utf-8")
    found = ["", " ", "\n", *WORDS]
    while len(found) < count:
        parts = []
        for _ in range(draw.randint(1, 12)):
            match draw.randrange(4):
                case 0:
                    parts.append(draw.choice(WORDS))
                case 1:
                    start = draw.randrange(len(english) - 60)
                    parts.append(english[start : start + draw.randint(1, 60)])
                case 2:
                    low, high = draw.choice(SCRIPTS)
                    parts += [chr(draw.randint(low, high)) for _ in range(draw.randint(1, 8))]
                case _:
                    low, high = draw.choice(SCRIPTS)
                    parts.append(draw.choice([" ", "", "\n"]) + chr(draw.randint(low, high)))
        found.append("".join(parts))
    return found[:count]


def streamed(tokenizer: PromptTokenizer, ids: list[int], stop: list[str]) -> list[str]:
    """The pieces that are shown; the last is what comes at the end."""
    stream = TextStream(tokenizer.decode, stop)
    pieces = [stream.put(token) for token in ids]
    return [*pieces, stream.end()]


def tokenizer_cases(tokenizer: Tokenizer, texts: list[str], add_bos: bool, seed: int) -> list[dict[str, Any]]:
    nothing = Turn(prefix="", suffix="")
    prompt = Prompt(begin="", system=None, user=nothing, assistant=nothing, generation="", add_bos=add_bos)
    prompts = PromptTokenizer(tokenizer, prompt, 2**31 - 1, 1)
    draw = random.Random(seed)
    cases = []
    for text in texts:
        ids = prompts.encode_pieces([text])
        # What a model says is no text that was cut into tokens: characters break off, and stop strings begin.
        said = draw.sample(ids, len(ids)) if draw.random() < 0.3 else list(ids)
        said += [draw.randrange(prompts.size) for _ in range(draw.randint(0, 5))]
        word = prompts.decode(said)
        start = draw.randrange(len(word)) if word else 0
        stop = [word[start : start + draw.randint(1, 4)]] if draw.random() < 0.3 else ["<|im_end|>"]
        cases.append(
            {
                "text": text,
                "ids": ids,
                "said": said,
                "decoded": word,
                "stop": stop,
                "pieces": streamed(prompts, said, stop),
            }
        )
    return cases


def trained(model: models.Model, pre_tokenizer: Any, normalizer: Any, decoder: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<unk>", "<s>", "</s>", *pieces],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ENGLISH.read_text(encoding="utf-8")
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    # The bytes' names are ordinary pieces, which no text is cut into.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [
        token for token in state["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return Tokenizer.from_str(json.dumps(state))


def other_tokenizers() -> dict[str, Tokenizer]:
    """Of the kinds that other families use, trained here."""
    bytes_decoder = decoders.ByteLevel()
    pieces_decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    llama3 = trained(
        models.BPE(ignore_merges=True),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        normalizers.NFC(),
        bytes_decoder,
    )
    llama3.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    legacy = trained(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        pre_tokenizers.Metaspace("▁", "first"),
        None,
        pieces_decoder,
    )
    # As `read_tokenizer` has LLaMA's, for the ids of SentencePiece.
    state = json.loads(legacy.to_str())
    state["normalizer"] = {"type": "Replace", "pattern": {"Regex": r"\A "}, "content": "  "}
    state["pre_tokenizer"]["prepend_scheme"] = "always"
    sentencepiece = Tokenizer.from_str(json.dumps(state))
    # As files of LLaMA have it: no cuts at all, one normalizer in front.
    state = json.loads(legacy.to_str())
    state["pre_tokenizer"] = None
    state["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    gemma = trained(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=False),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        None,
        decoders.Fuse(),
    )
    return {
        "llama3": llama3,
        "llama": Tokenizer.from_str(json.dumps(state)),
        "sentencepiece": sentencepiece,
        "metaspace": legacy,
        "gemma": gemma,
    }


def write_tokenizers(bundle: Path, folder: Path) -> None:
    (folder / "tokenizers").mkdir()
    default = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    for name, tokenizer in {"default": default, **other_tokenizers()}.items():
        tokenizer.save(str(folder / "tokenizers" / f"{name}.tokenizer.json"))
        count = STRINGS if name == "default" else STRINGS // 4
        add_bos = name == "llama3"
        save(
            folder / "tokenizers" / f"{name}.json",
            tokenizer_cases(tokenizer, strings(count), add_bos, len(name)),
        )


def save(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
