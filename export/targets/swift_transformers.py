"""A language model as Hugging Face's swift-transformers runs it: a Core ML package, the tokenizer beside it.

That library knows no bundle. Its class for models with a cache wants inputs `inputIds` (1, any length) and
`causalMask`, states `keyCache` and `valueCache`, and output `logits` (1, length, vocabulary). Of the mask it
gives zeros alone, (1, 1, 1, n + 1) where n tokens have been said with those of this call: its width says
where this call's keys are written; what is seen is decided by positions in the graph.
Source: swift-transformers, Sources/Models/LanguageModel.swift, `LanguageModelWithStatefulKVCache`.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export import mil_interpreter, verify
from mobilemm.export.assemble import TOKENIZER_FILES, write_tokenizer
from mobilemm.export.bundle import put_in_place
from mobilemm.export.calibration import read_calibration
from mobilemm.export.decoder import Decoder, EagerCache
from mobilemm.export.model import Model, Report, open_model
from mobilemm.export.options import ExportOptions
from mobilemm.export.parts import Embed, TokenEmbedding
from mobilemm.export.quantized_parts import QuantizedParts
from mobilemm.export.targets.coreml import CoreMLTarget
from mobilemm.export.targets.coreml_lowering import STATE_ALIGNMENT, DecoderStep, allow_any_length, lower
from mobilemm.export.targets.coreml_package import describe
from mobilemm.runtime.manifest import Parity

STATES = ("keyCache", "valueCache")
# Positions that the package is verified on, the last few of them one by one.
VERIFY_TOKENS, SINGLE_TOKENS = 96, 16


class TextStep(DecoderStep):
    """Any number of tokens, keys and values in states.

    Shapes: ids int32 (1, length), mask (1, 1, 1, tokens so far and one) → float16 (1, length, vocabulary).
    """

    length: Any  # traced: each call's own

    def __init__(self, embedding: nn.Module, decoder: Decoder, buffer_length: int) -> None:
        super().__init__(decoder, 1, buffer_length, "gpu", STATES)
        self.embedding = embedding
        allow_any_length(self)

    def forward(self, input_ids: Tensor, causal_mask: Tensor) -> Tensor:  # type: ignore[override]
        self.length = input_ids.shape[1]
        past = causal_mask.shape[3] - 1 - self.length
        positions = torch.arange(self.length, dtype=torch.int32) + past
        hidden, residual = self.run(self.embedding(input_ids), positions, positions[None])
        return self.decoder.logits(hidden, residual)


def export_text_model(
    source: str,
    destination: Path,
    options: ExportOptions,
    target: CoreMLTarget,
    *,
    overwrite: bool = False,
    report: Report = lambda _: None,
) -> Parity | None:
    """A causal LM → a folder with NAME.mlpackage and its tokenizer; gives how close it is to PyTorch.

    Raises MobileMMError for a model with eyes, one that cannot be expressed, and one below its floor;
    nothing is at `destination` then, or what was there before.
    """
    if destination.exists():
        if not overwrite:
            raise MobileMMError(f"{destination}: is there already; give --force, or another -o")
        _refuse_foreign(destination)
    options = replace(options, plan=target.stores(options.plan))
    model = open_model(source, options, report)
    model = model.with_options(options, target.default_context)
    if model.split.image is not None:
        raise MobileMMError(
            f"--coreml-names swift-transformers: {model.name} takes pictures, and it knows text alone;"
            " leave it out"
        )
    if model.decoder.spec.mrope_section is not None:
        raise MobileMMError(f"--coreml-names swift-transformers: {model.name} counts positions threefold")
    samples = [sample for sample in read_calibration(options.calibration) if not sample.files]
    quantized = QuantizedParts(model, options, samples, None, report)
    decoder, plan = quantized.module("decoder")
    embed, _ = quantized.module("embed")
    assert isinstance(decoder, Decoder)
    assert isinstance(embed, Embed)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as temporary:
        folder = Path(temporary) / destination.name
        folder.mkdir()
        package = folder / f"{model.name}.mlpackage"
        report("converting")
        spec = decoder.spec
        longest = -(-spec.context_length // STATE_ALIGNMENT) * STATE_ALIGNMENT
        lowered = lower(verify.share_tensors(decoder))
        assert isinstance(lowered, Decoder)
        step = TextStep(lower(verify.share_tensors(TokenEmbedding(embed))), lowered, longest)
        target.write_text_step(step.half().eval(), spec.context_length, package)
        parity = None
        if options.verify:
            report("verifying")
            parity = _verify(model, embed, decoder, package, samples)
            verify.check("decoder", plan.default.bits, parity, half=True)
        _label(package, model)
        write_tokenizer(model, folder)
        put_in_place(folder, destination)
    return parity


def _refuse_foreign(destination: Path) -> None:
    """Raises MobileMMError for a place that --force must not clear: anything but an export of this kind."""
    names = [path.name for path in destination.iterdir()] if destination.is_dir() else [""]
    packages = [name for name in names if name.endswith(".mlpackage")]
    known = {*packages, "tokenizer.json", *TOKENIZER_FILES}
    if destination.is_symlink() or (names and (len(packages) != 1 or set(names) - known)):
        raise MobileMMError(
            f"{destination}: holds other things than such an export, and is left alone; choose another -o"
        )


@torch.no_grad()
def _verify(model: Model, embed: nn.Module, decoder: Decoder, package: Path, samples: Any) -> Parity:
    """As the library would feed it: a prompt at once, then token by token."""
    ids = [token for sample in samples for token in model.encode(sample)[0]][:VERIFY_TOKENS]
    embeds = model.embed(ids, [])
    shipped = TextModel(package)
    prompt = len(ids) - SINGLE_TOKENS
    logits = [shipped(ids[:prompt])[0], *(shipped([token])[0] for token in ids[prompt:])]
    wanted = verify.reference(model.parts["decoder"], {"inputs_embeds": embeds}).numpy()
    rows = embed(torch.tensor([ids]), embeds[0, :0])
    quantized = decoder(rows, EagerCache()).numpy()
    found = np.concatenate(logits)[None]
    return verify.measure(found, wanted, quantized, bits=_bits(decoder), logits=True)


def _bits(decoder: Decoder) -> int:
    """Of the coarsest of its layers."""
    return min((getattr(module, "bits", 16) for module in decoder.modules()), default=16)


class TextModel:
    """Such a package on the reference interpreter, fed as swift-transformers feeds it."""

    def __init__(self, package: Path) -> None:
        self.model = mil_interpreter.load(package)
        self.state, self.said = self.model.make_state(), 0

    def __call__(self, ids: list[int]) -> NDArray[np.float32]:
        """Logits (1, tokens, vocabulary) of further tokens."""
        self.said += len(ids)
        inputs = {
            "inputIds": np.array([ids], np.int32),
            "causalMask": np.zeros((1, 1, 1, self.said + 1), np.float16),
        }
        return self.model(inputs, state=self.state)["logits"].astype(np.float32)


def _label(package: Path, model: Model) -> None:
    """Metadata. The library looks for a tokenizer on the hub by the name, unless it is given one."""
    card = model.card()
    facts = {"model": card.name, "family": card.family, "context_length": str(card.context_length)}
    others = {
        "co.huggingface.exporters.name": card.name,
        "co.huggingface.exporters.task": "text-generation",
        "co.huggingface.exporters.architecture": type(model.torch_model).__name__,
        "co.huggingface.exporters.framework": "pytorch",
        "co.huggingface.exporters.precision": "float16",
    }
    author = f"{card.name}, exported by mobilemm"
    describe(package, "text", facts, author=author, license=card.license, others=others)
