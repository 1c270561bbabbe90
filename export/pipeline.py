"""A checkpoint, part by part: quantized by one plan, written by a target, verified, kept when it is done."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors.numpy import save_file
from torch import Tensor, nn

from mobilemm import __version__
from mobilemm.errors import MobileMMError
from mobilemm.export import verify
from mobilemm.export.calibration import CalibrationSample, default_calibration, read_calibration
from mobilemm.export.decoder import Decoder, EagerCache
from mobilemm.export.families import split_model
from mobilemm.export.layerwise import needs_data, quantize_decoder
from mobilemm.export.memory import page_out, release
from mobilemm.export.parts import Part, parts_of
from mobilemm.export.prompts import derive_prompt
from mobilemm.export.quantization import (
    PartPlan,
    QuantizationPlan,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
)
from mobilemm.export.quantizers import quantize
from mobilemm.export.sensitivity import measure_damage, spend
from mobilemm.export.split import SplitModel
from mobilemm.export.targets import Exported, Target
from mobilemm.runtime import manifest
from mobilemm.runtime.image import to_pixels
from mobilemm.runtime.prompt import PromptTokenizer
from mobilemm.runtime.session import rope_positions

Report = Callable[[str], None]

# Decoder first: the embedding points into its file where the two are one table.
ORDER = ("decoder", "embed", "vision", "output_projector", "generator")
CALIBRATION_TOKENS, CALIBRATION_LENGTH = 4096, 256
# Beyond this many weights half as many: the time goes with both.
LARGE_DECODER = 500_000_000
# Headroom of an int8 cache beyond the largest key and value that calibration has shown.
CACHE_HEADROOM = 1.1
# Positions that the decoder is verified on, and those of its golden vectors.
VERIFY_TOKENS, GOLDEN_TOKENS = 160, 24


@dataclass(frozen=True)
class ExportOptions:
    """What is made of a model.

    Attributes:
        plan: how each part's weights are stored.
        context_length: longest conversation in tokens, pictures included; None: the model's, at most 8192.
        image_size: side of the pictures, for families that leave it open.
        calibration: JSON of conversations that methods with data look at; None for the set that ships.
        verify: compare each part with PyTorch, and stop when one is below its floor.
        name: of the model, in the manifest; None for its folder's.
        budget: bytes that the language model may take; the layers that suffer most get 8 bits. None: by plan.
        int8_cache: keys and values in int8, with steps found on the calibration set.
    """

    plan: QuantizationPlan = field(default_factory=QuantizationPlan)
    context_length: int | None = None
    image_size: int | None = None
    calibration: Path | None = None
    verify: bool = True
    name: str | None = None
    budget: int | None = None
    int8_cache: bool = False


@dataclass(frozen=True)
class Record:
    """A finished part: its entry in the manifest, its golden vectors, and the seconds it took."""

    part: manifest.Part
    golden: manifest.Golden | None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass
class Model:
    """A loaded checkpoint, taken apart."""

    name: str
    split: SplitModel
    parts: dict[str, Part]
    prompt: manifest.Prompt
    tokenizer: PromptTokenizer
    digest: str
    torch_model: Any
    license: str = ""
    license_text: str | None = None


def open_model(source: str | None, options: ExportOptions, report: Report = lambda _: None) -> Model:
    """Loads a checkpoint, its weights mapped from disk, and takes it apart. Raises MobileMMError."""
    from mobilemm.models.checkpoints import load
    from mobilemm.models.checkpoints.default import default_model_folder
    from mobilemm.models.checkpoints.reading import resolve_folder

    folder = default_model_folder() if source is None else resolve_folder(source)
    report(f"reading {folder}")
    loaded = load(str(folder))
    split = split_model(loaded.model, loaded.processor, options.image_size)
    longest = int(split.text_config.max_position_embeddings)
    parts = parts_of(split, min(options.context_length or min(longest, 8192), longest))
    prompt = derive_prompt(split)
    tokenizer = PromptTokenizer(
        split.processor.tokenizer.backend_tokenizer, prompt, split.image_token_id, split.num_image_tokens
    )
    name = options.name or ("mobilemm-default" if source is None else Path(source).name)
    text = _license_text(folder)
    return Model(
        name, split, parts, prompt, tokenizer, folder_digest(folder), loaded.model, _license(folder), text
    )


def _license_text(folder: Path) -> str | None:
    path = next((path for path in sorted(folder.glob("LICEN[SC]E*")) if path.is_file()), None)
    return path.read_text(encoding="utf-8", errors="replace") if path is not None else None


def _license(folder: Path) -> str:
    """What the model card's front matter names as licence, if anything."""
    card = folder / "README.md"
    if not card.is_file():
        return ""
    found = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return found[1] if found else ""


def folder_digest(folder: Path) -> str:
    """Hash of a checkpoint's files, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def export_parts(
    model: Model, target: Target, options: ExportOptions, work: Path, report: Report = lambda _: None
) -> dict[str, Record]:
    """Writes each part into `work`, unless what lies there was made from the same.

    A part's record is written when its files are whole, so that a broken export leaves finished parts, and
    nothing else that looks like one.

    Raises MobileMMError when a part cannot be expressed by the target, or is below its floor.
    """
    work.mkdir(parents=True, exist_ok=True)
    samples = read_calibration(options.calibration)
    prints = fingerprints(model, target, options)
    records: dict[str, Record] = {}
    tables: dict[str, QuantizedWeight] = {}
    proof: _Proof | None = None
    for name in (name for name in ORDER if name in model.parts):
        record = _finished(work, name, prints[name])
        if record is not None:
            report(f"{name}: unchanged")
            records[name] = record
            continue
        start = time.monotonic()
        part = model.parts[name]
        report(f"{name}: quantizing")
        module, plan = _quantized(model, part, options, samples, tables, report)
        report(f"{name}: converting")
        # The record goes first and comes last: without it, what lies here counts for nothing.
        (work / f"{name}.json").unlink(missing_ok=True)
        exported = target.write(part, module, work)
        proof = proof or _Proof(model, samples)
        parity, golden = _verify(model, part, module, target, exported, work, plan, proof, options, report)
        entry = _entry(part, plan, exported, work, parity, prints[name])
        record = Record(entry, golden, time.monotonic() - start, exported.notes)
        keep_record(work, name, record)
        records[name] = record
        del module
        for weight in part.weights.values() if not isinstance(part.module, Decoder) else ():
            page_out(weight)
        release()
    return records


def fingerprints(model: Model, target: Target, options: ExportOptions) -> dict[str, str]:
    """Of each part: the hash of everything that it is made from."""
    calibration = Path(options.calibration or default_calibration()).read_bytes()
    prints: dict[str, str] = {}
    for name in (name for name in ORDER if name in model.parts):
        part = model.parts[name]
        plan = options.plan.part(name)
        facts = [
            model.digest,
            __version__,
            target.fingerprint,
            name,
            repr(plan),
            repr({key: (value.shape, value.dtype) for key, value in part.inputs.items()}),
            *(
                [f"{part.module.spec.context_length} {options.budget} {options.int8_cache}"]
                if isinstance(part.module, Decoder)
                else []
            ),
            repr(options.verify),
            hashlib.sha256(calibration).hexdigest(),
            *(prints[owner] for owner, _ in part.shared.values()),
        ]
        prints[name] = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return prints


# --- quantization ------------------------------------------------------------------------------------------


def _quantized(
    model: Model,
    part: Part,
    options: ExportOptions,
    samples: Sequence[CalibrationSample],
    tables: dict[str, QuantizedWeight],
    report: Report,
) -> tuple[nn.Module, PartPlan]:
    """The part's module with weights as the plan stores them; and the plan, refined by measurements."""
    plan = options.plan.part(part.name)
    if isinstance(part.module, Decoder):
        with torch.device("meta"):
            decoder = Decoder(part.module.spec)
        head = _table(model, options, tables) if part.module.spec.tied else None
        names = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
        _refuse_unused(part.name, plan, names)
        data = None
        if options.budget is not None or any(needs_data(plan.scheme(name)) for name in names):
            data = calibration_embeddings(model, samples)
        if options.int8_cache:
            _set_cache_scales(model, decoder, samples)
        if options.budget is not None and data is not None:
            report(f"{part.name}: measuring which layers suffer most")
            plan = _spend(part, plan, data, head, options.budget, report)
        quantize_decoder(
            decoder,
            part.weights,
            plan,
            calibration=data,
            head=head,
            progress=lambda name, done, total: report(f"{part.name}: quantizing {name} ({done}/{total})"),
        )
        return decoder.eval(), plan
    if part.name == "embed":
        table = _table(model, options, tables)
        module = verify.share_tensors(part.module)
        if table is None:
            return verify.with_weights(module, part.weights), plan
        module.table = QuantizedEmbedding(table)
        return module.eval(), plan
    module = verify.share_tensors(part.module)
    linears = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    _refuse_unused(part.name, plan, linears)
    for name, linear in linears.items():
        scheme = plan.scheme(name)
        if scheme.quantized:
            owner, _, last = name.rpartition(".")
            weight = quantize(linear.weight.detach().float(), scheme, f"{part.name}.{name}")
            bias = None if linear.bias is None else linear.bias.detach().float()
            setattr(module.get_submodule(owner), last, QuantizedLinear(weight, bias))
            page_out(linear.weight.detach())
    return verify.with_weights(module, part.weights), plan


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


def _table(
    model: Model, options: ExportOptions, tables: dict[str, QuantizedWeight]
) -> QuantizedWeight | None:
    """The embedding's table as stored, None when it stays in floating point."""
    scheme = options.plan.part("embed").scheme("table")
    if not scheme.quantized:
        return None
    if "table" not in tables:
        tables["table"] = quantize(model.parts["embed"].weights["table.weight"], scheme, "embed.table")
    return tables["table"]


def _refuse_unused(part: str, plan: PartPlan, names: Sequence[str] | Mapping[str, Any]) -> None:
    if unused := plan.unused_patterns(names):
        few = ", ".join(list(names)[:4])
        raise MobileMMError(f"no layer of {part!r} is named {unused[0]!r}; its layers are {few}, …")


def calibration_embeddings(model: Model, samples: Sequence[CalibrationSample]) -> Tensor:
    """Input embeddings of samples up to CALIBRATION_TOKENS: (rows, CALIBRATION_LENGTH, width)."""
    decoder = model.parts["decoder"].module
    assert isinstance(decoder, Decoder)
    spec = decoder.spec
    weights = spec.num_layers * spec.hidden_size * (spec.hidden_size + 3 * spec.intermediate_size)
    wanted = CALIBRATION_TOKENS // (2 if weights > LARGE_DECODER else 1)
    pieces: list[Tensor] = []
    total = 0
    for sample in samples:
        ids, pictures = _encoded(model, sample)
        pieces.append(_embedded(model, ids, pictures)[0])
        total += len(ids)
        if total >= wanted:
            break
    together = torch.cat(pieces)
    length = min(CALIBRATION_LENGTH, spec.context_length, len(together))
    return together[: len(together) // length * length].view(-1, length, together.shape[1])


def _encoded(model: Model, sample: CalibrationSample) -> tuple[list[int], list[Any]]:
    ids = model.tokenizer.encode(sample.messages, add_generation_prompt=False)
    return ids, [to_pixels(path, model.split.image) for path in sample.files]


@torch.no_grad()
def _embedded(model: Model, ids: Sequence[int], pictures: Sequence[Any]) -> Tensor:
    """(1, length, width) in fp32 PyTorch. Only the rows that are needed leave the table."""
    embed = model.parts["embed"]
    table = embed.weights["table.weight"]
    tensor = torch.tensor([list(ids)])
    is_image = tensor == model.split.image_token_id
    rows = table[tensor.masked_fill(is_image, 0)].float() * getattr(embed.module, "scale", 1.0)
    if pictures:
        pixels = torch.from_numpy(np.stack(pictures))
        features = verify.reference(model.parts["vision"], {"pixels": pixels})
        rows = rows.masked_scatter(is_image[..., None], features)
    return rows


# --- verification ------------------------------------------------------------------------------------------


class _Proof:
    """What the parts are verified on: pictures, and conversations about them, of the calibration set."""

    def __init__(self, model: Model, samples: Sequence[CalibrationSample]) -> None:
        decoder = model.parts["decoder"].module
        assert isinstance(decoder, Decoder)
        longest = decoder.spec.context_length
        for sample in (sample for sample in samples if sample.files):
            self.ids, self.pictures = _encoded(model, sample)
            if self._behind_pictures(model) <= longest:
                break
        else:
            self.pictures = [np.full((3, model.split.image.height, model.split.image.width), 128, np.uint8)]
            self.ids = [model.split.image_token_id] * model.split.num_image_tokens
        text = next((sample for sample in samples if not sample.files), None)
        if text is not None:
            self.ids += _encoded(model, text)[0]
        self.ids = self.ids[: min(max(VERIFY_TOKENS, self._behind_pictures(model)), longest)]
        self.embeddings = _embedded(model, self.ids, self.pictures)

    def _behind_pictures(self, model: Model) -> int:
        """Positions up to a few behind the last picture: a picture is not cut."""
        last = [index for index, token in enumerate(self.ids) if token == model.split.image_token_id]
        return last[-1] + 16 if last else 0

    def inputs(self, model: Model, part: Part) -> dict[str, Tensor]:
        """The part's inputs."""
        pixels = torch.from_numpy(np.stack(self.pictures))
        if part.name == "vision":
            return {"pixels": pixels}
        if part.name == "embed":
            ids = torch.tensor([self.ids])
            count = int((ids == model.split.image_token_id).sum())
            width = self.embeddings.shape[2]
            return {
                "input_ids": ids,
                "image_features": self.embeddings[ids == model.split.image_token_id].view(count, width),
            }
        inputs = {"inputs_embeds": self.embeddings}
        grid = model.split.image.position_grid
        if "position_ids" in part.inputs and grid is not None:
            positions = rope_positions(self.ids, model.split.image_token_id, grid)
            inputs["position_ids"] = torch.from_numpy(np.ascontiguousarray(positions)).view(3, 1, -1)
        return inputs


def _verify(
    model: Model,
    part: Part,
    module: nn.Module,
    target: Target,
    exported: Exported,
    folder: Path,
    plan: PartPlan,
    proof: _Proof,
    options: ExportOptions,
    report: Report,
) -> tuple[manifest.Parity | None, manifest.Golden | None]:
    """Parity, and the golden vectors, which are what the shipped part gives here."""
    report(f"{part.name}: verifying")
    inputs = proof.inputs(model, part)
    arrays = {name: np.ascontiguousarray(value.numpy()) for name, value in inputs.items()}
    shipped = target.run(part, exported, folder, arrays)
    bits = min(plan.default.bits, 32)
    parity = None
    if options.verify:
        wanted = verify.reference(part, inputs).numpy()
        with torch.no_grad():
            quantized = _eager(module, inputs).numpy()
        parity = verify.measure(shipped, wanted, quantized, bits=bits, logits=part.cache is not None)
        worst = (lambda: verify.worst_layers(part, module, inputs)) if isinstance(module, Decoder) else None
        verify.check(part.name, bits, parity, worst)
    golden_inputs = arrays
    if part.cache is not None:
        cut = min(GOLDEN_TOKENS, arrays["inputs_embeds"].shape[1])
        golden_inputs = {
            name: value[..., :cut, :] if name == "inputs_embeds" else value[..., :cut]
            for name, value in arrays.items()
        }
    elif part.name == "vision":
        golden_inputs = {"pixels": arrays["pixels"][:1]}
    outputs = target.run(part, exported, folder, golden_inputs)
    if part.cache is not None:
        outputs = outputs[:, -1:]
    tensors = {f"inputs.{name}": np.ascontiguousarray(value) for name, value in golden_inputs.items()}
    tensors[f"outputs.{part.outputs[0]}"] = np.ascontiguousarray(outputs)
    save_file(tensors, folder / f"{part.name}.safetensors")
    floor = min(parity.conversion_db - 6, 60.0) if parity is not None else 15.0
    return parity, manifest.Golden(file=f"golden/{part.name}.safetensors", part=part.name, floor_db=floor)


def _eager(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    if isinstance(module, Decoder):
        return module(inputs["inputs_embeds"], EagerCache(), inputs.get("position_ids"))
    return module(*inputs.values())


# --- finished parts ----------------------------------------------------------------------------------------


def _entry(
    part: Part,
    plan: PartPlan,
    exported: Exported,
    folder: Path,
    parity: manifest.Parity | None,
    fingerprint: str,
) -> manifest.Part:
    own = [name for name in exported.files if name.split(".")[0] == part.name]
    size = sum((folder / name).stat().st_size for name in own)
    parameters = sum(value.numel() for value in part.weights.values()) or sum(
        parameter.numel() for parameter in part.module.parameters()
    )
    scheme = plan.default
    return manifest.Part(
        file=f"parts/{exported.files[0]}",
        files=[f"parts/{name}" for name in exported.files],
        inputs=list(exported.inputs),
        outputs=list(exported.outputs),
        quantization=manifest.Quantization(
            bits=scheme.bits,
            block_size=scheme.block_size if scheme.quantized else None,
            symmetric=scheme.symmetric,
            method=scheme.method if scheme.quantized else "none",
            activations=plan.activations,
            exceptions={pattern: other.bits for pattern, other in plan.exceptions},
        ),
        bytes=size,
        parameters=parameters,
        # Weights in the file, once more as the runtime packs them for its kernels.
        peak_memory=2 * sum((folder / name).stat().st_size for name in exported.files),
        fingerprint=fingerprint,
        parity=parity,
        cache=exported.cache,
    )


def keep_record(work: Path, name: str, record: Record) -> None:
    """Writes a part's record, when its files are there."""
    files = [Path(file).name for file in record.part.files] + [f"{name}.safetensors"]
    for file in files:
        _sync(work / file)
    text = json.dumps(
        {
            "part": record.part.model_dump(),
            "golden": record.golden.model_dump() if record.golden else None,
            "seconds": record.seconds,
            "notes": record.notes,
            "sizes": {file: (work / file).stat().st_size for file in files},
        }
    )
    whole = work / f".{name}.json"
    whole.write_text(text, encoding="utf-8")
    _sync(whole)
    os.replace(whole, work / f"{name}.json")


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _finished(work: Path, name: str, fingerprint: str) -> Record | None:
    """A part's record, when it is whole and was made from the same."""
    try:
        content = json.loads((work / f"{name}.json").read_text(encoding="utf-8"))
        part = manifest.Part.model_validate_json(json.dumps(content["part"]))
        golden = content["golden"]
        sizes = {file: (work / file).stat().st_size for file in content["sizes"]}
        if part.fingerprint != fingerprint or sizes != content["sizes"]:
            return None
        if golden is None:
            return None
        vectors = manifest.Golden.model_validate_json(json.dumps(golden))
        return Record(part, vectors, content["seconds"], tuple(content["notes"]))
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None


def created_by() -> dict[str, str]:
    """The versions that a bundle was made with."""
    return {"mobilemm": __version__, **{name: version(name) for name in ("torch", "transformers")}}
