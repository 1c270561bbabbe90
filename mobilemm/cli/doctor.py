"""`mobilemm doctor`: the installed versions against the tested set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mobilemm.doctor import Finding

_COLOURS = {"ok": "green", "differs": "yellow", "missing": "magenta", "broken": "red"}


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare what is installed with the versions that mobilemm was tested with.

    Ends with exit code 1 when something that the core needs is missing or out of its range.
    """
    from dataclasses import asdict
    from json import dumps

    from mobilemm.doctor import diagnose, failed

    findings = diagnose()
    if json:
        report = {"ok": not failed(findings), "findings": [asdict(finding) for finding in findings]}
        typer.echo(dumps(report, indent=2, ensure_ascii=False))
    else:
        _print(findings)
    if failed(findings):
        raise typer.Exit(1)


def _print(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from mobilemm.doctor import failed

    console = Console()
    table = Table()
    for title in ("group", "name", "status", "installed", "tested", "note"):
        table.add_column(title, overflow="fold")
    last = ""
    for finding in findings:
        if last and finding.group != last:
            table.add_section()
        status = f"[{_COLOURS[finding.status]}]{finding.status}[/]"
        group = finding.group if finding.group != last else ""
        table.add_row(
            group, finding.name, status, finding.installed or "", finding.tested or "", escape(finding.note)
        )
        last = finding.group
    console.print(table)
    commands = dict.fromkeys(finding.command for finding in findings if finding.command)
    if commands:
        console.print("What would help:")
    for command in commands:
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)
    if failed(findings):
        console.print("[red]mobilemm cannot work like this: something that its core needs is missing.[/]")
