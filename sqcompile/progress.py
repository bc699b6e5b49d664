"""Progress of long work: silent by default, a bar with an estimate on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Shows how far a piece of work is."""

    def track(self, items: Iterable[T], description: str) -> Iterator[T]:
        """Yield the items, showing how many are done and how long the rest will take."""
        ...

    def note(self, text: str) -> None:
        """Show one line about what is being done now."""
        ...


class SilentProgress:
    """Shows nothing."""

    def track(self, items: Iterable[T], description: str) -> Iterator[T]:
        """Yield the items."""
        yield from items

    def note(self, text: str) -> None:
        """Do nothing."""


class BarProgress:
    """A bar a piece of work, drawn by rich on standard error, with the time left.

    Work shorter than half a second leaves nothing behind on the terminal.
    """

    def track(self, items: Iterable[T], description: str) -> Iterator[T]:
        """Yield the items and draw the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield from bar.track(items, description=description)

    def note(self, text: str) -> None:
        """Print the line on standard error."""
        from rich.console import Console

        # No markup: a pass's options in brackets are not tags.
        Console(stderr=True).print(text, style="dim", highlight=False, markup=False)
