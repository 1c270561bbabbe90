"""`mobilemm verify`: does a bundle still say what it said when it was made?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle, as `mobilemm export` writes it.")],
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; left out, as many as there are cores.")
    ] = None,
) -> None:
    """Check a bundle's files, then run its golden vectors and conversation on the real runtime.

    Exit code 0 when all is well, 1 when a part is not what it was, 2 when the bundle cannot be read.
    """
    from mobilemm.runtime.backends import open_backend
    from mobilemm.runtime.bundle import open_bundle
    from mobilemm.runtime.self_check import self_check

    opened = open_bundle(bundle)
    typer.echo(f"files: {len(opened.manifest.files)} as the manifest says, hashes included")
    failed = []
    for check in self_check(opened, open_backend(opened, threads)):
        typer.echo(f"{check.part}: {'ok' if check.passed else 'FAILED'}, {check.text}")
        if not check.passed:
            failed.append(check.part)
    if failed:
        typer.echo(f"error: {bundle}: {', '.join(failed)} failed: export it anew", err=True)
        raise typer.Exit(1)
