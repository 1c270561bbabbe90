"""tokenizer.model files of LLaMA's kind."""

from __future__ import annotations

import io
from collections.abc import Sequence

import sentencepiece


def train_sentencepiece(sentences: Sequence[str], vocab_size: int) -> bytes:
    """BPE with byte fallback, no normalization, <unk> 0, <s> 1, </s> 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=vocab_size,
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
    return model.getvalue()
