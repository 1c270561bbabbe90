"""Benchmarks for people, in llama-bench's words."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from mobilemm.bench.compare import Change
from mobilemm.bench.result import Figure, Result, Unit


def result_table(result: Result) -> Table:
    """One bundle's figures: median, spread, and the fraction of what the machine could do at best."""
    title = (
        f"{result.bundle.name} for {result.bundle.target} on {result.machine.processor} ({result.runtime})"
    )
    table = Table(title=escape(title), title_justify="left")
    table.add_column("test")
    table.add_column("what")
    for heading in ("median", "p10", "p90", "runs", "limit", "reached"):
        table.add_column(heading, justify="right")
    for figure in result.figures:
        reached = "" if figure.fraction is None else f"{figure.fraction:.0%}"
        limit = "" if figure.limit is None else f"{shown(figure.limit.best, figure.unit)}"
        table.add_row(
            figure.name,
            figure.what,
            shown(figure.median, figure.unit),
            shown(figure.p10, figure.unit),
            shown(figure.p90, figure.unit),
            str(len(figure.runs)),
            limit,
            reached,
        )
    table.add_section()
    for part, size in result.bundle.parts.items():
        table.add_row("size", f"{part}, {result.bundle.bits[part]} bits", shown(size, "B"))
    table.add_row("size", "all files", shown(result.bundle.bytes, "B"))
    return table


def notes(result: Result) -> list[str]:
    """What stands below the table: the machine, its condition, what is missing."""
    machine = result.machine
    lines = [
        f"{machine.cores} cores, {machine.bandwidth / 1e9:.1f} GB/s read,"
        f" {machine.operations / 1e9:.0f} GFLOP/s in float32, both measured"
    ]
    for name, condition in (("before", machine.before), ("after", machine.after)):
        facts = []
        if condition.clock_mhz:
            facts.append(f"{max(condition.clock_mhz):.0f} MHz")
        if condition.celsius:
            facts.append(f"{max(condition.celsius.values()):.0f} °C")
        if condition.load is not None:
            facts.append(f"load {condition.load:.2f}")
        lines.append(f"{name}: {', '.join(facts) or 'this system tells nothing of its clocks'}")
    busy = machine.before.load
    if busy is not None and busy > machine.cores / 2:
        lines.append("the machine was busy with other things when this began: figures are too low")
    return lines + [f"not measured: {name}: {why}" for name, why in result.absent.items()]


def change_table(changes: Sequence[Change], units: dict[str, Unit], before: str, after: str) -> Table:
    """What changed from one result to another."""
    table = Table(title=escape(f"{before} → {after}"), title_justify="left")
    table.add_column("test")
    table.add_column("what")
    for heading in ("before", "after", "ratio", "95 %", "p"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    colors = {"better": "green", "worse": "red"}
    for one in changes:
        unit = units[one.name]
        table.add_row(
            one.name,
            one.what,
            shown(one.before, unit),
            shown(one.after, unit),
            f"{one.ratio:.3f}",
            f"{one.low:.3f}–{one.high:.3f}",
            "" if one.p is None else f"{one.p:.3f}",
            f"[{colors[one.verdict]}]{one.verdict}[/]" if one.verdict in colors else one.verdict,
        )
    return table


def shown(value: float, unit: Unit) -> str:
    """A figure with its unit."""
    if unit == "s":
        return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
    if unit == "B":
        return f"{value / 1e6:,.1f} MB"
    if unit == "J":
        return f"{value:.3f} J"
    return f"{value:,.1f} tok/s"


def units_of(figures: Sequence[Figure]) -> dict[str, Unit]:
    """Figure's name → unit."""
    return {figure.name: figure.unit for figure in figures}
