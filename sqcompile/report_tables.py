"""The report on a terminal: a summary, the passes as a waterfall, the layers as a table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sqcompile.metrics import Distance

if TYPE_CHECKING:
    from sqcompile.pipeline.manager import PassRecord
    from sqcompile.report import LayerRow, Report

_MAX_REMARKS = 8
_MAX_NAMES = 3
_BAR = 40
_MAX_BARS = 24
_MENTIONED = 0.05  # of zeros


def print_report(report: Report, console: Console | None = None) -> None:
    """Print a report; on a terminal in colour, into a file as plain text."""
    console = console or Console()
    console.print(Panel(_summary(report), title=Text(f"sqcompile: {report.model}"), title_align="left"))
    if report.passes:
        console.print(_passes(report))
    if report.layers:
        console.print(_layers(report))
        for line in _choices(report):
            console.print(Text(line))
        times = _times(report)
        if times is not None:
            console.print(times)
    for record in report.passes:
        if record.facts.get("frontier"):
            console.print(_frontier(record))
    remarks = [remark for record in report.passes for remark in record.remarks]
    if remarks:
        lines = [f"  {remark}" for remark in remarks[:_MAX_REMARKS]]
        if len(remarks) > _MAX_REMARKS:
            lines.append(f"  … and {len(remarks) - _MAX_REMARKS} more in report.passes[…].remarks")
        console.print(Text("Remarks\n" + "\n".join(lines)))
    for note in report.notes:
        console.print(Text(f"Note: {note}"))


def size_text(size_bytes: float) -> str:
    """Return a size as `1.24 MB` (10⁶ bytes)."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= limit:
            return f"{size_bytes / limit:.2f} {unit}"
    return f"{size_bytes:.0f} B"


def time_text(time_ns: float | None) -> str:
    """Return a time as `1.24 ms`."""
    if time_ns is None:
        return ""
    for limit, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if time_ns >= limit:
            return f"{time_ns / limit:.2f} {unit}"
    return f"{time_ns:.0f} ns"


def share_text(row: LayerRow) -> str:
    """Return a layer's share of the peak: `62 %`, and what is left of it without zeros: `210 %, 32 % without zeros`."""
    if row.peak_share is None or row.kept_share is None:
        return ""
    kept = f", {100 * row.kept_share:.0f} % without zeros" if row.sparsity >= _MENTIONED else ""
    return f"{100 * row.peak_share:.0f} %{kept}"


def sqnr_text(distance: Distance | None) -> str:
    """Return an SQNR as `41.3 dB`, `exact` or `not finite`."""
    if distance is None:
        return ""
    if not distance.finite:
        return "not finite"
    return "exact" if math.isinf(distance.sqnr_db) and distance.sqnr_db > 0 else f"{distance.sqnr_db:.1f} dB"


def _summary(report: Report) -> Group:
    table = Table.grid(padding=(0, 2))
    before, after = report.original, report.size
    ratio = before.size_bytes / max(1, after.size_bytes)
    _add_row(
        table,
        "weights",
        f"{size_text(before.size_bytes)} → {size_text(after.size_bytes)}",
        f"{ratio:.2f}x smaller" if before.size_bytes else "",
    )
    if report.dense_file_bytes:
        _add_row(
            table,
            "file",
            f"{size_text(report.dense_file_bytes)} → {size_text(report.file_bytes)}",
            f"{report.dense_file_bytes / max(1, report.file_bytes):.2f}x smaller",
        )
    elif report.file_bytes:
        _add_row(table, "file", size_text(report.file_bytes), "")
    _add_row(
        table,
        "parameters",
        f"{after.parameters:,}",
        f"{after.bits_per_parameter:.2f} bits each, {100 * after.sparsity:.1f} % zeros",
    )
    if report.output_distance is not None:
        _add_row(
            table, "outputs", sqnr_text(report.output_distance), "against the original, on the check batch"
        )
    if report.backend_distance is not None:
        _add_row(
            table, "backend", sqnr_text(report.backend_distance), f"{report.backend} against the reference"
        )
    if report.latency is not None:
        latency = report.latency
        _add_row(
            table,
            "latency",
            f"{time_text(latency.dense_ns)} → {time_text(latency.compiled_ns)}",
            f"{latency.speedup:.2f}x, median of {latency.runs} alternating calls, {latency.threads} threads",
        )
    for name, (dense, compiled) in report.quality.items():
        _add_row(table, name, f"{dense:.4g} → {compiled:.4g}", "")
    _add_row(table, "backend", report.backend, report.backend_reason)
    spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
    if spent:
        _add_row(table, "time", spent, "")
    return Group(table)


def _choices(report: Report) -> list[str]:
    """Return what the backend says about its choices, a line for all layers of which it says the same."""
    layers: dict[str, list[str]] = {}
    for row in report.layers:
        if row.remark:
            layers.setdefault(row.remark, []).append(row.name)
    lines = []
    for remark, names in layers.items():
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        lines.append(f"{', '.join(names[:_MAX_NAMES])}{more}: {remark}")
    return lines


def _add_row(table: Table, *cells: str, style: str | None = None) -> None:
    """Add a row of plain texts: rich takes brackets, as in `layers=[fc]`, for tags, and drops them."""
    table.add_row(*map(Text, cells), style=style)


def _passes(report: Report) -> Table:
    table = Table(title="Passes", title_justify="left")
    for column in ("pass", "changes", "weights", "zeros", "SQNR to original", "pass s", "checks s"):
        table.add_column(column, justify="left" if column == "pass" else "right", overflow="fold")
    blamed = report.worst_pass()
    for record in report.passes:
        _add_row(
            table,
            record.text + (" ◀ largest loss" if record is blamed else ""),
            str(record.changes),
            size_text(record.size.size_bytes),
            f"{100 * record.size.sparsity:.1f} %",
            sqnr_text(record.distance),
            f"{record.seconds:.2f}",
            f"{record.check_seconds:.2f}",
            style="bold" if record is blamed else None,
        )
    return table


def _frontier(record: PassRecord) -> Table:
    """Return the best choices by cost, with bars as long as the logarithm of the loss predicted for each."""
    facts = record.facts
    chosen = {"cost": facts["cost"], "predicted": facts["predicted"]}
    others = [point for point in facts["frontier"] if point != chosen]
    points = sorted([*others, chosen], key=lambda point: point["cost"])
    title = f"What each budget would have lost (predicted {facts['measure']})"
    table = Table(facts["unit"], "predicted", "", title=title, title_justify="left", box=None)
    losses = [point["predicted"] for point in points if point["predicted"] > 0]
    low, high = (math.log(min(losses)), math.log(max(losses))) if losses else (0.0, 0.0)
    for point in points:
        part = (math.log(point["predicted"]) - low) / (high - low or 1.0) if point["predicted"] > 0 else 0.0
        bar = "█" * (1 + round((_BAR - 1) * part))
        mark = " ◀ chosen" if point is chosen else ""
        _add_row(
            table,
            f"{point['cost']:.2f}",
            f"{point['predicted']:.3g}",
            bar + mark,
            style="bold" if mark else None,
        )
    return table


def _times(report: Report) -> Table | None:
    """Return the slowest layers with bars as long as their times, filled as far as the peak would have needed."""
    rows = [(row.compiled_ns, row) for row in report.layers if row.compiled_ns]
    if not rows:
        return None
    rows.sort(key=lambda item: -item[0])
    title = "Time by layer"
    if report.peak:
        title += (
            f" (█: what {report.peak:.0f} multiply-adds a ns would take for the weights that are not zero)"
        )
    table = Table("layer", "time", "of a call", "", title=title, title_justify="left", box=None)
    total = report.latency.compiled_ns if report.latency is not None else sum(time for time, _ in rows)
    for time, row in rows[:_MAX_BARS]:
        length = max(1, round(_BAR * time / rows[0][0]))
        full = min(length, round(length * (row.kept_share or 0.0)))
        bar = "█" * full + "░" * (length - full)
        _add_row(table, row.name, time_text(time), f"{100 * time / total:.1f} %", f"{bar} {share_text(row)}")
    rest = rows[_MAX_BARS:]
    if rest:
        time = sum(time for time, _ in rest)
        _add_row(table, f"{len(rest)} others", time_text(time), f"{100 * time / total:.1f} %", "")
    return table


def _layers(report: Report) -> Table:
    table = Table(title="Layers", title_justify="left")
    timed = any(row.compiled_ns is not None for row in report.layers)
    columns = ["layer", "kind", "shape", "weight", "data", "zeros", "size", "SQNR"]
    chosen = any(row.form for row in report.layers)
    columns += ["runs as", "predicted"] if chosen else []
    columns += ["measured", "dense", "verdict"] if timed else []
    peaks = any(row.peak_share is not None for row in report.layers)
    columns += ["of peak"] if peaks else []
    for column in columns:
        right = column in ("zeros", "size", "SQNR", "predicted", "measured", "dense")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    blamed = report.worst_layer()
    for row in report.layers:
        cells = [
            row.name,
            row.kind,
            "x".join(str(size) for size in row.shape),
            row.weight,
            row.activation,
            f"{100 * row.sparsity:.1f} %",
            size_text(row.size_bytes),
            sqnr_text(row.distance) + (" ◀" if row is blamed else ""),
        ]
        if chosen:
            cells += [row.form, time_text(row.predicted_ns)]
        if timed:
            cells += [time_text(row.compiled_ns), time_text(row.dense_ns), row.verdict]
        if peaks:
            cells += [share_text(row)]
        _add_row(table, *cells, style="bold" if row is blamed else None)
    return table
