"""`mobilemm compare`: what changed between two benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mobilemm.errors import MobileMMError


def compare(
    before: Annotated[Path, typer.Argument(help="Results, as `mobilemm bench --json` writes them.")],
    after: Annotated[Path, typer.Argument(help="Other results.")],
) -> None:
    """Compare two files of results figure by figure, and tell what is noise.

    Results are paired in their order: the first of one file with the first of the other.
    """
    from rich.console import Console

    from mobilemm.bench.compare import compare as compared
    from mobilemm.bench.result import read_results
    from mobilemm.bench.table import change_table, units_of

    first, second = read_results(before), read_results(after)
    if len(first) != len(second):
        raise MobileMMError(
            f"{before} has {len(first)} results and {after} {len(second)}: compare files with as many"
        )
    console = Console()
    for a, b in zip(first, second, strict=True):
        names = (f"{one.bundle.name} for {one.bundle.target}" for one in (a, b))
        console.print(change_table(compared(a, b), units_of(a.figures), *names))
        if a.machine.processor != b.machine.processor:
            console.print(f"different machines: {a.machine.processor}; {b.machine.processor}")
