"""`sqcompile passes`: what there is to put into a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sqcompile.cli import options
from sqcompile.cli.answer import Answer, command

if TYPE_CHECKING:
    from rich.console import Console

    from sqcompile.catalog import Entry


@command
def passes(
    name: Annotated[
        str | None, typer.Argument(help="A pass or pipeline, for its documentation and options.")
    ] = None,
    imports: options.Imports = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> Answer:
    """List passes and named pipelines by their job, or document one.

    **Examples**

        sqcompile passes

        sqcompile passes mask-weights
    """
    from sqcompile.catalog import catalog, find_entry
    from sqcompile.cli.compile import import_files

    import_files(imports or [])
    if name is not None:
        entry = find_entry(name)
        return Answer(lambda target: _show_one(target, entry), entry.data())
    entries = catalog()
    return Answer(
        lambda target: _show_all(target, entries),
        [{"name": entry.name, "job": entry.job, "summary": entry.doc.summary} for entry in entries],
    )


def _show_all(target: Console, entries: list[Entry]) -> None:
    from rich.table import Table
    from rich.text import Text

    from sqcompile.catalog import JOBS

    width = max(len(entry.name) for entry in entries)
    for job, title in JOBS.items():
        found = [entry for entry in entries if entry.job == job]
        if not found:
            continue
        target.print(Text(title, style="bold"))
        table = Table.grid(padding=(0, 2))
        table.add_column(min_width=width + 2)
        table.add_column()
        for entry in found:
            table.add_row(Text(f"  {entry.name}", style="cyan"), Text(entry.doc.summary))
        target.print(table)
        target.print()
    target.print(Text("sqcompile passes NAME shows one with its options.", style="dim"))


def _show_one(target: Console, entry: Entry) -> None:
    from rich.table import Table
    from rich.text import Text

    target.print(Text.assemble((entry.name, "bold cyan"), f"  ({entry.home}.{entry.symbol})"))
    target.print(Text(f"\n{entry.doc.summary}"))
    for paragraph in entry.doc.paragraphs():
        target.print(Text(f"\n{paragraph}"))
    facts = {name.capitalize(): fact.replace(", ", "\n") for name, fact in entry.facts.items()}
    # What the docstring says of `Keeps` explains what the class declares.
    for title, text in {**facts, **entry.data()["sections"]}.items():
        target.print(Text(f"\n{title}", style="bold"))
        target.print(Text("\n".join(f"  {line}" for line in text.splitlines())))
    if not entry.options:
        target.print(Text("\nNo options.", style="bold"))
        return
    target.print(Text("\nOptions", style="bold"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(max_width=40)
    table.add_column(max_width=40)
    table.add_column()
    table.add_row(*(Text(title, style="dim") for title in ("  name", "type", "default", "meaning")))
    for option in entry.options:
        default = "needed" if option.default is None else option.default
        table.add_row(
            Text(f"  {option.name}", style="cyan"), Text(option.type), Text(default), Text(option.doc)
        )
    target.print(table)
    target.print(Text(f"\nIn a pipeline: {entry.name}{{{entry.options[0].name}=…}}", style="dim"))
