"""Instruments: what looks at the graph between passes, for people who debug passes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from sqcompile.files import write_errors
from sqcompile.pipeline.contract import Pass
from sqcompile.pipeline.text import find_pass
from sqcompile.program import Program
from sqcompile.text import program_text, text_diff

ALL = "all"
"""Stands for every pass."""


class DumpGraphs:
    """Writes the graph's text into a folder: as traced, and after every pass, with what changed.

    The files are `00-traced.txt`, `01-fold-batch-norm.txt`, `01-fold-batch-norm.diff`, ….

    Args:
        folder: The folder; it is made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, item: Pass, before: Program, after: Program) -> None:
        """Write the graph after one pass."""
        old, new = program_text(before, source=True), program_text(after, source=True)
        if self._count == 0:
            self._write("00-traced.txt", old)
        self._count += 1
        name = f"{self._count:02}-{item.name}"
        self._write(f"{name}.txt", new)
        self._write(f"{name}.diff", text_diff(old, new, names=("before", f"after {item}")))

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        with write_errors(path):
            path.write_text(text + "\n", encoding="utf-8")


class PrintGraphs:
    """Prints the graph's text before and after chosen passes.

    Args:
        write: Takes a title and a text.
        before: Names of the passes before which to print; `all` stands for every pass.
        after: Names of the passes after which to print.

    Raises:
        RecipeError: If a name is no pass's; the nearest are given.
    """

    def __init__(
        self, write: Callable[[str, str], None], *, before: Iterable[str] = (), after: Iterable[str] = ()
    ) -> None:
        self._write = write
        self._before = _names(before)
        self._after = _names(after)

    def __call__(self, item: Pass, before: Program, after: Program) -> None:
        """Print what was asked for."""
        if _asked(item, self._before):
            self._write(f"before {item}", program_text(before))
        if _asked(item, self._after):
            self._write(f"after {item}", program_text(after))


def _names(given: Iterable[str]) -> frozenset[str]:
    return frozenset(name if name == ALL else find_pass(name).name for name in given)


def _asked(item: Pass, names: Collection[str]) -> bool:
    return ALL in names or item.name in names
