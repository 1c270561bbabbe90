"""Benchmarks for people, in llama-bench's words."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from mobilemm.bench.compare import Change
from mobilemm.bench.difference import Difference
from mobilemm.bench.profiling import Operator
from mobilemm.bench.result import Figure, Result, Unit


def result_table(result: Result) -> Table:
    """Median, spread, and the fraction of what the machine could do; 80 columns wide."""
    title = (
        f"{result.bundle.name} for {result.bundle.target} on {result.machine.processor} ({result.runtime})"
    )
    table = _table(title, "test", "what")
    for heading in ("median", "p10–p90", "of the limit"):
        table.add_column(heading, justify="right", no_wrap=True)
    for figure in result.figures:
        if figure.unit == "B":
            continue
        spread = "" if len(figure.runs) == 1 else _span(figure)
        limit = ""
        if figure.limit is not None and figure.fraction is not None:
            limit = f"{figure.fraction:.0%} of {shown(figure.limit.best, figure.unit).removesuffix(' t/s')}"
        table.add_row(figure.name, figure.what, shown(figure.median, figure.unit), spread, limit)
    return table


def _span(figure: Figure) -> str:
    """From p10 to p90, without a unit where it is the median's."""
    unit = " " + shown(figure.median, figure.unit).rsplit(" ", 1)[1]
    ends = [shown(value, figure.unit) for value in (figure.p10, figure.p90)]
    same = all(end.endswith(unit) for end in ends)
    return "–".join(end.removesuffix(unit) if same else end for end in ends)


def operator_table(operators: Sequence[Operator], most: int = 15) -> Table:
    """The most expensive operators of all phases; shares are of a phase."""
    table = _table("operators", "phase")
    table.add_column("operator", no_wrap=True, max_width=46)
    for heading in ("calls", "time", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    totals: dict[str, float] = {}
    for one in operators:
        totals[one.phase] = totals.get(one.phase, 0.0) + one.seconds
    for one in operators[:most]:
        share = one.seconds / totals[one.phase] if totals[one.phase] else 0.0
        table.add_row(one.phase, escape(one.name), f"{one.calls:,}", shown(one.seconds, "s"), f"{share:.0%}")
    return table


def notes(result: Result) -> list[str]:
    """What stands below the table: the machine, its condition, what is missing."""
    machine = result.machine
    peaks = {one.name.removeprefix("memory_"): one.median for one in result.figures if one.unit == "B"}
    phases = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in peaks.items() if name != "memory")
    lines = [f"peak memory: {shown(peaks['memory'], 'B')} ({phases})"] if peaks else []
    sizes = (
        f"{part} {shown(size, 'B')} ({result.bundle.bits[part.split(' and ')[0]]} bits)"
        for part, size in result.bundle.parts.items()
    )
    lines += [
        f"size: {shown(result.bundle.bytes, 'B')}; {', '.join(sizes)}",
        f"{result.settings.runs} runs behind one that warmed up;"
        f" {machine.cores} cores, {machine.bandwidth / 1e9:.1f} GB/s read,"
        f" {machine.operations / 1e9:.0f} GFLOP/s in float32, both measured",
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


def change_table(changes: Sequence[Change], before: str, after: str) -> Table:
    """What changed from one result to another."""
    table = _table(f"{before} → {after}", "test")
    for heading in ("before", "after", "ratio", "95 %", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    colors = {"better": "green", "worse": "red"}
    for one in changes:
        table.add_row(
            one.name,
            shown(one.before, one.unit),
            shown(one.after, one.unit),
            f"{one.ratio:.3f}",
            f"{one.low:.3f}–{one.high:.3f}",
            "" if one.p is None else f"{one.p:.3f}",
            f"[{colors[one.verdict]}]{one.verdict}[/]" if one.verdict in colors else one.verdict,
        )
    return table


def difference_table(found: Sequence[Difference], before: str, after: str) -> Table:
    """What two bundles' manifests say otherwise."""
    table = _table(f"{before} → {after}", "what")
    table.add_column("before", overflow="fold")
    table.add_column("after", overflow="fold")
    for row in found:
        table.add_row(*map(escape, row))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def shown(value: float, unit: Unit) -> str:
    """A figure with its unit; tokens a second as llama-bench has them."""
    if unit == "s":
        return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
    if unit == "B":
        return f"{value / 1e6:,.1f} MB"
    if unit == "J":
        return f"{value:.3f} J"
    return f"{value:,.1f} t/s"
