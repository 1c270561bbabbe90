"""A whole conversation through a saved decoder, as an app holds it, against PyTorch with the same weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from mobilemm.export import mil_interpreter
from mobilemm.export.decoder import Decoder, EagerCache
from mobilemm.export.decoder_spec import decoder_spec
from mobilemm.export.parts import CacheShape, Part
from mobilemm.export.quantization import QuantizedLinear, WeightScheme
from mobilemm.export.quantizers import quantize
from mobilemm.export.targets.coreml import CoreMLOptions, CoreMLTarget
from mobilemm.export.verify import cosine

pytest.importorskip("coremltools")

PREFILL, WIDTH, CONTEXT = 64, 96, 2048


@dataclass
class App:
    """Feeds a package in chunks; what a chunk lacks is filled with zeros."""

    model: mil_interpreter.Model
    length: int = 0

    def __post_init__(self) -> None:
        self.state = self.model.make_state()

    def say(self, embeds: Tensor) -> np.ndarray:
        """Appends (1, n, width); logits (vocabulary,) of the last position."""
        for chunk in embeds.split(PREFILL if embeds.shape[1] > 1 else 1, 1):
            count = chunk.shape[1]
            function = "prefill" if embeds.shape[1] > 1 else "decode"
            width = PREFILL if function == "prefill" else 1
            rows = np.zeros((1, width, WIDTH), np.float16)
            rows[:, :count] = chunk.half().numpy()
            positions = np.arange(self.length, self.length + width, dtype=np.int32)[None]
            inputs: dict[str, Any] = {"inputs_embeds": rows, "position_ids": positions}
            if function == "prefill":
                inputs["last_index"] = np.array([count - 1], np.int32)
            logits = self.model(inputs, function, self.state)["logits"]
            self.length += count
        return logits[0, 0].astype(np.float32)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """Three layers of int4 at block 32; what it is fed is random, and so is what it says."""
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=300,
        max_position_embeddings=CONTEXT,
    )
    torch.manual_seed(0)
    made = Decoder(decoder_spec(config)).requires_grad_(False)
    for name, module in list(made.named_modules()):
        if isinstance(module, nn.Linear):
            matrix = torch.randn(module.weight.shape) * 1.5 / module.in_features**0.5
            made.set_submodule(
                name, QuantizedLinear(quantize(matrix, WeightScheme(4, 32, True, "rtn"), name))
            )
    return made.eval()


@pytest.mark.parametrize("layout", ["gpu", "ane"])
@torch.no_grad()
def test_pictures_and_many_words_in_one_conversation(decoder: Decoder, layout: Any, tmp_path: Path) -> None:
    """A prefill of 64, 200 words one at a time, a second picture of 150 rows, and words far behind it."""
    part = Part("decoder", decoder, {}, ("logits",), cache=CacheShape(3, 2, 16))
    target = CoreMLTarget(CoreMLOptions(layout=layout, prefill=PREFILL))
    exported = target.write(part, decoder, tmp_path)
    app = App(mil_interpreter.load(tmp_path / exported.file))
    embeds = torch.randn(1, 64 + 200 + 150 + 1300 + 40, WIDTH, generator=torch.Generator().manual_seed(1))
    turns = [64, *[1] * 200, 150, 1300, *[1] * 40]
    found = np.stack([app.say(rows) for rows in embeds.split(turns, 1)])
    last = np.cumsum(turns) - 1
    wanted = decoder(embeds, EagerCache())[0, last].numpy()
    assert cosine(found, wanted) >= 0.999
    assert min(cosine(one, other) for one, other in zip(found, wanted, strict=True)) >= 0.999
    agreed = float((found.argmax(-1) == wanted.argmax(-1)).mean())
    assert agreed >= 0.99


@torch.no_grad()
def test_rows_behind_the_last_do_not_matter(decoder: Decoder, tmp_path: Path) -> None:
    part = Part("decoder", decoder, {}, ("logits",), cache=CacheShape(3, 2, 16))
    package = tmp_path / CoreMLTarget(CoreMLOptions(prefill=8)).write(part, decoder, tmp_path).file
    model = mil_interpreter.load(package)
    embeds = torch.randn(1, 9, WIDTH, generator=torch.Generator().manual_seed(2)).half().numpy()
    answers = []
    for filling in (0.0, 1.0, -300.0):
        state, rows = model.make_state(), embeds[:, :8].copy()
        rows[:, 5:] = filling
        inputs = {"inputs_embeds": rows, "position_ids": np.arange(8, dtype=np.int32)[None]}
        first = model({**inputs, "last_index": np.array([4], np.int32)}, "prefill", state)["logits"]
        following = {"inputs_embeds": embeds[:, 8:], "position_ids": np.array([[5]], np.int32)}
        answers.append((first, model(following, "decode", state)["logits"]))
    for first, second in answers[1:]:
        np.testing.assert_array_equal(first, answers[0][0])
        np.testing.assert_array_equal(second, answers[0][1])
