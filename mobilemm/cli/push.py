"""`mobilemm push`: a bundle to a drive or to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    destination: Annotated[str, typer.Argument(help="Folder, or a hub repository: hub:OWNER/NAME.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new hub repository visible to its owner only.")
    ] = False,
) -> None:
    """Copy a bundle to a folder or a hub repository; only what differs is sent."""
    from mobilemm.export.hub import push as push_bundle

    typer.echo(push_bundle(bundle, destination, private=private))
