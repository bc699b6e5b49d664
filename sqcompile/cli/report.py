"""`sqcompile report`: the report of a compilation, as a page or on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sqcompile.cli import options
from sqcompile.cli.answer import Answer, command

if TYPE_CHECKING:
    from rich.console import Console

    from sqcompile.report import Report


@command
def report(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER_OR_JSON",
            help="The folder of a compiled model, its report.json, or the answer of `sqcompile compile --json`.",
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write a page (.html) or JSON (.json) there."),
    ] = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> Answer:
    """Show the report of a compilation again, or write it as one HTML page that needs no network.

    **Examples**

        sqcompile report build/llama

        sqcompile report build/llama -o report.html
    """
    import json

    from sqcompile.report_file import load_report

    found = load_report(source)
    if output is not None:
        found.save(output)
    return Answer(lambda target: _show(target, found, output), json.loads(found.to_json()))


def _show(target: Console, found: Report, output: str | None) -> None:
    if output is None:
        found.print(target)
        return
    target.print(f"Wrote {output}", soft_wrap=True, markup=False)
