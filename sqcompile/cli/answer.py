"""What every command has in common: its answer as text or JSON, its errors, its exit code."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from sqcompile.errors import Error

if TYPE_CHECKING:
    from rich.console import Console

    from sqcompile.progress import Progress

_FILE_WIDTH = 200
"""Columns where the output is no terminal."""


@dataclass(frozen=True)
class Answer:
    """What a command found out.

    Attributes:
        show: Prints it for people.
        data: The same for programs: what JSON can hold.
        live: What is shown comes bit by bit, and goes out as it comes, into files and pipes too.
        failed: What was asked is not so: the exit code is 1.
    """

    show: Callable[[Console], None]
    data: Any
    live: bool = False
    failed: bool = False


def command(function: Callable[..., Answer]) -> Callable[..., None]:
    """Make a command of a function: print its answer, turn its errors into messages and exit codes.

    The function has the parameters `as_json` and `debug`. While it works, whatever else prints to
    standard output (a model's factory, a library) goes to standard error, so that output can be piped.
    """

    @functools.wraps(function)
    def run(**options: Any) -> None:
        as_json, debug = bool(options.get("as_json")), bool(options.get("debug"))
        with _errors(as_json, debug):
            with contextlib.redirect_stdout(sys.stderr), _calm(debug):
                answer = function(**options)
            if as_json:
                print_json(answer.data)
            else:
                _print(answer)
            if answer.failed:
                raise typer.Exit(1)

    # Typer reads the signature through __wrapped__; a command itself returns nothing.
    run.__annotations__ = {**function.__annotations__, "return": "None"}
    return run


def console(stream: TextIO | None = None) -> Console:
    """Return a console; where it is no terminal, plain text of a fixed width."""
    from rich.console import Console

    stream = stream or sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _FILE_WIDTH
    return Console(file=stream, width=width, highlight=False)


def _print(answer: Answer) -> None:
    """Print an answer on standard output; into files and pipes without the spaces that fill tables up."""
    if sys.stdout.isatty() or answer.live:
        answer.show(console())
        return
    buffer = io.StringIO()
    answer.show(console(buffer))
    for line in buffer.getvalue().splitlines():
        print(line.rstrip())
    sys.stdout.flush()


def progress() -> Progress:
    """Return progress bars on standard error if it is a terminal, else silence."""
    from sqcompile.progress import BarProgress, SilentProgress

    return BarProgress() if sys.stderr.isatty() else SilentProgress()


def say(text: str) -> None:
    """Tell people something beside the answer, on standard error."""
    print(text, file=sys.stderr)


def print_json(data: Any) -> None:
    """Print JSON on standard output; what is not finite becomes null."""
    print(json.dumps(_finite(data), indent=2, ensure_ascii=False, default=str, allow_nan=False))


def print_error(error: Error) -> None:
    """Print the four parts of an error on standard error."""
    target = console(sys.stderr)
    if not sys.stderr.isatty():
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return
    from rich.table import Table
    from rich.text import Text

    target.print(Text.assemble((type(error).__name__, "bold red"), ": ", (error.what, "bold")))
    parts = Table.grid(padding=(0, 1))
    parts.add_column(style="dim", no_wrap=True)
    parts.add_column(overflow="fold")
    for label, text in (
        ("  where:", error.where),
        ("  seen:", error.seen),
        ("  expected:", error.expected),
        ("  next:", error.next_step),
    ):
        if text:
            parts.add_row(label, Text(text))
    target.print(parts)


@contextlib.contextmanager
def _errors(as_json: bool, debug: bool) -> Iterator[None]:
    """Turn exceptions into a message on standard error and an exit code."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, SystemExit):
        raise
    except KeyboardInterrupt:
        if as_json:
            print_json({"error": error_data(Error("Interrupted."))})
        say("Interrupted.")
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except Exception as error:
        if debug:
            raise
        known = error if isinstance(error, Error) else _unexpected(error)
        if as_json:
            print_json({"error": error_data(known)})
        print_error(known)
        raise typer.Exit(known.exit_code) from None


@contextlib.contextmanager
def _calm(debug: bool) -> Iterator[None]:
    """Keep libraries' warnings and bars off the terminal, where they would drown our own."""
    if debug:
        yield
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _unexpected(error: Exception) -> Error:
    memory = isinstance(error, MemoryError)
    return Error(
        "There is not enough memory." if memory else "sqcompile failed on something that it did not expect.",
        seen=f"{type(error).__name__}: {error}",
        next_step="use a smaller model or batch"
        if memory
        else "run it again with --debug for the traceback, and report it, please",
    )


def error_data(error: Error, kind: str | None = None) -> dict[str, Any]:
    """Return an error as JSON has it, under the name of its class or of the kind that is given."""
    parts = {name: getattr(error, name) for name in ("what", "where", "seen", "expected", "next_step")}
    return {"kind": kind or type(error).__name__, **parts}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value
