"""What `mobilemm chat` and `mobilemm run` have in common: their options, and the conversation itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mobilemm.errors import MobileMMError
from mobilemm.runtime.drawing import SUFFIXES, Drawn

if TYPE_CHECKING:
    from rich.console import Console

    from mobilemm.runtime.conversation import Conversation

Images = Annotated[
    list[Path] | None,
    typer.Option("--image", "-i", help="Picture to look at; may be given more than once."),
]
Prompt = Annotated[
    str | None, typer.Option("--prompt", "-p", help="Say this and end; left out, a conversation.")
]
System = Annotated[str | None, typer.Option(help="System prompt, where the template takes one.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample among the k likeliest; 0 for all.")]
MinP = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="Drop tokens less than this many times as likely as the likeliest."),
]
RepetitionPenalty = Annotated[float, typer.Option(min=0.1, help="Above 1 it discourages repeats.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**63 - 1, help="Makes sampling, and what is drawn, repeatable.")
]
Steps = Annotated[
    int | None,
    typer.Option(min=1, max=50, help="Of a drawing; left out, those that the model was made for."),
]
Out = Annotated[
    Path,
    typer.Option("--out", help="Where a drawing goes; a file that is there is kept, and a number added."),
]
DRAWING = Path("drawing.png")


def check_out(out: Path) -> None:
    """Raises MobileMMError for a place where no picture can be written, before anything is loaded."""
    if out.suffix.lower() not in SUFFIXES:
        raise MobileMMError(f"--out {out}: a picture's name ends in {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise MobileMMError(f"--out {out}: there is no folder {out.parent}")


def talk(
    session: Conversation,
    prompt: str | None,
    console: Console,
    after: Callable[[], None] = lambda: None,
    out: Path = DRAWING,
) -> None:
    """One question and its answer, or a conversation from standard input; calls `after` after each answer.

    Pictures that are drawn go to `out`.
    """
    if prompt is not None:
        _say(session, prompt, out)
        after()
    else:
        _converse(session, console, after, out)


def _say(session: Conversation, text: str, out: Path) -> None:
    for piece in session.stream(text):
        if isinstance(piece, Drawn):
            typer.echo(f"[{piece.save(out)}, seed {piece.seed}]", nl=False)
        else:
            typer.echo(piece, nl=False)
    typer.echo()


def _converse(session: Conversation, console: Console, after: Callable[[], None], out: Path) -> None:
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
                _say(session, line, out)
                after()
        except MobileMMError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        except KeyboardInterrupt:
            console.print(" (stopped)", style="dim")
