"""The commands, gathered."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sqcompile import __version__
from sqcompile.cli.answer import error_data, print_json
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
from sqcompile.errors import Error

_UsageError: Any = typer.BadParameter.__base__
"""Click's own, or that of the copy of click which newer versions of typer bring along."""


class _Commands(TyperGroup):
    """The commands; a command line that is wrong is an answer in JSON too, where JSON was asked for."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[__name__] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            if ctx.meta[__name__]:
                command = ctx.command_path if error.ctx is None else error.ctx.command_path
                what = Error(error.format_message(), where=command, next_step=f"{command} --help")
                print_json({"error": error_data(what, "UsageError")})
            raise  # typer shows it, and ends with 2


app = typer.Typer(
    name="sqcompile",
    cls=_Commands,
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
