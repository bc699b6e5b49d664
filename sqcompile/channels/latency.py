"""Removing until a program is as fast as it shall be: candidates are shrunk, lowered, and measured.

Time is not what any count says: kernels have widths they like, and parts of a model do not shrink. So each
candidate really runs, in turns with the program as it is, and the next one is chosen by the line through what was
measured. The same measurements lead to the same choice.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from sqcompile.backend import get_backend
from sqcompile.errors import InputError
from sqcompile.input_spec import example_call
from sqcompile.measure import alternate
from sqcompile.pipeline import parse_pass
from sqcompile.pipeline.context import PassContext
from sqcompile.program import Program

_TRIALS = 8
_RUNS = 20
# Aimed a little below the budget, so that the noise of a measurement does not make it miss; and met when
# not much is given away.
_AIM, _CLOSE = 0.98, 0.94

T = TypeVar("T")


@dataclass(frozen=True)
class Trial(Generic[T]):
    """A candidate that was measured; all numbers are shares of the program as it is.

    Attributes:
        candidate: What was measured.
        macs: Multiply-accumulates that are left.
        predicted: Time that was predicted for it.
        measured: Time that it took.
    """

    candidate: T
    macs: float
    predicted: float
    measured: float


@dataclass
class Search(Generic[T]):
    """What a search for a latency has found.

    Attributes:
        trials: Every candidate that was measured, in order.
        best: The one that is within the budget and has most left, or None.
    """

    trials: list[Trial[T]] = field(default_factory=list)
    best: Trial[T] | None = None


def search_latency(
    choose: Callable[[float], tuple[T, float]], measure: Callable[[T], float], budget: float
) -> Search[T]:
    """Find a candidate whose measured time is within a budget, and not by much.

    Args:
        choose: Returns the largest candidate with at most a share of the multiply-accumulates, and its share;
            the smallest there is where all have more.
        measure: Returns the time of a candidate.
        budget: Share of the time that may be left, 0 < budget < 1.
    """
    search: Search[T] = Search()
    # (macs, time); the lower end is a guess until something is within the budget.
    low, high, beyond = (0.0, 0.0), (1.0, 1.0), (1.0, 1.0)
    for _ in range(_TRIALS):
        first, second = (high, beyond) if search.best is None and high != beyond else (low, high)
        rise = (second[1] - first[1]) / (second[0] - first[0])
        if rise <= 0:  # noise
            first, rise = (0.0, 0.0), high[1] / high[0]
        wanted = first[0] + (_AIM * budget - first[1]) / rise
        gap = high[0] - low[0]
        candidate, macs = choose(min(max(wanted, low[0] + gap / 16), high[0] - gap / 16))
        if any(trial.macs == macs for trial in search.trials):
            break  # there is nothing between what was measured
        predicted = max(0.0, first[1] + (macs - first[0]) * rise)
        trial = Trial(candidate, macs, predicted, measure(candidate))
        search.trials.append(trial)
        if trial.measured > budget:
            if macs < high[0]:
                high, beyond = (macs, trial.measured), high
            continue
        low = (macs, trial.measured)
        if search.best is None or macs > search.best.macs:
            search.best = trial
        if trial.measured >= _CLOSE * budget or macs >= high[0]:
            break
    return search


class Stopwatch:
    """Times candidates against the program as it is, in one backend.

    Args:
        program: The program as it is.
        context: Its calibration data, or else random numbers, are the inputs of a call.
        backend: Name of the backend.
        threads: Threads within an operator; None: as many as PyTorch uses.

    Attributes:
        time_ns: Median time of a call of the program as it is.

    Raises:
        UnsupportedError: If the backend cannot run the program.
        InputError: If there are no inputs to run it with.
    """

    def __init__(self, program: Program, context: PassContext, backend: str, threads: int | None) -> None:
        self._backend = get_backend(backend)
        self._threads = threads or torch.get_num_threads()
        self._inputs = _inputs(program, context)
        self._dense = self._load(program)
        (times,) = alternate(lambda: self._dense.run(self._inputs), runs=_RUNS)
        self.time_ns = statistics.median(times)

    def share(self, candidate: Program) -> float:
        """Return the time of a candidate as a share of the program's own, both measured now, in turns."""
        session = self._load(candidate)
        dense, shrunk = alternate(
            lambda: self._dense.run(self._inputs), lambda: session.run(self._inputs), runs=_RUNS
        )
        return statistics.median(b / a for a, b in zip(dense, shrunk, strict=True))

    def _load(self, program: Program) -> Any:
        # As it will run in the end: batch norms are folded after removal, and cost nothing then.
        copy = program.snapshot()
        parse_pass("fold-batch-norm").run(copy, PassContext())
        return self._backend.load(self._backend.lower(copy), threads=self._threads)


def _inputs(program: Program, context: PassContext) -> Sequence[Any]:
    if context.calibration is not None:
        return context.calibration.first()
    call = example_call(program.signature)
    if call is None:
        raise InputError(
            "There are no inputs to measure the latency with.",
            where=f"pass {context.origin}",
            seen="no calibration data, and inputs whose sizes depend on each other",
            expected="one batch at least",
            next_step="pass calibration=[batch, …] to sqcompile.compile",
        )
    return program.signature.bind(*call)
