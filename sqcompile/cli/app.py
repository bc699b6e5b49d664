"""The commands, gathered."""

from __future__ import annotations

from typing import Annotated

import typer

from sqcompile import __version__
from sqcompile.cli.bench import bench
from sqcompile.cli.bundle import bundle
from sqcompile.cli.compare import compare
from sqcompile.cli.compile import compile_model
from sqcompile.cli.doctor import doctor
from sqcompile.cli.evaluate import evaluate
from sqcompile.cli.generate import generate
from sqcompile.cli.inspect import inspect_model
from sqcompile.cli.passes import passes
from sqcompile.cli.recipe import recipe
from sqcompile.cli.report import report
from sqcompile.cli.sensitivity import sensitivity

app = typer.Typer(
    name="sqcompile",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # our errors have four parts; --debug shows Python's own traceback
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sqcompile {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 it worked; 1 the work failed; 2 the command line, a recipe or a pass's "
    "options are wrong; 130 interrupted."
)
def sqcompile(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make trained PyTorch models smaller and faster on CPUs, and prove what was done."""


app.command("compile")(compile_model)
app.command("passes")(passes)
app.add_typer(recipe)
app.command("inspect")(inspect_model)
app.command("compare")(compare)
app.command("report")(report)
app.command("evaluate")(evaluate)
app.command("generate")(generate)
app.command("sensitivity")(sensitivity)
app.command("bench")(bench)
app.command("bundle")(bundle)
app.command("doctor")(doctor)
