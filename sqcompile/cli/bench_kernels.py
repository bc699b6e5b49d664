"""`sqcompile bench --kernels`: what products take on this machine, by the form of their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqcompile.cli.answer import Answer, progress

if TYPE_CHECKING:
    from rich.console import Console


def bench_kernels(backend: str, threads: int | None) -> Answer:
    """Measure the kernels of a backend, keep the times, and show them."""
    from sqcompile.backend import get_backend

    path = get_backend(backend).calibrate(threads=threads, progress=progress())
    content = json.loads(path.read_text(encoding="utf-8"))
    return Answer(lambda target: _show(target, content, path), {"path": str(path), **content})


def _show(target: Console, content: dict[str, Any], path: Path) -> None:
    from rich.table import Table

    table = Table()
    for title in ("form of the weights", "kept", "1 row", "1 row, in cache"):
        table.add_column(title, justify="left" if title.startswith("form") else "right")
    most = max(times["rows"][-1] for times in content["forms"].values())
    table.add_column(f"{most} rows", justify="right")
    for form, times in content["forms"].items():
        for place, density in enumerate(times["density"]):
            first, last = times["memory"][0][place], times["memory"][-1][place]
            table.add_row(
                form,
                f"{density:.0%}",
                _rate(1, first),
                _rate(1, times["cache"][0][place]),
                _rate(times["rows"][-1], last),
            )
    target.print(table)
    target.print(
        "G weights/s, times rows; zeros count. "
        f"{content['cpu']}, {content['isa']}, {content['threads']} threads.",
        markup=False,
    )
    target.print(f"Written to {path}; compiling chooses by it from now on.", markup=False, soft_wrap=True)


def _rate(rows: int, million_ns: float) -> str:
    """Return weights times rows a ns, which is 10⁹ of them a second."""
    return f"{rows * 1e6 / million_ns:.1f}"
