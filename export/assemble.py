"""Finished parts, tokenizer, prompt and proof → one bundle."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image as PIL
from safetensors.numpy import load_file, save_file

from mobilemm.errors import MobileMMError
from mobilemm.export.bundle import BundleWriter, recover
from mobilemm.export.calibration import read_calibration
from mobilemm.export.drawing import schedules
from mobilemm.export.memory import release
from mobilemm.export.model import Model, Report, open_model
from mobilemm.export.options import ExportOptions
from mobilemm.export.pipeline import Record, created_by, export_parts, fingerprints, keep_record
from mobilemm.export.plan_sizes import memory_warning
from mobilemm.export.targets import Target
from mobilemm.runtime import manifest
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import Bundle, open_bundle
from mobilemm.runtime.noise import RULE
from mobilemm.runtime.pytorch import ChatSession
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.self_check import ROW_SUMS, machine, row_sums, runtime_version
from mobilemm.runtime.session import Session

# Beyond this fp32 copies for a comparison of answers would take more memory than the export itself.
MAX_PARAMETERS_TO_RUN = 400_000_000
# An int8 cache is young: the only release it was run on.
INT8_CACHE_RUNTIME = "1.31.0"
QUESTION, TEXT_QUESTION = "What is in this picture?", "Which animals live in the sea?"
ANSWER_TOKENS = 24
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Result:
    """An export that is done: the bundle, and what its table shows.

    `pytorch_answer` is what the checkpoint in fp32 answers in the bundle's golden conversation, None where
    the model is too large to be run beside the export.
    """

    bundle: Bundle
    records: dict[str, Record]
    pytorch_answer: str | None = None
    notes: tuple[str, ...] = ()


def export_bundle(
    source: str | None,
    target: Target,
    destination: Path,
    options: ExportOptions,
    *,
    overwrite: bool = False,
    report: Report = lambda _: None,
) -> Result:
    """A checkpoint (None: the default model) → a verified bundle at `destination`; see `export_bundles`."""
    (result,) = export_bundles(source, [(target, destination)], options, overwrite=overwrite, report=report)
    return result


def export_bundles(
    source: str | None,
    places: Sequence[tuple[Target, Path]],
    options: ExportOptions,
    *,
    overwrite: bool = False,
    report: Report = lambda _: None,
) -> Iterator[Result]:
    """A checkpoint (None: the default model) → a verified bundle of each target, one after the other.

    The checkpoint is read once, and its decoder quantized once. Finished parts are kept beside the bundle, in
    a hidden folder, until it is whole: a broken export goes on where it stopped. With `overwrite`, parts of
    the bundle that is there are taken over when they were made from the same.

    Raises MobileMMError for whatever cannot be read, expressed or verified; nothing is at that destination
    then, or what was there before.
    """
    places = [(target, Path(destination)) for target, destination in places]
    for _, destination in places:
        with BundleWriter(destination, overwrite=overwrite):
            pass  # refuses an occupied place before anything is computed
    for target, _ in places:
        target.stores(options.plan)
    read_calibration(options.calibration)  # and a set that cannot be used
    model = open_model(source, options, report)
    for target, _ in places:
        if (warning := memory_warning(model, target, options)) is not None:
            report(warning)
    store = codes_of(places[0][1])
    expected = _PytorchAnswer(model)
    for target, destination in places:
        contextual = model.with_options(options, target.default_context)
        _refuse_short_context(contextual)
        stored = replace(options, plan=target.stores(options.plan))
        yield _export(contextual, target, destination, stored, overwrite, report, store, expected)
    shutil.rmtree(store, ignore_errors=True)


def codes_of(destination: Path) -> Path:
    """Where quantized weights are kept while a bundle is exported to `destination`."""
    return destination.with_name(f".{destination.name}.quantized")


def _export(
    model: Model,
    target: Target,
    destination: Path,
    options: ExportOptions,
    overwrite: bool,
    report: Report,
    store: Path,
    expected: _PytorchAnswer,
) -> Result:
    work = destination.with_name(f".{destination.name}.parts")
    if destination.is_dir():
        _take_over(destination, work, fingerprints(model, target, options))
    records = export_parts(model, target, options, work, report, store)
    report("assembling")
    release()
    with BundleWriter(destination, overwrite=overwrite) as writer:
        folder = writer.folder
        (folder / "golden").mkdir()
        for name, record in records.items():
            for file in record.part.files:
                if not (folder / file).exists():
                    _copy(work / _in_work(file), folder / file)
            if record.golden is not None:
                shutil.copyfile(work / f"{name}.safetensors", folder / record.golden.file)
        write_tokenizer(model, folder)
        draft = describe(model, target, records)
        for path, text in target.companions(draft).items():
            (folder / path).write_text(text, encoding="utf-8")
        draft = target.label(draft, folder)
        conversation = _converse(model, folder, draft, options)
        answer = expected(folder, conversation) if options.verify else None
        conversation = conversation.model_copy(update={"pytorch_answer": answer})
        draft = draft.model_copy(update={"conversations": [conversation], "files": writer.files()})
        bundle = writer.finish(draft, model.license_text)
    shutil.rmtree(work, ignore_errors=True)
    notes = tuple(note for record in records.values() for note in record.notes)
    return Result(bundle, records, answer, notes)


def _asked(model: Model) -> list[dict[str, Any]]:
    """The golden conversation up to the answer, as messages."""
    picture = [] if model.split.image is None else [{"type": "image"}]
    return [{"role": "user", "content": [*picture, {"type": "text", "text": _question(model)}]}]


def _question(model: Model) -> str:
    return QUESTION if model.split.image is not None else TEXT_QUESTION


def _refuse_short_context(model: Model) -> None:
    """Raises MobileMMError when not even the golden conversation fits."""
    needed = len(model.tokenizer.encode(_asked(model))) + ANSWER_TOKENS
    context = model.decoder.spec.context_length
    if needed > context:
        raise MobileMMError(
            f"--max-seq-len {context}: {'one picture, ' if model.split.image else ''}a question and an answer"
            f" take {needed} tokens of this model; give at least that"
        )


def describe(model: Model, target: Target, records: dict[str, Record]) -> manifest.Manifest:
    """The manifest, but for its files and conversation."""
    runtime = target.runtime
    if any(one.dtype == "int8" for record in records.values() for one in record.part.inputs):
        runtime = runtime.model_copy(update={"min_version": INT8_CACHE_RUNTIME})
    return manifest.Manifest(
        schema_version=1,
        created_by={**created_by(), **runtime_version(target.name), "machine": machine()},
        target=target.name,
        runtime=runtime,
        model=model.card(),
        parts={name: record.part for name, record in records.items()},
        image=model.split.image,
        prompt=model.prompt,
        generation=_generation(model),
        golden=[record.golden for record in records.values() if record.golden is not None],
        conversations=[],
        files=[manifest.File(path="manifest.json", bytes=0, sha256="0" * 64)],
    )


def _generation(model: Model) -> manifest.Generation | None:
    """How pictures are drawn, of a model that has a generator."""
    generator = model.split.generator
    if generator is None:
        return None
    from mobilemm.generation.sampling import sampling_table

    table = sampling_table(generator, model.steps)
    height, width = generator.image_size
    return manifest.Generation(
        signal_token_ids=list(model.split.signal_token_ids),
        height=height,
        width=width,
        steps=table.steps,
        noise=manifest.Noise(rule=RULE, shape=[1, table.noises, *generator.latent_shape]),
        schedules=schedules(generator, model.steps) if "denoiser" in model.parts else None,
    )


def write_tokenizer(model: Model, folder: Path) -> None:
    """tokenizer.json, and what other runtimes read beside it."""
    tokenizer = model.split.processor.tokenizer
    (folder / model.prompt.tokenizer).write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        for name in TOKENIZER_FILES:
            path = Path(temporary) / name
            if path.is_file() and path.suffix == ".json":
                # onnxruntime-genai stops at a null, such as that of a template that there is not.
                settings = json.loads(path.read_text(encoding="utf-8"))
                kept = {key: value for key, value in settings.items() if value is not None}
                (folder / name).write_text(json.dumps(kept, indent=2, ensure_ascii=False), encoding="utf-8")
            elif path.is_file():
                shutil.copyfile(path, folder / name)
        template = getattr(model.split.processor, "chat_template", None)
        if isinstance(template, str) and not (folder / "chat_template.jinja").exists():
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _converse(
    model: Model, folder: Path, draft: manifest.Manifest, options: ExportOptions
) -> manifest.GoldenConversation:
    """One whole conversation with the bundle that is being made, in greedy decoding; its table's sums."""
    path = None if model.split.image is None else "golden/picture.png"
    if path is not None:
        _picture(model, options).save(folder / path)
    stubs = [
        manifest.File(path=str(file.relative_to(folder)), bytes=0, sha256="0" * 64)
        for file in folder.rglob("*")
        if file.is_file()
    ]
    bundle = Bundle(folder, draft.model_copy(update={"files": stubs}))
    backend = open_backend(bundle)
    golden = folder / "golden" / "embed.safetensors"
    save_file({**load_file(golden), ROW_SUMS: row_sums(draft, backend)}, golden)
    session = Session(bundle, backend, Sampling(max_new_tokens=ANSWER_TOKENS), keep_vision=False)
    if path is not None:
        session.look_at(folder / path)
    question = _question(model)
    answer = session.reply(question)
    ids = session.tokenizer.encode(_asked(model))
    return manifest.GoldenConversation(
        image=path, prompt=question, input_ids=ids, answer_ids=session.answer_ids, answer=answer
    )


def _picture(model: Model, options: ExportOptions) -> PIL.Image:
    """The calibration's first picture, or a red one."""
    picture = next((file for sample in read_calibration(options.calibration) for file in sample.files), None)
    if picture is not None:
        image = PIL.open(io.BytesIO(picture.read_bytes())).convert("RGB")
        image.thumbnail((512, 512))
        return image
    assert model.split.image is not None
    return PIL.new("RGB", (model.split.image.width, model.split.image.height), (200, 30, 30))


class _PytorchAnswer:
    """What the checkpoint itself answers in a bundle's conversation: fp32, transformers' `generate`."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.known: dict[tuple[str, str], str] = {}

    def __call__(self, folder: Path, conversation: manifest.GoldenConversation) -> str | None:
        """None for a model that is too large to be run beside the export."""
        torch_model = self.model.torch_model
        if sum(parameter.numel() for parameter in torch_model.parameters()) > MAX_PARAMETERS_TO_RUN:
            return None
        picture = (folder / conversation.image).read_bytes() if conversation.image is not None else b""
        key = conversation.prompt, hashlib.sha256(picture).hexdigest()
        if key not in self.known:
            session = ChatSession(
                torch_model.float(), self.model.split.processor, Sampling(max_new_tokens=ANSWER_TOKENS)
            )
            if picture:
                session.look_at(picture)
            self.known[key] = session.reply(conversation.prompt)
        return self.known[key]


def _in_work(file: str) -> str:
    """A part's file, as the manifest names it, in the folder of finished parts."""
    return file.removeprefix("parts/")


def _copy(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)


def _take_over(destination: Path, work: Path, prints: dict[str, str]) -> None:
    """Copies parts of the bundle that is there, where they were made from the same, as if just finished."""
    with suppress(MobileMMError):
        recover(destination)
        old = open_bundle(destination)
        golden: Sequence[manifest.Golden] = old.manifest.golden
        for name, part in old.manifest.parts.items():
            vectors = next((one for one in golden if one.part == name), None)
            if part.fingerprint != prints.get(name) or vectors is None or (work / f"{name}.json").exists():
                continue
            work.mkdir(parents=True, exist_ok=True)
            for file in part.files:
                _copy(old.path(file), work / _in_work(file))
            shutil.copyfile(old.path(vectors.file), work / f"{name}.safetensors")
            keep_record(work, name, Record(part, vectors))
