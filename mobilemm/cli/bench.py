"""`mobilemm bench`: what a bundle costs on a machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from mobilemm.errors import MobileMMError

if TYPE_CHECKING:
    from mobilemm.bench.result import Result, Settings

    Measure: TypeAlias = Callable[[str, Settings, Callable[[str], None]], Result]


def bench(
    bundles: Annotated[
        list[str],
        typer.Argument(
            help="Folders of bundles; of models, which run on PyTorch, or hub ids, or `mobilemm-default`."
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
    device: Annotated[
        str,
        typer.Option(
            help="host: this computer. ssh:[USER@]HOST[:PORT]: a Linux board with Python. adb:[SERIAL]: an"
            " Android phone with the demo app."
        ),
    ] = "host",
    device_folder: Annotated[
        str | None, typer.Option(help="With ssh: where to keep there what is sent.")
    ] = None,
    device_python: Annotated[str | None, typer.Option(help="With ssh: the Python there.")] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Also tell what each operator takes, and write a trace for Perfetto or chrome://tracing into"
            " this folder."
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the results, all runs, to this file.")] = None,
) -> None:
    """Measure load, photo, first token, reading, writing, memory and energy, each beside its physical limit.

    Each bundle runs in a process of its own, and no figure is of one run alone. Compare files of results with
    `mobilemm compare`.
    """
    from rich.console import Console

    from mobilemm.bench.profiling import profile as run_profile
    from mobilemm.bench.result import Settings, write_results
    from mobilemm.bench.table import notes, operator_table, result_table

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
    if profile is not None:
        if device != "host":
            raise MobileMMError("--profile is of this computer; on a board, run it there")
        profile.mkdir(parents=True, exist_ok=True)
    measure = _measure_on(device, device_folder, device_python)
    console, errors = Console(), Console(stderr=True)
    results = []
    for name in bundles:
        with errors.status(name) as status:
            result = measure(name, settings, status.update)
        results.append(result)
        console.print(result_table(result))
        for line in notes(result):
            console.print(line, highlight=False)
        if profile is not None:
            trace = profile / f"{result.bundle.name}-{result.bundle.target}.json"
            console.print(operator_table(run_profile(_folder(name), settings, trace)))
            console.print(f"trace: {trace}", soft_wrap=True)
        if json is not None:  # what comes next may fail
            write_results(results, json)


def _measure_on(device: str, folder: str | None, python: str | None) -> Measure:
    """What measures on a device."""
    kind, _, address = device.partition(":")
    if kind == "ssh" and address:
        from mobilemm.bench.ssh import FOLDER, bench_over_ssh

        def over_ssh(name: str, settings: Settings, report: Callable[[str], None]) -> Result:
            return bench_over_ssh(
                Path(name), settings, address, report, folder or FOLDER, python or "python3"
            )

        return over_ssh
    if folder is not None or python is not None:
        raise MobileMMError("--device-folder and --device-python go with --device ssh:…")
    if kind == "adb":
        from mobilemm.bench.adb import bench_adb

        return lambda name, settings, report: bench_adb(Path(name), settings, address, report)
    if device != "host":
        raise MobileMMError(f"--device {device}: it is host, ssh:[USER@]HOST[:PORT] or adb:[SERIAL]")
    from mobilemm.bench.host import bench_here

    return lambda name, settings, report: bench_here(_folder(name), settings, report)


def _folder(name: str) -> Path:
    """What is there, or to be had, by that name."""
    if Path(name).exists():
        return Path(name)
    from mobilemm.models.checkpoints.reading import resolve_folder

    return resolve_folder(name)
