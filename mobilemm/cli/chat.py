"""`mobilemm chat`: talk with a model on PyTorch."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mobilemm.errors import MobileMMError

if TYPE_CHECKING:
    from rich.console import Console

    from mobilemm.runtime.session import ChatSession


def chat(
    model: Annotated[
        str | None,
        typer.Argument(help="Model folder or hub id; left out, the model that ships with mobilemm."),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", help="Picture to look at; may be given more than once."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Say this and end; left out, a conversation.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt, where the template takes one.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k likeliest; 0 for all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(min=0.1, help="Above 1 it discourages repeats.")] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Makes sampling repeatable.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; left out, float32 on a CPU.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps …; left out, the best there is.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, where MODEL is an adapter folder.")] = None,
) -> None:
    """Show a model pictures and talk with it."""
    from rich.console import Console

    from mobilemm.data.images import open_image

    # Before torch and transformers, which take seconds to import: a wrong path should be told at once.
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
        from mobilemm.runtime.session import ChatSession, Sampling, choose_device, choose_dtype, quiet

        quiet()
        where = choose_device(device)
        loaded = load(model, dtype=choose_dtype(dtype, where), device=where, base=base)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    session = ChatSession(loaded.model, loaded.processor, sampling, system=system)
    for picture in pictures:
        session.look_at(picture)
    if prompt is not None:
        _say(session, prompt)
    else:
        _converse(session, console)


LOADING_DEFAULT = "loading the default model (put together the first time: about half a minute)"


def _say(session: ChatSession, text: str) -> None:
    for piece in session.stream(text):
        typer.echo(piece, nl=False)
    typer.echo()


def _converse(session: ChatSession, console: Console) -> None:
    """Line by line from standard input, which may be a pipe."""
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 (gives `input` its history and editing)
        console.print(
            "Type to talk; /image PATH shows a picture, /reset starts anew, /quit ends.",
            style="dim",
            highlight=False,
        )
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            if interactive:
                console.print()
            return
        except UnicodeDecodeError as error:
            raise MobileMMError(f"standard input is not {error.encoding} text") from error
        command, _, rest = line.partition(" ")
        try:
            if command in ("/quit", "/exit"):
                return
            if command == "/reset":
                session.reset()
            elif command == "/image" and rest.strip():
                session.look_at(Path(rest.strip().strip("'\"")).expanduser())
                console.print("seen; now ask", style="dim")
            elif command.startswith("/"):
                console.print("known: /image PATH, /reset, /quit", style="dim", highlight=False)
            elif line:
                _say(session, line)
        except MobileMMError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        except KeyboardInterrupt:
            console.print(" (stopped)", style="dim")
