"""The bundle's own proof, golden vectors and a conversation, on whatever runs the bundle here. No torch."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from mobilemm.errors import MobileMMError, one_line
from mobilemm.runtime.backends import Array, Backend
from mobilemm.runtime.bundle import Bundle
from mobilemm.runtime.manifest import Manifest
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.session import Session

RUNTIMES = {"onnx": "onnxruntime", "coreml": "coremltools", "executorch": "executorch"}

# Where the same runtime ran on the same kind of processor, only the order of additions may differ: no single
# number by more than a ten-thousandth of what they are on average. (A weight of the output head changes one
# logit of tens of thousands, which no mean over all of them shows.) Where all is rounded to float16, that
# order decides which way, and it goes on through all layers: a hundredth.
SAME_RUNTIME_DB = {"onnx": 80.0, "coreml": 40.0, "executorch": 80.0}
MAX_DB = 200.0
# In the embedding's golden file: that no row was changed, also those that no golden prompt looks up.
ROW_SUMS, ROWS_AT_ONCE = "row_sums", 512
# By which onnxruntime chooses its kernels, and these how they round activations.
INSTRUCTION_SETS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("asimddp", "i8mm", "bf16", "sve"),
)


@dataclass(frozen=True)
class Check:
    """One thing that was checked: `part` names a part, or "conversation"."""

    part: str
    passed: bool
    text: str


def self_check(bundle: Bundle, backend: Backend) -> Iterator[Check]:
    """Runs each part on its golden vectors, then the conversation.

    A part must come as close to the vectors as the manifest says. On the runtime and kind of processor that
    made them every number must be the same to the target's SAME_RUNTIME_DB, so that even one changed weight
    shows.
    """
    target = bundle.manifest.target
    here = {**runtime_version(target), "machine": machine()}
    same = all(bundle.manifest.created_by.get(key) == value for key, value in here.items())
    for golden in bundle.manifest.golden:
        try:
            outputs = _run(bundle, backend, golden.part, golden.file)
        except MobileMMError as error:
            yield Check(golden.part, False, one_line(error))
            continue
        found = min(snr_db(*pair) for pair in outputs)
        text = f"{found:.1f} dB to its golden vectors"
        passed = found >= golden.floor_db
        if not passed:
            text += f", at least {golden.floor_db:.0f} dB is wanted"
        elif same and (peak := min(peak_db(*pair) for pair in outputs)) < SAME_RUNTIME_DB[target]:
            passed = False
            text += (
                f", but one number is only within {peak:.1f} dB, and this is the runtime and processor that"
                " made them"
            )
        else:
            text += ", as when it was made"
        yield Check(golden.part, passed, text)
    for conversation in bundle.manifest.conversations:
        sampling = Sampling(max_new_tokens=max(1, len(conversation.answer_ids)))
        session = Session(bundle, backend, sampling)
        if conversation.image is not None:
            session.look_at(bundle.path(conversation.image))
        answer = session.reply(conversation.prompt)
        if answer == conversation.answer:
            yield Check("conversation", True, f"answers as when it was made: {answer!r}")
        else:
            # On another machine a near-tie may fall otherwise; the vectors above tell whether that is all.
            text = f"answers {answer!r}; when it was made it was {conversation.answer!r}"
            yield Check("conversation", not same, text)


def _run(bundle: Bundle, backend: Backend, part: str, file: str) -> list[tuple[Array, Array]]:
    """A part's outputs for its golden vectors' inputs, each beside the vectors' own."""
    tensors = load_file(bundle.path(file))
    inputs = {name[7:]: value for name, value in tensors.items() if name.startswith("inputs.")}
    wanted = {name[8:]: value for name, value in tensors.items() if name.startswith("outputs.")}
    every_row = tensors.get(ROW_SUMS)
    if part == "decoder":
        logits = backend.decoder().decode(inputs["inputs_embeds"], inputs.get("position_ids"))
        found = {"logits": logits}
    else:
        found = backend.run(part, inputs)
    missing = wanted.keys() - found.keys()
    if missing or not wanted:
        raise MobileMMError(f"{bundle.path(file)}: no output {', '.join(sorted(missing)) or 'at all'}")
    pairs = [(found[name], value) for name, value in wanted.items()]
    return pairs if every_row is None else [*pairs, (row_sums(bundle.manifest, backend), every_row)]


def row_sums(manifest: Manifest, backend: Backend) -> Array:
    """Of each row of the embedding's table the sum, as the bundle gives it: float32 (vocabulary,)."""
    vocabulary, width = manifest.model.vocab_size, manifest.model.hidden_size
    length = min(ROWS_AT_ONCE, manifest.model.context_length // 2)
    none = np.zeros((0, width), np.float32)
    sums = []
    for start in range(0, vocabulary, length):
        ids = np.arange(start, min(start + length, vocabulary))[None]
        rows = backend.run("embed", {"input_ids": ids, "image_features": none})["inputs_embeds"]
        sums.append(rows[0].astype(np.float32).sum(-1))
    return np.concatenate(sums)


def snr_db(found: Array, wanted: Array) -> float:
    """10 log10 of the wanted energy over the error's, within ±MAX_DB; -MAX_DB for another shape or NaN."""
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return -MAX_DB
    signal = float(np.square(wanted, dtype=np.float64).sum())
    noise = float(np.square(found.astype(np.float64) - wanted).sum())
    if noise == 0:
        return MAX_DB
    return -MAX_DB if signal == 0 else max(-MAX_DB, min(10 * math.log10(signal / noise), MAX_DB))


def peak_db(found: Array, wanted: Array) -> float:
    """20 log10 of the wanted numbers' root mean square over the largest error, within ±MAX_DB.

    -MAX_DB for another shape or NaN.
    """
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return -MAX_DB
    scale = math.sqrt(np.square(wanted, dtype=np.float64).mean()) if wanted.size else 0.0
    largest = float(np.abs(found.astype(np.float64) - wanted).max(initial=0.0))
    if largest == 0:
        return MAX_DB
    return -MAX_DB if scale == 0 else max(-MAX_DB, min(20 * math.log10(scale / largest), MAX_DB))


def machine() -> str:
    """The kind of processor, with those of INSTRUCTION_SETS that it has: "x86_64 avx2 avx512f"."""
    found: set[str] = set()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                found.update(value.split())
                break
    return " ".join([platform.machine(), *(name for name in INSTRUCTION_SETS if name in found)])


def runtime_version(target: str) -> dict[str, str]:
    """The runtime of a target and its installed version, as `created_by` has it."""
    name = RUNTIMES[target]
    try:
        return {name: version(name)}
    except PackageNotFoundError:
        return {}
