"""Bundles and their benchmarks as one page that needs no network: sizes, parity, answers, speed, memory."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from mobilemm import __version__
from mobilemm.bench.charts import Bars, Lines, by_depth, over_time, question
from mobilemm.bench.result import Result, write_whole
from mobilemm.bench.subject import part_sizes
from mobilemm.bench.table import shown
from mobilemm.runtime.bundle import Bundle
from mobilemm.runtime.manifest import Manifest

MEDIA = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


@dataclass(frozen=True)
class Talk:
    """A question, the picture as a data address, and both answers."""

    prompt: str
    picture: str | None
    answer: str
    pytorch_answer: str | None


@dataclass(frozen=True)
class Described:
    """One bundle on the page."""

    label: str
    manifest: Manifest
    bytes: int
    talks: tuple[Talk, ...]


def write_report(bundles: Sequence[Bundle], results: Sequence[Result], path: Path) -> None:
    """The page, whole or not at all. Raises MobileMMError when it cannot be written."""
    write_whole(report(bundles, results), path)


def report(bundles: Sequence[Bundle], results: Sequence[Result]) -> str:
    """The page's HTML. Everything is in it: styles, charts as SVG, pictures as data."""
    from jinja2 import Environment, StrictUndefined

    described = [_described(bundle, label) for bundle, label in zip(bundles, labels(bundles), strict=True)]
    named = list(zip(_result_labels(results), results, strict=True))
    template = files("mobilemm.bench").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(
        title=" · ".join(dict.fromkeys(bundle.manifest.model.name for bundle in bundles)),
        version=__version__,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        bundles=described,
        results=named,
        megabytes=lambda size: f"{size / 1e6:,.1f} MB",
        shown=shown,
        sizes=_sizes(described),
        layers=_layers(described),
        waterfall=_waterfall(named),
        depth=_depth(named),
        memory=_memory(named),
    )


def labels(bundles: Sequence[Bundle]) -> list[str]:
    """Short names: target and bits; with the folder's name where that is not enough."""
    short = [
        f"{one.manifest.target} {one.manifest.parts['decoder'].quantization.bits} bits" for one in bundles
    ]
    if len(set(short)) == len(short):
        return short
    return [f"{name} ({bundle.folder.name})" for name, bundle in zip(short, bundles, strict=True)]


def _result_labels(results: Sequence[Result]) -> list[str]:
    short = [
        # A checkpoint is measured in float32; Core ML's programs, away from Apple's systems, are interpreted.
        f"{one.bundle.target} {one.bundle.bits.get('decoder', 32)} bits"
        + (", interpreted" if "Core ML" in one.absent else "")
        for one in results
    ]
    return [
        name if short.count(name) == 1 else f"{name} ({short[: index + 1].count(name)})"
        for index, name in enumerate(short)
    ]


def _described(bundle: Bundle, label: str) -> Described:
    talks = []
    for talk in bundle.manifest.conversations:
        picture = None
        if talk.image is not None and (kind := MEDIA.get(Path(talk.image).suffix)):
            data = base64.b64encode(bundle.path(talk.image).read_bytes()).decode()
            picture = f"data:{kind};base64,{data}"
        talks.append(Talk(talk.prompt, picture, talk.answer, talk.pytorch_answer))
    size = sum(file.bytes for file in bundle.manifest.files)
    return Described(label, bundle.manifest, size, tuple(talks))


def _sizes(bundles: Sequence[Described]) -> str:
    sizes = [part_sizes(one.manifest) for one in bundles]
    names = dict.fromkeys(name for parts in sizes for name in parts)
    rows = {}
    for one, parts in zip(bundles, sizes, strict=True):
        rows[one.label] = {name: parts.get(name, 0) / 1e6 for name in names}
        rows[one.label]["tokenizer and others"] = (one.bytes - sum(parts.values())) / 1e6
    return Bars(rows, "MB").svg()


def _layers(bundles: Sequence[Described]) -> str | None:
    lines = {}
    for one in bundles:
        parity = one.manifest.parts["decoder"].parity
        if parity is not None and parity.layers:
            lines[one.label] = [(float(index), value) for index, value in enumerate(parity.layers)]
    return Lines(lines, "layer", "dB").svg() if lines else None


def _waterfall(results: Sequence[tuple[str, Result]]) -> str | None:
    return Bars({label: question(result) for label, result in results}, "ms").svg() if results else None


def _depth(results: Sequence[tuple[str, Result]]) -> str | None:
    lines = {label: points for label, result in results if (points := by_depth(result))}
    return Lines(lines, "tokens before", "tokens a second").svg() if lines else None


def _memory(results: Sequence[tuple[str, Result]]) -> str | None:
    lines = {label: over_time(result.memory) for label, result in results if result.memory is not None}
    return Lines(lines, "seconds", "MB", marks=False).svg() if lines else None
