"""Measuring latency: dense against compiled, in one run, alternating, on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sqcompile.errors import InputError
from sqcompile.progress import Progress, SilentProgress
from sqcompile.report import Latency, Report
from sqcompile.statistics import multiply_adds

if TYPE_CHECKING:
    from sqcompile.api import Compiled


def measure_latency(compiled: Compiled, inputs: Sequence[Any], *, runs: int, threads: int | None) -> Report:
    """Measure a compiled model against the dense one in the same backend, and fill in its report.

    Args:
        compiled: The compiled model.
        inputs: Flat inputs of one call.
        runs: Calls of each.
        threads: Threads within an operator; None: as many as PyTorch uses.

    Returns:
        The report, with latency, file size of the dense model, and of the layers times and shares of the peak.

    Raises:
        InputError: If there are no inputs to measure with, or no runs.
    """
    if not inputs:
        raise InputError(
            "There are no inputs to measure with.",
            where="measure",
            seen="no arguments, and no check batch",
            expected="the inputs of one call",
            next_step="pass the inputs of one call to measure(), or example_inputs to compile()",
        )
    if runs < 1:
        raise InputError(
            "There is nothing to measure without a run.",
            where="measure",
            seen=f"runs={runs}",
            expected="1 or more",
            next_step="leave it out: 30 calls are usual",
        )
    report = compiled.report
    threads = threads or torch.get_num_threads()
    dense = compiled.backend.lower(compiled.original)
    dense_session = compiled.backend.load(dense, threads=threads)
    session = compiled.backend.load(compiled.artifact, threads=threads)
    dense_ns, compiled_ns = alternate(
        lambda: dense_session.run(inputs), lambda: session.run(inputs), runs=runs
    )
    report.latency = Latency(statistics.median(dense_ns), statistics.median(compiled_ns), runs, threads)
    report.dense_file_bytes = dense.size_bytes
    layers = {row.name: row.parameters for row in report.layers}
    dense_times = dense_session.profile(inputs, layers)
    compiled_times = session.profile(inputs, layers)
    predicted = compiled.artifact.predict(inputs)
    counts = multiply_adds(compiled.program, inputs)
    report.peak = session.peak()
    for row in report.layers:
        row.dense_ns = dense_times.get(row.name)
        row.compiled_ns = compiled_times.get(row.name)
        row.predicted_ns = predicted.get(row.name)
        row.multiply_adds = counts.get(row.name)
        if report.peak and row.compiled_ns and row.multiply_adds and row.has_codes:
            row.peak_share = row.multiply_adds / row.compiled_ns / report.peak
    return report


def alternate(
    *functions: Callable[[], Any], runs: int, warmup: int = 3, progress: Progress | None = None
) -> list[list[float]]:
    """Call functions in turns and return the times of each, in ns.

    Alternation lets a drift of the machine's speed meet all alike.
    """
    for _ in range(warmup):
        for function in functions:
            function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in (progress or SilentProgress()).track(range(runs), "measuring"):
        for function, kept in zip(functions, times, strict=True):
            started = time.perf_counter_ns()
            function()
            kept.append(float(time.perf_counter_ns() - started))
    return times
