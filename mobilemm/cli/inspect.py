"""`mobilemm inspect`: what a model is made of."""

from __future__ import annotations

from typing import Annotated

import typer


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder or hub id; left out, the model that ships with mobilemm."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model, where MODEL is an adapter folder.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show parts, parameters, image tokens, context, template and memory, without loading weights."""
    from dataclasses import asdict
    from json import dumps

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from mobilemm.models.checkpoints.inspection import inspect_model
    from mobilemm.runtime.pytorch import quiet

    quiet()
    found = inspect_model(model, base)
    if json:
        totals = {
            "parameters": found.parameters,
            "weights_bytes": found.weights_bytes,
            "memory_bytes": found.memory_bytes,
        }
        typer.echo(dumps({**asdict(found), **totals}, indent=2))
        return
    console = Console()
    table = Table(title=escape(f"{found.model}  ({found.layout}, {found.dtype})"), title_justify="left")
    table.add_column("part")
    table.add_column("what")
    table.add_column("parameters", justify="right")
    table.add_column("MB", justify="right")
    for part in found.parts:
        table.add_row(part.name, part.kind, f"{part.parameters:,}", f"{part.bytes / 1e6:,.1f}")
    table.add_section()
    table.add_row("all", "", f"{found.parameters:,}", f"{found.weights_bytes / 1e6:,.1f}")
    console.print(table)
    image = f"{found.image_size} px" if found.image_size else "any size"
    tokens = (
        f"{found.image_tokens} tokens" if found.image_tokens else "a number of tokens set by its processor"
    )
    cache = found.kv_cache_bytes_per_token
    rows = {
        "image": f"{image}, {tokens}",
        "context": f"{found.context:,} tokens" if found.context else "not said",
        "vocabulary": f"{found.vocabulary:,}",
        "template": found.template,
        "memory": f"{found.weights_bytes / 1e6:,.0f} MB weights + {cache / 1e3:,.1f} kB per token"
        + (f" = {found.memory_bytes / 1e6:,.0f} MB at full context" if found.context else ""),
    }
    if found.files_bytes:
        rows["files"] = f"{found.files_bytes / 1e6:,.1f} MB"
    for key, value in rows.items():
        console.print(f"[bold]{key:<11}[/]{escape(value)}", highlight=False, soft_wrap=True)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
