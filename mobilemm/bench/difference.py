"""What changed between two bundles: what their manifests say, and their speed when they take turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mobilemm.bench.compare import Change, change
from mobilemm.bench.host import WHAT, Found, label, run
from mobilemm.bench.result import Figure, Settings, Unit
from mobilemm.runtime.bundle import Bundle
from mobilemm.runtime.manifest import Manifest

Difference = tuple[str, str, str]
"""What it is, before, after."""


def differences(before: Bundle, after: Bundle) -> list[Difference]:
    """What a person would ask about, where it is not the same: sizes, precision, parity, answers."""
    first, second = (dict(_facts(bundle.manifest)) for bundle in (before, after))
    names = list(dict.fromkeys([*first, *second]))
    return [
        (name, first.get(name, "–"), second.get(name, "–"))
        for name in names
        if first.get(name) != second.get(name)
    ]


def changed_files(before: Bundle, after: Bundle) -> tuple[int, int]:
    """How many files of `after` are not in `before` as they are, and how many there are."""
    known = {(file.path, file.sha256) for file in before.manifest.files}
    files = after.manifest.files
    return sum((file.path, file.sha256) not in known for file in files), len(files)


def in_turns(
    before: Path, after: Path, settings: Settings, rounds: int, report: Callable[[str], None] = lambda _: None
) -> list[Change]:
    """Measures both in each round, a process each, the order turning; rounds are what is compared, in pairs.

    What a machine does to one round it does to both: smaller differences show than between two files.
    """
    found: list[dict[str, tuple[Unit, list[float]]]] = [{}, {}]
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):
            report(f"round {turn + 1} of {rounds}: {'before' if which == 0 else 'after'}")
            measured = Found()
            run((before, after)[which], "all", settings, measured, {"load": "load_warm"})
            for name, (unit, values) in measured.figures.items():
                found[which].setdefault(name, (unit, []))[1].append(float(np.median(values)))
    changes = []
    for name in WHAT:
        if name in found[0] and name in found[1]:
            first, second = (
                Figure(name=label(name, settings), what=WHAT[name], unit=one[name][0], runs=one[name][1])
                for one in found
            )
            changes.append(change(first, second, paired=True))
    return changes


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield "target", manifest.target
    yield "runtime, at least", f"{manifest.runtime.name} {manifest.runtime.min_version}"
    for package, version in sorted(manifest.created_by.items()):
        yield f"made by {package}", version
    yield "all files", f"{sum(file.bytes for file in manifest.files) / 1e6:,.1f} MB"
    for name, part in manifest.parts.items():
        scheme = part.quantization
        block = f" in blocks of {scheme.block_size}" if scheme.block_size else ""
        yield f"{name}: size", f"{part.bytes / 1e6:,.1f} MB"
        yield f"{name}: weights", f"{scheme.bits} bits{block}, {scheme.method}"
        yield f"{name}: activations", scheme.activations
        if scheme.exceptions:
            yield f"{name}: layers of other bits", str(len(scheme.exceptions))
        if part.parity is not None:
            yield f"{name}: to fp32", f"{part.parity.snr_db:.1f} dB"
            if part.parity.kl is not None:
                yield f"{name}: KL to fp32", f"{part.parity.kl:.3f} nats"
            if part.parity.top1 is not None:
                yield f"{name}: best token as fp32", f"{part.parity.top1:.1%}"
    yield from _flat("model", manifest.model.model_dump())
    for name in ("image", "generation"):
        value = getattr(manifest, name)
        yield from _flat(name, value.model_dump() if value is not None else {})
    for talk in manifest.conversations:
        yield f"“{talk.prompt}”", talk.answer


def _flat(name: str, values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        yield f"{name}: {key.replace('_', ' ')}", str(value)
