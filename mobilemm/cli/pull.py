"""`mobilemm pull`: a bundle from a drive or from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pull(
    source: Annotated[str, typer.Argument(help="Folder of a bundle, or a hub repository: [hub:]OWNER/NAME.")],
    folder: Annotated[Path, typer.Argument(help="Where the bundle shall be.")],
) -> None:
    """Fetch a bundle from a folder or a hub repository, and check it; only what differs is fetched."""
    from mobilemm.export.hub import pull as pull_bundle

    bundle = pull_bundle(source, folder)
    total = sum(file.bytes for file in bundle.manifest.files)
    typer.echo(f"{bundle.folder}  ({bundle.manifest.target}, {total / 1e6:,.1f} MB, verified)")
