"""`mobilemm report`: bundles and benchmarks on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mobilemm.errors import MobileMMError


def report(
    bundles: Annotated[list[Path], typer.Argument(help="Folders of bundles.")],
    bench: Annotated[
        list[Path] | None,
        typer.Option("--bench", help="Results of `mobilemm bench --json`; may be repeated."),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The page.")] = Path("report.html"),
) -> None:
    """Write one page that opens without a network: size, parity, answers, speed and memory."""
    from mobilemm.bench.report import write_report
    from mobilemm.bench.result import read_results
    from mobilemm.runtime.bundle import open_bundle

    if not output.absolute().parent.is_dir():
        raise MobileMMError(f"--output {output}: there is no folder {output.absolute().parent}")
    opened = [open_bundle(folder) for folder in bundles]
    results = [result for path in bench or [] for result in read_results(path)]
    write_report(opened, results, output)
    typer.echo(output)
