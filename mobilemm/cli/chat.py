"""`mobilemm chat`: talk with a model on PyTorch."""

from __future__ import annotations

import os
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


def chat(
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder or hub id; left out, the model that ships with mobilemm."),
    ] = None,
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
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; left out, float32 on a CPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps …; left out, the best there is.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, where MODEL is an adapter folder.")] = None,
) -> None:
    """Show a model pictures, talk with it, have it draw."""
    from rich.console import Console

    from mobilemm.data.images import open_image
    from mobilemm.errors import MobileMMError

    # Before torch and transformers, which take seconds to import: a wrong path should be told at once.
    check_out(out)
    pictures = [open_image(path) for path in image or []]
    console = Console(stderr=True)
    os.environ.setdefault(
        "TQDM_DISABLE", "1"
    )  # read when tqdm is imported; GGUF files have a bar of their own
    loading = "loading the model" if model else LOADING_DEFAULT
    if not model and not console.is_terminal:
        console.print(loading, soft_wrap=True)
    with console.status(loading):
        from mobilemm.models.checkpoints import load
        from mobilemm.models.checkpoints.reading import generator_folder
        from mobilemm.runtime.pytorch import ChatSession, choose_device, choose_dtype, quiet
        from mobilemm.runtime.sampling import Sampling

        quiet()
        where = choose_device(device)
        loaded = load(model, dtype=choose_dtype(dtype, where), device=where, base=base)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, min_p)
    generator = generator_folder(model)
    if steps is not None and generator is None:
        raise MobileMMError(f"--steps {steps}, but this model does not draw")
    session = ChatSession(
        loaded.model, loaded.processor, sampling, system=system, generator=generator, steps=steps
    )
    for picture in pictures:
        session.look_at(picture)
    talk(session, prompt, console, out=out)


LOADING_DEFAULT = "loading the default model (put together the first time: about half a minute)"
