"""A model's parts with their weights as the plan stores them: the same for every target."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mobilemm import __version__
from mobilemm.errors import MobileMMError
from mobilemm.export import verify
from mobilemm.export.calibration import CalibrationSample, default_calibration
from mobilemm.export.decoder import Decoder, EagerCache
from mobilemm.export.drawing import OutputProjector
from mobilemm.export.layerwise import quantize_decoder, uses_data
from mobilemm.export.memory import page_out
from mobilemm.export.model import Model, Report
from mobilemm.export.options import ExportOptions
from mobilemm.export.parts import Part
from mobilemm.export.quantization import (
    GENERATOR_PARTS,
    PartPlan,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
)
from mobilemm.export.quantizers import quantize
from mobilemm.export.sensitivity import measure_damage, spend
from mobilemm.export.signal_states import measure_bias
from mobilemm.export.static_quantization import quantize_activations, quantize_convolutions

CALIBRATION_TOKENS, CALIBRATION_LENGTH = 4096, 256
CALIBRATION_PICTURES = 16
# Beyond this many weights half as many: the time goes with both.
LARGE_DECODER = 500_000_000
# Headroom of an int8 cache beyond the largest key and value that calibration has shown.
CACHE_HEADROOM = 1.1

PLAN: TypeAdapter[PartPlan] = TypeAdapter(PartPlan)


class QuantizedParts:
    """Makes the modules that targets write.

    Args:
        store: folder for a decoder's finished codes, so that the next target, or the next try, finds them.
    """

    def __init__(
        self,
        model: Model,
        options: ExportOptions,
        samples: Sequence[CalibrationSample],
        store: Path | None = None,
        report: Report = lambda _: None,
    ) -> None:
        self.model, self.options, self.samples = model, options, samples
        self.store, self.report = store, report
        self.notes: dict[str, str] = {}
        """What is worth telling of a part, by its name."""
        self._made_table: QuantizedWeight | None = None

    def module(self, name: str) -> tuple[nn.Module, PartPlan]:
        """A part's module, for the caller to change; and its plan, refined by measurements where asked.

        Raises MobileMMError for a pattern of the plan that fits no layer, and what quantization cannot take.
        """
        part, plan = self.model.parts[name], self.options.plan.part(name)
        if isinstance(part.module, Decoder):
            return self._decoder(part, plan)
        if isinstance(part.module, OutputProjector):
            part.module.read_through(self._head(part.module.reader.in_features))
            self._correct_bias(part.module)
        if name == "embed":
            module = verify.share_tensors(part.module)
            if (table := self.table()) is None:
                return verify.with_weights(module, part.weights), plan
            module.table = QuantizedEmbedding(table)
            return module.eval(), plan
        module = quantize_linears(part, plan)
        if plan.activations != "int8-static":
            return verify.with_weights(module, part.weights), plan
        self.report(f"{name}: measuring what its layers are fed")
        quantize_convolutions(module, plan, name)
        module = verify.with_weights(module, part.weights)
        pictures = [path for sample in self.samples for path in sample.files][:CALIBRATION_PICTURES]

        def look(module: nn.Module, index: int) -> None:
            module(torch.from_numpy(self.model.pixels(pictures[index])[None]))

        quantize_activations(module, look, len(pictures), name)
        return module, plan

    def _head(self, rows: int) -> Tensor:
        """The first rows of the decoder's head as it ships, float32 (rows, width)."""
        decoder = self.model.decoder
        plan = self.options.plan.part("decoder")
        if decoder.spec.tied and not plan.own_head:
            table = self.table()
            if table is not None:
                return QuantizedEmbedding(table)(torch.arange(rows))
        elif plan.scheme("lm_head").quantized:
            head = self.module("decoder")[0].get_submodule("lm_head")
            assert isinstance(head, QuantizedLinear)
            return head.quantized.dequantize()[:rows]
        return self.model.parts["decoder"].weights["lm_head.weight"][:rows].float()

    def _correct_bias(self, output_projector: OutputProjector) -> None:
        """Tells the output projector what rounded weights add to the states that it reads."""
        table = self.table()
        decoder, _ = self.module("decoder")
        assert isinstance(decoder, Decoder)
        if table is None and not any(isinstance(module, QuantizedLinear) for module in decoder.modules()):
            return
        bias = measure_bias(self.model, decoder, table)
        output_projector.shift = bias.shift
        self.notes["output_projector"] = (
            f"drawings: behind the quantized decoder the condition's cosine to PyTorch's is {bias.after:.3f},"
            f" mean of {bias.requests} requests ({bias.before:.3f} with the bias that is taken away)"
        )

    def _decoder(self, part: Part, plan: PartPlan) -> tuple[nn.Module, PartPlan]:
        assert isinstance(part.module, Decoder)
        with torch.device("meta"):
            decoder = Decoder(part.module.spec)
        names = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
        _refuse_unused(part.name, plan, names)
        if self.options.int8_cache:
            _set_cache_scales(self.model, decoder, self.samples)
        if self.store is None or not any(plan.scheme(name).quantized for name in names):
            return self._quantize(part, decoder, plan, names)
        fingerprint = self._fingerprint(plan)
        path = self.store / f"decoder-{fingerprint[:16]}.safetensors"
        found = _restore(path, decoder, fingerprint)
        if found is None:
            decoder, found = self._quantize(part, decoder, plan, names)
            _keep(path, decoder, found, fingerprint)
            _restore(path, decoder, fingerprint)  # mapped from the file: memory that can be given back
        else:
            self.report(f"{part.name}: quantized already")
        # What it computes with is the target's affair, and not kept.
        return decoder.eval(), replace(found, activations=plan.activations)

    def _quantize(
        self, part: Part, decoder: Decoder, plan: PartPlan, names: Sequence[str]
    ) -> tuple[Decoder, PartPlan]:
        budget, report = self.options.budget, self.report
        head = self.table() if decoder.spec.tied and not plan.own_head else None
        data = None
        if budget is not None or any(uses_data(plan.scheme(name)) for name in names):
            data = calibration_embeddings(self.model, self.samples)
        if budget is not None and data is not None:
            report(f"{part.name}: measuring which layers suffer most")
            plan = _spend(part, plan, data, head, budget, report)
        quantize_decoder(
            decoder,
            part.weights,
            plan,
            calibration=data,
            head=head,
            progress=lambda name, done, total: report(f"{part.name}: quantizing {name} ({done}/{total})"),
        )
        return decoder.eval(), plan

    def _fingerprint(self, plan: PartPlan) -> str:
        """The hash of everything that a decoder's codes are made from."""
        calibration = Path(self.options.calibration or default_calibration()).read_bytes()
        length = min(CALIBRATION_LENGTH, self.model.decoder.spec.context_length)
        plan = replace(plan, activations="float32")  # what it computes with is the target's affair
        facts = [
            *(self.model.digest, __version__, torch.__version__, _codes(plan)),
            *(_codes(self.options.plan.part("embed")), repr(self.options.budget), repr(length)),
            hashlib.sha256(calibration).hexdigest(),
        ]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def table(self) -> QuantizedWeight | None:
        """The embedding's table as stored, None when it stays in floating point."""
        scheme = self.options.plan.part("embed").scheme("table")
        if scheme.quantized and self._made_table is None:
            weight = self.model.parts["embed"].weights["table.weight"]
            self._made_table = quantize(weight, scheme, "embed.table")
        return self._made_table


def quantize_linears(part: Part, plan: PartPlan) -> nn.Module:
    """The part's module with its linear layers as the plan stores them, and a generator's convolutions."""
    module = verify.share_tensors(part.module)
    if part.name in GENERATOR_PARTS and plan.default.quantized:
        quantize_convolutions(module, _per_channel(plan), part.name)
    linears = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    _refuse_unused(part.name, plan, linears)
    for layer, linear in linears.items():
        scheme = plan.scheme(layer)
        if scheme.quantized:
            owner, _, last = layer.rpartition(".")
            weight = quantize(linear.weight.detach().float(), scheme, f"{part.name}.{layer}")
            bias = None if linear.bias is None else linear.bias.detach().float()
            setattr(module.get_submodule(owner), last, QuantizedLinear(weight, bias))
            page_out(linear.weight.detach())
    return module


def _per_channel(plan: PartPlan) -> PartPlan:
    """The plan for convolutions, where at 8 bits an output channel has one scale, as kernels want it."""
    if plan.default.bits < 8 or plan.default.palette:
        return plan
    return replace(plan, default=replace(plan.default, block_size=None))


def _codes(plan: PartPlan) -> str:
    """What codes depend on: targets that compute otherwise share them."""
    return repr(replace(plan, activations="float32"))


# --- finished codes on disk --------------------------------------------------------------------------------


def _keep(path: Path, decoder: Decoder, plan: PartPlan, fingerprint: str) -> None:
    """Writes a quantized decoder: a file is there when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes = {
        name: (child.bits, child.block_size, child.out_features, child.in_features)
        for name, child in decoder.named_modules()
        if isinstance(child, QuantizedLinear)
    }
    facts = {"fingerprint": fingerprint, "layers": json.dumps(shapes), "plan": PLAN.dump_json(plan).decode()}
    whole = path.with_name(f".{path.name}")
    save_file(decoder.state_dict(), whole, facts)
    with whole.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(whole, path)


def _restore(path: Path, decoder: Decoder, fingerprint: str) -> PartPlan | None:
    """Fills a decoder with what was kept, and gives its plan; None when that was made from something else."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            if facts.get("fingerprint") != fingerprint:
                return None
            plan = PLAN.validate_json(facts["plan"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (FileNotFoundError, SafetensorError, KeyError, ValidationError):
        return None
    for name, (bits, block, rows, columns) in json.loads(facts["layers"]).items():
        keys = ("packed", "scales", "zero_points", "palette", "bias")
        packed, scales, zero_points, palette, bias = (tensors.pop(f"{name}.{key}", None) for key in keys)
        weight = QuantizedWeight(packed, scales, zero_points, bits, block, (rows, columns), palette)
        decoder.set_submodule(name, QuantizedLinear(weight, bias))
    for name, value in tensors.items():
        owner, _, last = name.rpartition(".")
        setattr(decoder.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))
    return plan


# --- measurements that quantization needs ------------------------------------------------------------------


def _set_cache_scales(model: Model, decoder: Decoder, samples: Sequence[CalibrationSample]) -> None:
    """The steps of an int8 cache, from the largest keys and values of a fp32 run over a few samples."""
    cache = EagerCache()
    embeddings = calibration_embeddings(model, samples)[:2]
    verify.decoder_reference(model.parts["decoder"], {"inputs_embeds": embeddings}, cache=cache)
    for index, layer in enumerate(decoder.layers):
        attention = layer.attention
        for name, values in (("key_scale", cache.keys[index]), ("value_scale", cache.values[index])):
            step = values.abs().max().clamp(min=1e-6) * CACHE_HEADROOM / 127
            setattr(attention, name, step.view(1))


def _spend(
    part: Part, plan: PartPlan, data: Tensor, head: QuantizedWeight | None, budget: int, report: Report
) -> PartPlan:
    """The plan with more bits where they help most, as `--q-search` asks."""
    decoder = part.module
    assert isinstance(decoder, Decoder)
    damage = measure_damage(
        decoder,
        part.weights,
        plan,
        data[:1],
        head=head,
        progress=lambda name, done, total: report(f"{part.name}: measuring {name} ({done}/{total})"),
    )
    linears = {name: child for name, child in decoder.named_modules() if isinstance(child, nn.Linear)}
    shapes = {name: (child.out_features, child.in_features) for name, child in linears.items()}
    return spend(plan, shapes, damage, budget)


def _refuse_unused(part: str, plan: PartPlan, names: Sequence[str] | Mapping[str, Any]) -> None:
    if unused := plan.unused_patterns(names):
        few = ", ".join(list(names)[:4])
        raise MobileMMError(f"no layer of {part!r} is named {unused[0]!r}; its layers are {few}, …")


def calibration_embeddings(model: Model, samples: Sequence[CalibrationSample]) -> Tensor:
    """Input embeddings of samples up to CALIBRATION_TOKENS: (rows, CALIBRATION_LENGTH, width)."""
    spec = model.decoder.spec
    weights = spec.num_layers * spec.hidden_size * (spec.hidden_size + 3 * spec.intermediate_size)
    wanted = CALIBRATION_TOKENS // (2 if weights > LARGE_DECODER else 1)
    pieces: list[Tensor] = []
    total = 0
    for sample in samples:
        ids, pictures = model.encode(sample)
        pieces.append(model.embed(ids, pictures)[0])
        total += len(ids)
        if total >= wanted:
            break
    together = torch.cat(pieces)
    length = min(CALIBRATION_LENGTH, spec.context_length, len(together))
    return together[: len(together) // length * length].view(-1, length, together.shape[1])
