"""Options of passes that remove parts of a model, for how much may be left, and meeting a latency."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

from sqcompile.channels.latency import Stopwatch, search_latency
from sqcompile.errors import PassOptionError
from sqcompile.pipeline import Pass
from sqcompile.pipeline.context import PassContext
from sqcompile.program import Program

BUDGETS = ("ratio", "macs", "parameters", "latency", "latency_ms")
"""Options of which a pass takes one."""

T = TypeVar("T")


class Budgeted(Pass, register=False):
    """Base of the passes that remove parts of a model; it has no name of its own.

    Attributes:
        ratio: Fraction of the parts to remove.
        macs: Instead: fraction of the multiply-accumulates that may be left.
        parameters: Instead: fraction of the parameters that may be left.
        latency: Instead: fraction of the measured time that may be left.
        latency_ms: Instead: the time that a call may take.
        backend: Where the time is measured.
        threads: Threads within an operator there; None: as many as PyTorch uses.
    """

    ratio: float | None = None
    macs: float | None = None
    parameters: float | None = None
    latency: float | None = None
    latency_ms: float | None = None
    backend: Literal["native", "onnxruntime", "reference"] = "onnxruntime"
    threads: int | None = None

    @property
    def budget(self) -> str | None:
        """Name of the option that says how much goes or is left, or None if none does."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), None)

    def check_budget(self) -> None:
        """Refuse options that are out of range or contradict each other.

        Raises:
            PassOptionError: If they do.
        """
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise self.reject_option(given[-1], f"one of {', '.join(BUDGETS)}")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise self.reject_option("ratio", "a fraction r of what there is to remove, 0 ≤ r < 1")
        for name in ("macs", "parameters", "latency"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise self.reject_option(name, "a fraction of what there is that may be left, 0 < f ≤ 1")
        if self.latency_ms is not None and not self.latency_ms > 0:
            raise self.reject_option("latency_ms", "a time in milliseconds, more than 0")
        if self.threads is not None and self.threads < 1:
            raise self.reject_option("threads", "1 or more")

    def unreachable(self, name: str, least: float, left: str) -> PassOptionError:
        """Return the error for a budget below what is left when all goes that can.

        Args:
            name: Option that gives the budget.
            least: Share that is left then.
            left: What is left then.
        """
        return PassOptionError(
            f"{self.name} cannot bring the {name} down that far.",
            where=f"pass {self.name}",
            seen=f"{name}={getattr(self, name):g}",
            expected=f"{least:.3f} or more: so much is left {left}",
            next_step="ask for less, or let other parts of the model go as well",
        )

    def meet_latency(
        self,
        program: Program,
        nothing: T,
        choose: Callable[[float], tuple[T, float]],
        shrunk: Callable[[T], Program],
        context: PassContext,
    ) -> tuple[T, dict[str, Any]]:
        """Return the candidate that meets `latency` or `latency_ms`, and what was measured.

        Args:
            program: The program as it is.
            nothing: The candidate that removes nothing.
            choose: As `search_latency` takes it.
            shrunk: Returns a copy of the program that is a candidate.
            context: Holds inputs; told what was measured.

        Raises:
            PassOptionError: If even the smallest candidate takes longer.
        """
        stopwatch = Stopwatch(program, context, self.backend, self.threads)
        before = stopwatch.time_ns
        budget = self.latency if self.latency_ms is None else self.latency_ms * 1e6 / before
        assert budget is not None
        facts: dict[str, Any] = {"backend": self.backend, "before_ns": before, "trials": []}
        if budget >= 1:
            context.remark("program", f"takes {before / 1e6:.3g} ms in {self.backend} as it is")
            return nothing, facts
        search = search_latency(choose, lambda item: stopwatch.share(shrunk(item)), budget)
        facts["trials"] = [
            {
                "macs": trial.macs,
                "predicted_ns": trial.predicted * before,
                "after_ns": trial.measured * before,
            }
            for trial in search.trials
        ]
        best = search.best
        if best is None:
            least = min(trial.measured for trial in search.trials)
            raise PassOptionError(
                f"{self.name} cannot bring the latency down that far.",
                where=f"pass {self.name}",
                seen=f"{budget * before / 1e6:.3g} ms of {before / 1e6:.3g} ms, in {self.backend}",
                expected=f"{least * before / 1e6:.3g} ms or more: so long took the fastest that was measured",
                next_step="ask for less, or remove other kinds of units as well",
            )
        facts |= {"predicted_ns": best.predicted * before, "after_ns": best.measured * before}
        context.remark(
            "program",
            f"takes {facts['after_ns'] / 1e6:.3g} ms of {before / 1e6:.3g} ms in {self.backend} "
            f"(predicted: {facts['predicted_ns'] / 1e6:.3g} ms)",
        )
        return best.candidate, facts
