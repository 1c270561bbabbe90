"""`mobilemm merge`: an adapter folded into its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, as `mobilemm train` or peft writes them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the whole model.")],
    base: Annotated[str | None, typer.Option(help="Base model, instead of the adapter's.")] = None,
) -> None:
    """Fold LoRA or DoRA updates, and what else an adapter folder holds, into a whole model."""
    from mobilemm.runtime.pytorch import quiet
    from mobilemm.training.results import merge as merge_adapter

    quiet()
    typer.echo(merge_adapter(adapter, output, base))
