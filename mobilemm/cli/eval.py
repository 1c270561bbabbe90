"""`mobilemm eval`: what a model or a bundle knows."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Folder of a model or bundle, or hub id; else the default model.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", help="multiple-choice, yes-no, vqa or perplexity; may be given again."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the task's items; left out, the held-out set that ships.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many of them, drawn by the seed.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the score, or a list of them.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of a bundle's runtime.")] = None,
) -> None:
    """Score a model on PyTorch, or the bundle that ships, on questions about pictures or on text."""
    from rich.console import Console

    from mobilemm.evaluation.tasks import read_task

    tasks = task or ["multiple-choice"]
    for name in tasks:  # before anything heavy is read
        read_task(name, data)
    console = Console(stderr=True)
    with console.status("loading") as status:
        from mobilemm.evaluation.score import evaluate as run_task
        from mobilemm.evaluation.scorers import open_scorer
        from mobilemm.runtime.pytorch import quiet

        quiet()
        scorer = open_scorer(model, threads)
        scores = []
        for name in tasks:

            def told(done: int, total: int, name: str = name) -> None:
                status.update(f"{name}: {done} of {total}")

            scores.append(run_task(scorer, name, data, limit, seed, model or "", told))
    for score in scores:
        figures = "  ".join(f"{name} {value:.3f}" for name, value in score.figures.items())
        chance = f"  chance {score.chance:.3f}" if score.chance is not None else ""
        typer.echo(
            f"{score.task}: accuracy {score.accuracy:.3f} ± {score.standard_error:.3f} of {score.samples}"
            f"{chance}{'  ' + figures if figures else ''}"
        )
    if json is not None:
        found = [score.to_json() for score in scores]
        text = json_format.dumps(found[0] if len(found) == 1 else found, indent=2)
        json.write_text(text + "\n", encoding="utf-8")
