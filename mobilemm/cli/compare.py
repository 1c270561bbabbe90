"""`mobilemm compare`: what changed between two bundles, or two benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mobilemm.errors import MobileMMError


def compare(
    before: Annotated[
        Path, typer.Argument(help="A bundle's folder, or results as `mobilemm bench --json` writes them.")
    ],
    after: Annotated[Path, typer.Argument(help="The other of its kind.")],
    rounds: Annotated[
        int,
        typer.Option(
            min=0, help="Of bundles: also measure both in so many turns (6 or more tell noise from change)."
        ),
    ] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; left out, as many as there are cores.")
    ] = None,
) -> None:
    """Compare two bundles or two files of results, and tell what of their speed is noise.

    Results are paired in their order: the first of one file with the first of the other.
    """
    if before.is_dir() != after.is_dir():
        raise MobileMMError(f"{before} and {after}: compare two bundles, or two files of results")
    if before.is_dir():
        _bundles(before, after, rounds, threads)
    elif rounds:
        raise MobileMMError("--rounds measures bundles; these are files of results")
    else:
        _results(before, after)


def _bundles(before: Path, after: Path, rounds: int, threads: int | None) -> None:
    from rich.console import Console

    from mobilemm.bench.difference import changed_files, differences, in_turns
    from mobilemm.bench.result import Settings
    from mobilemm.bench.table import change_table, difference_table
    from mobilemm.runtime.bundle import open_bundle

    console, errors = Console(), Console(stderr=True)
    names = (str(before), str(after))
    first, second = open_bundle(before), open_bundle(after)
    if found := differences(first, second):
        console.print(difference_table(found, *names))
    else:
        console.print("the manifests tell no difference")
    changed, total = changed_files(first, second)
    console.print(f"{changed} of {total} files are new or others")
    if rounds:
        with errors.status("measuring") as status:
            changes = in_turns(before, after, Settings(runs=1, threads=threads), rounds, status.update)
        console.print(change_table(changes, *names))


def _results(before: Path, after: Path) -> None:
    from rich.console import Console

    from mobilemm.bench.compare import compare as compared
    from mobilemm.bench.result import read_results
    from mobilemm.bench.table import change_table

    first, second = read_results(before), read_results(after)
    if len(first) != len(second):
        raise MobileMMError(
            f"{before} has {len(first)} results and {after} {len(second)}: compare files with as many"
        )
    console = Console()
    for a, b in zip(first, second, strict=True):
        names = (f"{one.bundle.name} for {one.bundle.target}" for one in (a, b))
        console.print(change_table(compared(a, b), *names))
        if a.machine.processor != b.machine.processor:
            console.print(f"different machines: {a.machine.processor}; {b.machine.processor}")
