"""Charts of bundles and benchmarks, as SVG that takes its text's colour from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mobilemm.bench.result import MemoryTrace, Result
from mobilemm.errors import MobileMMError

# Of Okabe and Ito, told apart by all eyes and on white as on black.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
WIDTH, ROW = 7.2, 0.42  # inches


@dataclass(frozen=True)
class Bars:
    """Rows of bars in pieces: row → piece → its length."""

    rows: Mapping[str, Mapping[str, float]]
    unit: str

    def svg(self) -> str:
        """One row a bar, its pieces one behind the other, in the order of the first row that has them."""
        figure, axes = _figure(ROW * len(self.rows) + 1.0)
        pieces = list(dict.fromkeys(piece for row in self.rows.values() for piece in row))
        places = range(len(self.rows))
        begins = [0.0] * len(self.rows)
        for piece, color in zip(pieces, _repeated(len(pieces)), strict=True):
            lengths = [row.get(piece, 0.0) for row in self.rows.values()]
            axes.barh(places, lengths, left=begins, color=color, label=piece, height=0.6)
            begins = [begin + length for begin, length in zip(begins, lengths, strict=True)]
        axes.set_yticks(list(places), labels=list(self.rows))
        axes.invert_yaxis()
        axes.set_xlabel(self.unit)
        _legend(axes, len(pieces))
        return _svg(figure)


@dataclass(frozen=True)
class Lines:
    """Lines: name → points (x, y)."""

    lines: Mapping[str, Sequence[tuple[float, float]]]
    x: str
    y: str
    marks: bool = True

    def svg(self) -> str:
        """From zero up."""
        figure, axes = _figure(2.8)
        for (name, points), color in zip(self.lines.items(), _repeated(len(self.lines)), strict=True):
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, color=color, label=name, marker="o" if self.marks else None, markersize=4)
        axes.set_xlabel(self.x)
        axes.set_ylabel(self.y)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.25, color="#888888")
        _legend(axes, len(self.lines))
        return _svg(figure)


def question(result: Result) -> dict[str, float]:
    """One question about a photo, in milliseconds: up to the first token, and 16 tokens more."""
    known = {figure.name: figure.median for figure in result.figures}
    phases = {}
    if "ttft" in known:
        photo = {"photo": known.get("image", 0.0), "encoder": known.get("vision", 0.0)}
        phases = {**photo, "prompt": max(known["ttft"] - sum(photo.values()), 0.0)}
    if "token" in known:
        phases["16 tokens"] = 16 * known["token"]
    return {name: 1000 * seconds for name, seconds in phases.items()}


def by_depth(result: Result) -> list[tuple[float, float]]:
    """Tokens a second behind how many others."""
    found = [(re.fullmatch(r"tg\d+@d(\d+)", figure.name), figure.median) for figure in result.figures]
    return [(float(match[1]), median) for match, median in found if match is not None]


def over_time(memory: MemoryTrace) -> list[tuple[float, float]]:
    """Seconds and megabytes."""
    return [(at, size / 1e6) for at, size in zip(memory.seconds, memory.bytes, strict=True)]


def _repeated(count: int) -> list[str]:
    return [COLORS[index % len(COLORS)] for index in range(count)]


def _figure(height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MobileMMError("a report's charts need matplotlib: pip install 'mobilemm[bench]'") from error
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _legend(axes: Any, count: int) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=min(count, 3), frameon=False, borderaxespad=0.2
    )


def _svg(figure: Any) -> str:
    """Without what an SVG file has around its picture; text stays text, black becomes the page's colour."""
    import matplotlib

    with io.StringIO() as file, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mobilemm"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        text = file.getvalue()
    text = text[text.index("<svg") :]
    # What would reach beyond the picture, once it is part of a page: names of groups, styles, sizes.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    rest = re.sub(r" ?font-family: [^;\"]*;?", "", rest)
    return f"{head}>{rest}".replace("#000000", "currentColor")
