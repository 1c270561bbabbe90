"""The `mobilemm` command: one file a command, no logic of its own, heavy imports inside the commands."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Annotated

import typer

from mobilemm import __version__
from mobilemm.cli.bench import bench
from mobilemm.cli.chat import chat
from mobilemm.cli.compare import compare
from mobilemm.cli.doctor import doctor
from mobilemm.cli.eval import evaluate
from mobilemm.cli.export import export
from mobilemm.cli.inspect import inspect
from mobilemm.cli.merge import merge
from mobilemm.cli.pull import pull
from mobilemm.cli.push import push
from mobilemm.cli.report import report
from mobilemm.cli.run import run
from mobilemm.cli.train import train
from mobilemm.cli.verify import verify
from mobilemm.errors import MobileMMError

app = typer.Typer(
    name="mobilemm",
    help="On-device multimodal LLMs: look at them, talk with them, ship them to phones.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command()(export)
app.command()(verify)
app.command()(run)
app.command()(bench)
app.command()(report)
app.command()(compare)
app.command()(chat)
app.command()(inspect)
app.command()(train)
app.command("eval")(evaluate)
app.command()(merge)
app.command()(push)
app.command()(pull)
app.command()(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mobilemm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line. Errors of input are one line and exit code 2; MOBILEMM_TRACE=1 shows the trace.

    What a terminal or pipe cannot encode is printed as `?`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # torchao, which transformers imports when it is installed, logs a notice of its own at every start.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    try:
        app()
    except MobileMMError as error:
        if os.environ.get("MOBILEMM_TRACE"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
