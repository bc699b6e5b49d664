"""The pass manager: runs passes in order, holds each to its contract, and measures what it did."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from sqcompile.errors import (
    Error,
    LevelError,
    NumericError,
    PassContractError,
    PassError,
    PassOptionError,
    did_you_mean,
)
from sqcompile.levels import Level
from sqcompile.metrics import Distance
from sqcompile.pipeline.context import PassContext
from sqcompile.pipeline.contract import Pass, PassResult
from sqcompile.pipeline.guards import NumberGuard, TensorGuard
from sqcompile.program import Program
from sqcompile.remarks import Remark
from sqcompile.statistics import Size, program_size
from sqcompile.text import program_text
from sqcompile.verify import (
    check_interface,
    check_level,
    check_masks_kept,
    check_quantization,
    check_sparsity,
    check_structure,
)

Verify = Literal["each", "ends", "off"]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        text: The pass as text.
        changes: Number of rewrites.
        seconds: Time of the pass itself, in s.
        check_seconds: Time of the checks after it, in s.
        size: Size of the program after it.
        distance: Distance of the check batch's outputs from the original program's, or None.
        remarks: Its remarks.
        facts: Further figures that it reported.
    """

    text: str
    changes: int
    seconds: float
    check_seconds: float
    size: Size
    distance: Distance | None
    remarks: tuple[Remark, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


Instrument = Callable[[Pass, Program, Program], None]
"""Called after each pass with the pass, the program before it and the program after it."""


class PassManager:
    """Runs a pipeline over a program.

    Args:
        passes: The passes, in order.
        check_batches: Flat inputs on which outputs are compared after each pass; may be empty.
        verify: `each`: check after every pass; `ends`: only the first and the last program;
            `off`: levels and pass reports only.
        instruments: Called after each pass; for dumps, timing, tests.
        dump_dir: Where the last good graph goes when a pass fails; a temporary folder by default.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        *,
        check_batches: Sequence[Sequence[Any]] = (),
        verify: Verify = "each",
        instruments: Sequence[Instrument] = (),
        dump_dir: Path | None = None,
    ) -> None:
        check_verify(verify)
        self.passes = list(passes)
        self.check_batches = list(check_batches)
        self.verify = verify
        self.instruments = list(instruments)
        self.dump_dir = dump_dir
        check_order(self.passes)

    def run(self, program: Program, context: PassContext) -> list[PassRecord]:
        """Run every pass on `program`, in place.

        Returns:
            One record a pass.

        Raises:
            PassError: If a pass fails or breaks its contract; the program is then as it was before it.
                (With `verify="ends"` what the last program breaks is found at the end, and the program
                is as it was before the first pass.)
            Error: Whatever a pass says about wrong input; named and located alike.
        """
        if self.verify != "off":
            verify_program(program)
        numbers = NumberGuard(program, self.check_batches if self.verify != "off" else ())
        tensors = TensorGuard(content=self.verify == "each")
        first = program.snapshot() if self.verify == "ends" else None
        context.original = program.snapshot()
        records: list[PassRecord] = []
        for index, item in enumerate(self.passes):
            context.progress.note(f"[{index + 1}/{len(self.passes)}] {item}")
            before = program.snapshot()
            with self._restoring(program, before, item, records, tensors):
                records.append(self._run_one(item, program, before, context, numbers, tensors))
            for instrument in self.instruments:
                instrument(item, before, program)
        if first is not None and self.passes:
            with self._restoring(program, first, None, records):
                distance = self._check_end(first, program, numbers)
            records[-1] = replace(records[-1], distance=distance)
        return records

    def _run_one(
        self,
        item: Pass,
        program: Program,
        before: Program,
        context: PassContext,
        numbers: NumberGuard,
        tensors: TensorGuard,
    ) -> PassRecord:
        _require_level(item, program)
        old_print = program.fingerprint()
        tensors.watch(program)
        context.origin = item.name
        context.remarks = []
        started = time.perf_counter()
        result = item.run(program, context)
        seconds = time.perf_counter() - started

        started = time.perf_counter()
        _check_result(item, result)
        tensors.check(item)
        program.level = item.requires  # the manager sets the level; alone it is no change to report
        changed = program.fingerprint() != old_print
        _check_report(item, result, changed)
        program.level = item.produces
        program.recompile()
        distance = None
        if self.verify == "each":
            if changed or item.produces is not item.requires:
                verify_program(program)
            if changed:
                if not item.changes_interface:
                    check_interface(before, program)
                check_masks_kept(before, program)
            distance = numbers.check(item, before, program) if changed else numbers.unchanged()
        return PassRecord(
            text=str(item),
            changes=result.changes,
            seconds=seconds,
            check_seconds=time.perf_counter() - started,
            size=program_size(program),
            distance=distance,
            remarks=(*context.remarks, *result.remarks),
            facts=dict(result.facts),
        )

    def _check_end(self, first: Program, last: Program, numbers: NumberGuard) -> Distance | None:
        verify_program(last)
        if any(item.changes_interface for item in self.passes):
            return None
        check_interface(first, last)
        distance = numbers.final(last)
        if distance is not None and not distance.finite:
            raise NumericError(
                "The passes have made numbers that are not finite.",
                where="outputs of the program",
                seen=str(distance),
                expected="finite outputs",
                next_step="compile with verify='each', which names the pass",
            )
        return distance

    @contextmanager
    def _restoring(
        self,
        program: Program,
        before: Program,
        item: Pass | None,
        records: Sequence[PassRecord],
        tensors: TensorGuard | None = None,
    ) -> Iterator[None]:
        """On an error give the program back as it was, and say which pass failed, and after which others."""
        try:
            yield
        except Error as error:
            program.restore(before)
            self._explain(error, own_line(item, error), item, program, records, tensors)
            raise
        except Exception as error:
            program.restore(before)
            text = str(error)
            wrapped = PassError(
                f"Pass {item.name} failed." if item else "The checks after the last pass failed.",
                seen=type(error).__name__ + (f": {text}" if text else ""),
                expected="a pass raises sqcompile.Error for input that it cannot take, and nothing else",
                next_step=_advice(item, error),
            )
            self._explain(wrapped, own_line(item, error), item, program, records, tensors)
            raise wrapped from error
        except BaseException:  # an interrupt: half a pass must not stay
            program.restore(before)
            raise

    def _explain(
        self,
        error: Error,
        line: str,
        item: Pass | None,
        program: Program,
        records: Sequence[PassRecord],
        tensors: TensorGuard | None,
    ) -> None:
        """Add to an error which pass failed, what ran before it, and where the last good graph is."""
        ran = ", ".join(record.text for record in records) or "no other pass"
        place = f"pass {item.name} (after {ran})" + (f", {line}" if line else "") if item else f"after {ran}"
        repeats = item is not None and error.where == f"pass {item.name}"
        error.where = place if repeats or not error.where else f"{place}; {error.where}"
        name = item.name if item else "passes"
        hints = [error.next_step] if error.next_step else []
        # A restored program shares its tensors with the model: what was written into them stays.
        written = tensors.written() if tensors is not None else None
        if written is not None and "wrote into" not in error.what:
            hints.append(
                f"it also wrote into the tensor '{written}', and so into the model: load the model again"
            )
        path = self._dump(program, name)
        if path is not None:
            hints.append(f"the graph before {name} is in {path}")
        error.next_step = "; ".join(hints) or None

    def _dump(self, program: Program, name: str) -> Path | None:
        """Write the last good graph; a failing dump must not hide the error that it explains."""
        try:
            folder = self.dump_dir or Path(tempfile.gettempdir())
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"sqcompile-{os.getpid()}-before-{name}.txt"
            path.write_text(program_text(program, source=True) + "\n", encoding="utf-8")
            return path
        except (OSError, Error):
            return None


def own_line(item: Pass | None, error: BaseException) -> str:
    """Return the line of a user's own pass that an error came through, as `my_passes.py:41`, or nothing."""
    if item is None or _is_ours(item):
        return ""
    file = type(item).run.__code__.co_filename
    found = ""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            found = f"{os.path.basename(file)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _advice(item: Pass | None, error: Exception) -> str:
    if item is None or _is_ours(item):
        return "this is a mistake in the pass; please report it with the dumped graph"
    if isinstance(error, FrozenInstanceError):
        return "a pass holds no state: use local variables, and PassResult(facts=…) for figures in the report"
    return "correct the pass; the whole traceback: --debug, or the error's __cause__"


def _is_ours(item: Pass) -> bool:
    return type(item).__module__.partition(".")[0] == "sqcompile"


def verify_program(program: Program) -> None:
    """Run every check on a program: structure, level, quantization and sparsity.

    Raises:
        VerifyError: If an invariant is broken.
        LevelError: If an operator does not belong to the level.
    """
    check_structure(program)
    check_level(program)
    check_quantization(program)
    check_sparsity(program)


def check_verify(verify: str) -> None:
    """Check the name of a verification mode.

    Raises:
        PassOptionError: If there is none of that name.
    """
    modes = get_args(Verify)
    if verify not in modes:
        raise PassOptionError(
            "There is no such way to verify.",
            where="verify",
            seen=f"verify={verify!r}",
            expected=", ".join(map(repr, modes)),
            next_step=did_you_mean(str(verify), modes),
        )


def check_order(passes: Sequence[Pass]) -> None:
    """Check that each pass finds the level that it requires, before anything runs.

    Raises:
        LevelError: If two passes conflict.
    """
    for place, (first, second) in enumerate(itertools.pairwise(passes)):
        if second.requires is not first.produces:
            raise LevelError(
                f"Pass {second.name} cannot follow {first.name}.",
                where=f"pass {second.name}",
                seen=f"{first.name} leaves level {first.produces}",
                expected=f"level {second.requires}",
                next_step=_order_hint(passes[: place + 1], second),
            )


def _order_hint(before: Sequence[Pass], item: Pass) -> str:
    """Return where to put a pass that the passes before leave the wrong level for."""
    if item.requires is not Level.ATEN:
        return _quantize_first(item, before[-1].produces)
    # The pass that left the level, not the last one: between both it is no better.
    left = next((other for other in before if other.produces is not Level.ATEN), before[-1])
    return f"put {item.name} before {left.name}; of two pipelines that quantize, leave one out"


def _quantize_first(item: Pass, level: Level) -> str:
    if item.requires is Level.OBSERVED:
        return f"put insert-observers before {item.name}" + (
            "" if level is Level.ATEN else ", and both before what quantizes"
        )
    if level is Level.OBSERVED:
        return f"put calibrate and freeze-observers before {item.name}"
    return f"quantize before {item.name}: insert-observers, calibrate, freeze-observers, or quantize-weights"


def _require_level(item: Pass, program: Program) -> None:
    if program.level is not item.requires:
        raise LevelError(
            f"Pass {item.name} needs a program of level {item.requires}.",
            seen=f"level {program.level}",
            expected=f"level {item.requires}",
            next_step="the model is quantized already: compile the one that it was made from"
            if item.requires is Level.ATEN
            else _quantize_first(item, program.level),
        )


def _check_result(item: Pass, result: object) -> None:
    if not isinstance(result, PassResult):
        raise PassContractError(
            f"Pass {item.name} returned no PassResult.",
            seen=type(result).__name__,
            expected="PassResult",
            next_step="return PassResult(changes=…) from run",
        )
    if not isinstance(result.changes, int) or result.changes < 0:
        raise PassContractError(
            f"Pass {item.name} reports a number of changes that cannot be.",
            seen=f"changes={result.changes!r}",
            expected="0, or the number of rewrites",
            next_step="count the rewrites: Rewriter.finish() returns their number",
        )
    wrong = next((item for item in result.remarks if not isinstance(item, Remark)), None)
    if wrong is not None:
        raise PassContractError(
            f"Pass {item.name} returns a remark that is none.",
            seen=f"{wrong!r} ({type(wrong).__name__})",
            expected="objects of sqcompile.Remark",
            next_step="call context.remark(node, reason) instead: it makes one, and keeps it",
        )


def _check_report(item: Pass, result: PassResult, changed: bool) -> None:
    if changed == bool(result.changes):
        return
    raise PassContractError(
        f"Pass {item.name} misreports what it did.",
        seen=f"it reports {result.changes} changes, and the program has "
        + ("changed" if changed else "not changed"),
        expected="0 changes if and only if the program is untouched",
        next_step="count the rewrites: Rewriter.finish() returns their number"
        if changed
        else "count only what stays: let users of the old node take the new one; Rewriter.discard takes back a "
        "call that was a trial",
    )
