"""Importing a user's Python file or module, with errors that name the user's own line."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, TracebackType

from sqcompile.errors import Error, FileError
from sqcompile.files import require_file


def import_module(location: str) -> ModuleType:
    """Import a Python file (`folder/module.py`) or a module by name (`package.module`).

    A file that is imported already is not run again. Its folder is searched for what it imports.

    Raises:
        FileError: If there is none, or running it fails; the text names the line.
    """
    try:
        return _import_file(Path(location)) if location.endswith(".py") else _import_name(location)
    except FileError:
        raise
    except Error as error:
        line = failing_line(error, location)
        raise FileError(
            f"'{location}' cannot be imported. {error.what}",
            where=f"{line}, {error.where}" if error.where else line,
            seen=error.seen,
            expected=error.expected,
            next_step=error.next_step,
        ) from error
    except (Exception, SystemExit) as error:
        raise FileError(
            f"'{location}' cannot be imported.",
            where=failing_line(error, location),
            seen=f"{type(error).__name__}: {error}",
            expected="a Python file or module that can be imported",
            next_step="install the missing package"
            if isinstance(error, ModuleNotFoundError)
            else "run it with python, and correct it",
        ) from error


def failing_line(error: BaseException, location: str) -> str:
    """Return the innermost line of the user's file in a traceback, as `file.py:41`."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    name = os.path.basename(location)
    found = location
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        if os.path.basename(trace.tb_frame.f_code.co_filename) == name:
            found = f"{location}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _import_file(path: Path) -> ModuleType:
    require_file(path, "module")
    resolved = str(path.resolve())
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == resolved:
            return module
    name = path.stem
    while name in sys.modules:
        name += "_"
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = os.path.dirname(resolved)
    if folder not in sys.path:
        sys.path.append(folder)  # last: a file of the user's must not hide a package
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_name(name: str) -> ModuleType:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` finds modules
    return importlib.import_module(name)
