"""`mobilemm eval`: what a model or a bundle knows."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from mobilemm.errors import MobileMMError


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Folder of a model or bundle, or hub id; else the default model.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "-t",
            help="multiple-choice, yes-no, vqa, perplexity, or drawing for a generator; may be given again.",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the task's items; left out, the held-out set that ships.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many of them, drawn by the seed.")] = None,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    steps: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Of drawing; may be given again. Left out, the generator's."),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Of drawing: the first 64 pictures as a PNG, not picked.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the score, or a list of them.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of a bundle's runtime.")] = None,
) -> None:
    """Score a model on PyTorch, or the bundle that ships, on questions about pictures or on text."""
    from rich.console import Console

    from mobilemm.evaluation.tasks import read_task

    tasks = task or ["multiple-choice"]
    if "drawing" in tasks:
        if len(tasks) > 1:
            raise MobileMMError("--task drawing is for a generator, and stands alone")
        _evaluate_drawings(model, steps, limit, seed, sheet, json)
        return
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


def _evaluate_drawings(
    model: str | None,
    steps: list[int] | None,
    limit: int | None,
    seed: int,
    sheet: Path | None,
    json: Path | None,
) -> None:
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("loading") as status:
        from mobilemm.evaluation.drawing import evaluate_drawings
        from mobilemm.models.checkpoints.default import shipped_files
        from mobilemm.models.checkpoints.reading import DEFAULT_MODEL
        from mobilemm.runtime.pytorch import quiet

        quiet()
        folder = Path(model) if model is not None else shipped_files() / "generator"

        def told(done: int, total: int) -> None:
            status.update(f"drawing: {done} of {total}")

        score = evaluate_drawings(folder, steps, limit, seed, sheet, told)
    shares = ", ".join(f"{share:.3f} in {count} steps" for count, share in score.top5.items())
    typer.echo(
        f"drawing: right name in the top 5 of 50: {shares}, of {score.samples}; real pictures"
        f" {score.real:.3f}, at 64 pixels {score.real_small:.3f}; chance {score.chance:.3f}"
    )
    if json is not None:
        named = score.to_json() | {"model": DEFAULT_MODEL if model is None else str(model)}
        json.write_text(json_format.dumps(named, indent=2) + "\n", encoding="utf-8")
