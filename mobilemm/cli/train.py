"""`mobilemm train`: a stage of training, from its recipe."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mobilemm.training.generator.recipe import GeneratorRecipe
    from mobilemm.training.stage import Forecast


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="Keys to set, as train.projector=1e-4."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Tell what would be trained, and train nothing.")
    ] = False,
) -> None:
    """Train by a recipe. Broken off at any moment, the same command goes on from its last checkpoint.

    On several GPUs or machines: accelerate launch -m mobilemm train RECIPE.
    """
    from mobilemm.training.recipe import read_recipe

    # Before torch and transformers, which take seconds to import.
    read = read_recipe(recipe, overrides or [])
    os.environ.setdefault("TQDM_DISABLE", "1")
    from mobilemm.runtime.pytorch import quiet
    from mobilemm.training.generator.recipe import GeneratorRecipe

    quiet()
    if isinstance(read, GeneratorRecipe):
        _train_generator(read, check)
        return
    from mobilemm.training import stage

    if check:
        _show(stage.check(read, report=lambda line: typer.echo(line, err=True)))
        return
    stage.train(read, report=lambda line: typer.echo(line, err=True))


def _train_generator(recipe: GeneratorRecipe, check: bool) -> None:
    import importlib.util

    from mobilemm.errors import MobileMMError

    if importlib.util.find_spec("diffusers") is None:
        raise MobileMMError("generators need diffusers: pip install 'mobilemm[generation]'")
    from mobilemm.training.generator import stage

    def report(line: str) -> None:
        typer.echo(line, err=True)

    if not check:
        stage.train(recipe, report)
        return
    for key, value in stage.check(recipe, report).items():
        typer.echo(f"{key:<10}{value}")


def _show(forecast: Forecast) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    parts = Table()
    for name in ("part", "parameters", "trained", "learning rate", "method"):
        parts.add_column(name, justify="left" if name in ("part", "method") else "right")
    for part in forecast.parts:
        rate = f"{part.learning_rate:g}" if part.trained else "0"
        how = part.method if part.trained else "frozen"
        parts.add_row(part.name, f"{part.parameters:,}", f"{part.trained:,}", rate, how)
    console.print(parts)
    data = Table()
    for name in ("data", "samples", "left out"):
        data.add_column(name, justify="left" if name == "data" else "right")
    for name, usable, reasons in forecast.sources:
        data.add_row(escape(name), f"{usable:,}", f"{reasons.total():,}")
    console.print(data)
    rows = {
        "steps": f"{forecast.steps:,} of {forecast.samples_per_step} samples",
        "tokens": f"{forecast.tokens:.0f} a sample, {forecast.supervised:.1f} of them supervised;"
        f" {forecast.tokens * forecast.samples_per_step:,.0f} a step",
        "memory": f"about {forecast.memory_bytes / 1e9:.1f} GB a process",
        "sample": json.dumps(forecast.sample, ensure_ascii=False),
    }
    for key, value in rows.items():
        console.print(f"[bold]{key:<8}[/]{escape(value)}", highlight=False, soft_wrap=True)
