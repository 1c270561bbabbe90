"""`mobilemm run`: talk with a bundle, on the runtime that it was made for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mobilemm.cli.conversation import (
    DRAWING,
    Images,
    MaxNewTokens,
    MinP,
    Out,
    Prompt,
    RepetitionPenalty,
    Seed,
    Steps,
    System,
    Temperature,
    TopK,
    TopP,
    check_out,
    talk,
)


def run(
    bundle: Annotated[Path, typer.Argument(help="Folder of a bundle, as `mobilemm export` writes it.")],
    image: Images = None,
    prompt: Prompt = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    out: Out = DRAWING,
    steps: Steps = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; left out, as many as there are cores.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Tell behind each answer how long it took.")] = False,
) -> None:
    """Show a bundle pictures, talk with it, have it draw. Needs neither torch nor transformers."""
    from rich.console import Console

    from mobilemm.runtime.backends import open_backend
    from mobilemm.runtime.bundle import open_bundle
    from mobilemm.runtime.sampling import Sampling
    from mobilemm.runtime.session import Session

    check_out(out)
    opened = open_bundle(bundle)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, min_p)
    backend = open_backend(opened, threads)
    if opened.manifest.target == "coreml":
        typer.echo(f"runs on {backend.runtime}", err=True)
    session = Session(opened, backend, sampling, system=system, steps=steps)
    for picture in image or []:
        session.look_at(picture)

    def tell() -> None:
        if stats:
            typer.echo(str(session.stats), err=True)

    talk(session, prompt, Console(stderr=True), tell, out)
