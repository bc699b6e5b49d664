"""Run calibration data through the observers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import fx

from sqcompile.evaluate import run_watched
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.quantization.observed import observer_name, state_of, value_observers
from sqcompile.quantization.observers import Fixed, ObserverState


class Calibrate(Pass):
    """Feed every observer of a value with the calibration batches.

    Observers start afresh, so calibrating again with other data replaces the ranges. Values are freed as
    soon as their last user has run: memory is that of a plain run plus the observers' histograms. The
    observers of weights need no data.

    Keeps: bitwise(): only the observers' states change.
    Rejects: a program whose observers all have fixed ranges, which need no data.
    Raises: CalibrationError if there is no data, or if a value is not finite; the text names the place.
    """

    requires = produces = Level.OBSERVED
    keeps: ClassVar[Keeps] = Keeps.bitwise()

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Run the batches and replace the states."""
        watched = [
            node
            for node in value_observers(program)
            if not isinstance(state_of(program, node).observer, Fixed)
        ]
        if not watched:
            context.remark("program", "has no observer that needs data")
            return PassResult()
        # New states: those of the program that came in belong to its snapshots, too.
        states: dict[str, ObserverState] = {}
        for node in watched:
            old = state_of(program, node)
            states.setdefault(observer_name(node), old.observer.start(old.format, old.where))

        def feed(node: fx.Node, value: Any) -> None:
            states[observer_name(node)].observe(value)

        batches = 0
        for batch in context.batches("calibrating"):
            run_watched(program, batch, watched, feed)
            batches += 1
        program.observers.update(states)
        return PassResult(len(states), facts={"batches": batches})
