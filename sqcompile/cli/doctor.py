"""`sqcompile doctor`: what this machine and installation can do."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from sqcompile.cli import options
from sqcompile.cli.answer import Answer, command

if TYPE_CHECKING:
    from rich.console import Console

    from sqcompile.diagnosis import Diagnosis


@command
def doctor(as_json: options.AsJson = False, debug: options.Debug = False) -> Answer:
    """Show CPU, versions and packages, and run a small quantized model in every backend.

    The exit code is 1 if a backend does not work.

    **Example**

        sqcompile doctor --json
    """
    from sqcompile.diagnosis import diagnose

    found = diagnose()
    about = {**asdict(found), "healthy": found.healthy}
    return Answer(lambda target: _show(target, found), about, failed=not found.healthy)


def _show(target: Console, found: Diagnosis) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in {**found.environment, **found.packages}.items():
        table.add_row(Text(name), Text(value))
    target.print(table)
    for state in found.backends:
        verdict = "works" if state.problem is None else "does not work"
        style = "bold green" if state.problem is None else "bold red"
        target.print(Text.assemble(("\n" + state.name, "bold"), ": ", (verdict, style)))
        if state.problem is not None:
            target.print(Text(state.problem))
        facts = Table.grid(padding=(0, 2))
        for name, value in state.facts.items():
            facts.add_row(Text("  " + name), Text(value))
        target.print(facts)
