"""`mobilemm inspect`: what a model or a bundle is made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mobilemm.runtime.manifest import Manifest


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder of a model or bundle, or hub id; left out, the model that ships."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model, where MODEL is an adapter folder.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show parts, parameters, image tokens, context, template and memory, without loading weights.

    Of a bundle also how each part is quantized and how close it is to PyTorch, as measured when it was made;
    of Core ML programs what is to be expected of Apple's processors, as predicted.
    """
    if model is not None and (Path(model) / "manifest.json").is_file():
        _inspect_bundle(Path(model), json)
        return
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


def _inspect_bundle(folder: Path, json: bool) -> None:
    """Looks at names and sizes of the files alone; it is `mobilemm verify` that reads them."""
    from mobilemm.runtime.bundle import open_bundle

    bundle = open_bundle(folder, verify=False)
    if json:
        typer.echo(bundle.manifest.model_dump_json(indent=2))
        return
    _show_bundle(folder, bundle.manifest)
    if bundle.manifest.target == "coreml":
        from mobilemm.runtime.coreml_advice import predict

        for advice in predict(bundle):
            typer.echo(f"predicted: {advice.part}: {advice.text}")


def _show_bundle(folder: Path, manifest: Manifest) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    model, runtime = manifest.model, manifest.runtime
    heading = f"{folder}  ({model.name}, {manifest.target}, {runtime.name} {runtime.min_version} or newer)"
    table = Table(title=escape(heading), title_justify="left")
    for name in ("part", "parameters", "bits", "MB", "to fp32 PyTorch"):
        table.add_column(name, justify="left" if name in ("part", "to fp32 PyTorch") else "right")
    sizes = {file.path: file.bytes for file in manifest.files}
    for name, part in manifest.parts.items():
        # A table that two parts share lies in a file of both, and counts for the first.
        size = sum(sizes.pop(file, 0) for file in part.files)
        scheme, parity = part.quantization, part.parity
        bits = f"{scheme.bits}" + (f" / {scheme.block_size}" if scheme.block_size else "")
        text = "not verified"
        if parity is not None:
            text = f"cosine {parity.cosine:.5f}, {parity.snr_db:.1f} dB"
            if parity.top1 is not None and parity.kl is not None:
                text += f", top-1 {parity.top1:.1%}, KL {parity.kl:.2g}"
        table.add_row(escape(name), f"{part.parameters:,}", bits, f"{size / 1e6:,.1f}", text)
    total = sum(file.bytes for file in manifest.files)
    table.add_section()
    table.add_row("all files", "", "", f"{total / 1e6:,.1f}", "")
    console = Console()
    console.print(table)
    image = manifest.image
    pictures = "none"
    if image is not None:
        pictures = f"{image.width} × {image.height} px ({image.strategy}), {model.num_image_tokens} tokens"
    rows = {
        "family": model.family,
        "image": pictures,
        "context": f"{model.context_length:,} tokens",
        "vocabulary": f"{model.vocab_size:,}",
        "licence": model.license or "not said",
        "memory": f"about {sum(part.peak_memory for part in manifest.parts.values()) / 1e6:,.0f} MB loaded",
        "made by": ", ".join(f"{name} {value}" for name, value in manifest.created_by.items()),
    }
    for key, value in rows.items():
        console.print(f"[bold]{key:<11}[/]{escape(value)}", highlight=False, soft_wrap=True)
