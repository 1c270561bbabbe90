"""A checkpoint, part by part: quantized by one plan, written by a target, verified, kept when it is done."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from safetensors.numpy import save_file
from torch import Tensor, nn

from mobilemm import __version__
from mobilemm.export import verify
from mobilemm.export.calibration import CalibrationSample, default_calibration, read_calibration
from mobilemm.export.decoder import Decoder, EagerCache
from mobilemm.export.drawing import OutputProjector
from mobilemm.export.memory import page_out, release
from mobilemm.export.model import Model, Report
from mobilemm.export.options import ExportOptions
from mobilemm.export.parts import Part
from mobilemm.export.quantization import DRAWING_PARTS, GENERATOR_PARTS, PartPlan
from mobilemm.export.quantized_parts import QuantizedParts
from mobilemm.export.targets import Exported, Target
from mobilemm.runtime import manifest
from mobilemm.runtime.noise import normal
from mobilemm.runtime.session import rope_positions

# Decoder first: the embedding points into its file where the two are one table.
ORDER = ("decoder", "embed", "vision", *DRAWING_PARTS)
# Positions that the decoder is verified on, and those of its golden vectors.
VERIFY_TOKENS, GOLDEN_TOKENS = 160, 24
# What is drawn to verify the parts that draw.
DRAWING_REQUEST = "Draw a red apple."


@dataclass(frozen=True)
class Record:
    """A finished part: its entry in the manifest, its golden vectors, and the seconds it took."""

    part: manifest.Part
    golden: manifest.Golden | None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


def export_parts(
    model: Model,
    target: Target,
    options: ExportOptions,
    work: Path,
    report: Report = lambda _: None,
    store: Path | None = None,
) -> dict[str, Record]:
    """Writes each part into `work`, unless what lies there was made from the same.

    A part's record is written when its files are whole, so that a broken export leaves finished parts, and
    nothing else that looks like one. In `store` quantized weights are kept, for other targets and tries.

    Raises MobileMMError when a part cannot be expressed by the target, or is below its floor.
    """
    work.mkdir(parents=True, exist_ok=True)
    samples = read_calibration(options.calibration)
    if model.split.image is None:
        samples = [sample for sample in samples if not sample.files]
    prints = fingerprints(model, target, options)
    names = [name for name in ORDER if name in model.parts]
    finished = {name: _finished(work, name, prints[name]) for name in names}
    if target.joins and None in finished.values():  # what is one file is made in one go
        finished = dict.fromkeys(names)
    quantized = QuantizedParts(model, options, samples, store, report)
    records: dict[str, Record] = {}
    exports: dict[str, Exported] = {}
    proof: _Proof | None = None
    for name in names:
        if (record := finished[name]) is not None:
            report(f"{name}: unchanged")
            records[name] = record
            continue
        start = time.monotonic()
        part = model.parts[name]
        report(f"{name}: quantizing")
        module, plan = quantized.module(name)
        report(f"{name}: converting")
        # The record goes first and comes last: without it, what lies here counts for nothing.
        (work / f"{name}.json").unlink(missing_ok=True)
        release()
        if name == "vision" and plan.activations == "int8":
            part = replace(part, samples=_pictures(model, samples))
        exports[name] = exported = target.write(part, module, work)
        release()
        proof = proof or _Proof(model, samples)
        parity, golden = _verify(model, part, module, target, exported, work, plan, proof, options, report)
        entry = _entry(part, plan, exported, work, parity, prints[name])
        told = [quantized.notes[name]] if name in quantized.notes else []
        notes = (*exported.notes, *told)
        records[name] = Record(entry, golden, time.monotonic() - start, notes)
        if not target.joins:
            keep_record(work, name, records[name])
        del module
        for weight in part.weights.values() if not isinstance(part.module, Decoder) else ():
            page_out(weight)
        release()
    if target.joins and exports:
        report("joining")
        for name, joined in target.join(exports, work, model.card()).items():
            files = {"file": f"parts/{joined.file}", "files": [f"parts/{file}" for file in joined.files]}
            records[name] = replace(records[name], part=records[name].part.model_copy(update=files))
            keep_record(work, name, records[name])
    return records


def _pictures(model: Model, samples: Sequence[CalibrationSample]) -> Tensor | None:
    """Those of the calibration set, uint8 (pictures, 3, height, width)."""
    found = [picture for sample in samples for picture in model.encode(sample)[1]]
    return torch.from_numpy(np.stack(found)) if found else None


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
            *([f"{model.steps} steps"] if name in GENERATOR_PARTS else []),
            *([prints["decoder"], repr(options.plan.part("embed"))] if name == "output_projector" else []),
        ]
        prints[name] = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return prints


# --- verification ------------------------------------------------------------------------------------------


class _Proof:
    """What the parts are verified on: pictures, and conversations about them, of the calibration set."""

    def __init__(self, model: Model, samples: Sequence[CalibrationSample]) -> None:
        longest = model.decoder.spec.context_length
        for sample in (sample for sample in samples if sample.files):
            self.ids, self.pictures = model.encode(sample)
            if self._behind_pictures(model) <= longest:
                break
        else:
            self.ids, self.pictures = [], []
        if (image := model.split.image) is not None and not self.pictures:
            self.pictures = [np.full((3, image.height, image.width), 128, np.uint8)]
            self.ids = [model.split.image_token_id] * model.split.num_image_tokens
        text = next((sample for sample in samples if not sample.files), None)
        if text is not None:
            self.ids += model.encode(text)[0]
        self.ids = self.ids[: min(max(VERIFY_TOKENS, self._behind_pictures(model)), longest)]
        self.embeddings = model.embed(self.ids, self.pictures)

    def _behind_pictures(self, model: Model) -> int:
        """Positions up to a few behind the last picture: a picture is not cut."""
        last = [index for index, token in enumerate(self.ids) if token == model.split.image_token_id]
        return last[-1] + 16 if last else 0

    def inputs(self, model: Model, part: Part) -> dict[str, Tensor]:
        """The part's inputs."""
        if part.name == "vision":
            return {"pixels": torch.from_numpy(np.stack(self.pictures))}
        if part.name == "embed":
            ids = torch.tensor([self.ids])
            count = int((ids == model.split.image_token_id).sum())
            width = self.embeddings.shape[2]
            return {
                "input_ids": ids,
                "image_features": self.embeddings[ids == model.split.image_token_id].view(count, width),
            }
        if isinstance(part.module, OutputProjector):
            head = torch.linalg.pinv(part.module.reader.weight)  # as it ships: its inverse is in there
            return {"signal_logits": self._signal_states(model) @ head.T}
        if part.name in GENERATOR_PARTS:
            return self._drawing_inputs(model, part)
        inputs = {"inputs_embeds": self.embeddings}
        image = model.split.image
        grid = None if image is None else image.position_grid
        if "position_ids" in part.inputs and grid is not None:
            positions = rope_positions(self.ids, model.split.image_token_id, grid)
            inputs["position_ids"] = torch.from_numpy(np.ascontiguousarray(positions)).view(3, 1, -1)
        return inputs

    def _drawing_inputs(self, model: Model, part: Part) -> dict[str, Tensor]:
        """Of the first step where they are taken one by one; the latents behind the last to be decoded."""
        from mobilemm.generation.sampling import UnrolledGenerator

        assert model.split.output_projector is not None
        unrolled = UnrolledGenerator(model.split.generator, model.steps).eval()
        noise = torch.from_numpy(normal(0, (1, unrolled.table.noises, *unrolled.latent_shape)))
        with torch.no_grad():
            condition = model.split.output_projector.float()(self._signal_states(model))
            if part.name == "image_decoder":
                return {"latents": unrolled.latents(condition, noise)}
        if part.name == "generator":
            return {"condition": condition, "noise": noise}
        latents, fresh, scales = noise[:, 0], noise[:, -1], unrolled.rows[0]
        return {"latents": latents, "condition": condition, "noise": fresh, "scales": scales}

    def _signal_states(self, model: Model) -> Tensor:
        """Last hidden states (1, signal tokens, width) behind a request for a drawing, in fp32 PyTorch."""
        ids = model.tokenizer.encode([{"role": "user", "content": DRAWING_REQUEST}])
        ids += model.split.signal_token_ids
        states = verify.decoder_states(model.parts["decoder"], {"inputs_embeds": model.embed(ids, [])})
        return states[:, -len(model.split.signal_token_ids) :]


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
    release()
    bits = min(plan.default.bits, 32)
    parity = None
    if options.verify:
        sums: dict[str, Tensor] = {}
        wanted = verify.reference(part, inputs, sums.__setitem__).numpy()
        with torch.no_grad(), verify.layer_decibels(module, sums) as layers:
            quantized = _eager(exported.module or module, inputs).numpy()
        parity = verify.measure(shipped, wanted, quantized, bits=bits, logits=part.cache is not None)
        parity = parity.model_copy(update={"layers": layers or None})
        # Of float32 with rounded keys and values: sums in another order fall to another step.
        rounded = bits == 32 and part.cache is not None and options.int8_cache
        half = plan.activations == "float16" or rounded
        verify.check(part.name, bits, parity, verify.worst_layers(layers), half=half)
    golden_inputs = arrays
    if part.cache is not None:
        cut = min(GOLDEN_TOKENS, arrays["inputs_embeds"].shape[1])
        golden_inputs = {
            name: value[..., :cut, :] if name == "inputs_embeds" else value[..., :cut]
            for name, value in arrays.items()
        }
    elif part.name == "vision":
        # Noise as well: it drives channels that one picture leaves at rest.
        picture = arrays["pixels"][:1]
        noise = np.random.default_rng(0).integers(0, 256, picture.shape, np.uint8)
        golden_inputs = {"pixels": np.concatenate([picture, noise])}
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
        file=f"parts/{exported.file}",
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
    files = [file.removeprefix("parts/") for file in record.part.files] + [f"{name}.safetensors"]
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
