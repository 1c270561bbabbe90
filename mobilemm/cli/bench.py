"""`mobilemm bench`: what a bundle costs on a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mobilemm.errors import MobileMMError


def bench(
    bundles: Annotated[
        list[str],
        typer.Argument(
            help="Folders of bundles. A model's folder, a hub id or `mobilemm-default` is measured on PyTorch."
        ),
    ],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are read.")] = 144,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that are written.")] = 64,
    images: Annotated[int, typer.Option(min=0, help="Photos in the question of the first token.")] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of a drawing; left out, as it was made for.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each test, behind one that warms up.")] = 5,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; left out, as many as there are cores.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the results, all runs, to this file.")] = None,
) -> None:
    """Measure load, photo, first token, reading, writing, memory and energy, each beside its physical limit.

    Each bundle runs in a process of its own, and no figure is of one run alone. Compare files of results with
    `mobilemm compare`.
    """
    from rich.console import Console

    from mobilemm.bench.host import bench_here
    from mobilemm.bench.result import Settings, write_results
    from mobilemm.bench.table import notes, result_table

    if json is not None and not json.absolute().parent.is_dir():
        raise MobileMMError(f"--json {json}: there is no folder {json.absolute().parent}")
    settings = Settings(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        images=images,
        steps=steps,
        runs=runs,
        threads=threads,
    )
    console, errors = Console(), Console(stderr=True)
    results = []
    for name in bundles:
        with errors.status(name) as status:
            result = bench_here(_folder(name), settings, status.update)
        results.append(result)
        console.print(result_table(result))
        for line in notes(result):
            console.print(line, highlight=False)
    if json is not None:
        write_results(results, json)


def _folder(name: str) -> Path:
    """What is there, or to be had, by that name."""
    if Path(name).exists():
        return Path(name)
    from mobilemm.models.checkpoints.reading import resolve_folder

    return resolve_folder(name)
