"""The pass manager: runs passes in order, holds each to its contract, and measures what it did."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from sqcompile.errors import Error, LevelError, NumericError, PassContractError, PassError
from sqcompile.fingerprint import tensor_identity
from sqcompile.metrics import Distance, output_distance
from sqcompile.pipeline.context import PassContext
from sqcompile.pipeline.contract import Pass, PassResult
from sqcompile.program import Program
from sqcompile.remarks import Remark
from sqcompile.statistics import Size, program_size
from sqcompile.verify import check_interface, check_level, check_quantization, check_sparsity, check_structure

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
            Error: Whatever a pass says about wrong input; named and located alike.
        """
        if self.verify != "off":
            verify_program(program)
        original = self._outputs(program)
        current = original
        records: list[PassRecord] = []
        for index, item in enumerate(self.passes):
            context.progress.note(f"[{index + 1}/{len(self.passes)}] {item}")
            before = program.snapshot()
            try:
                record, current = self._run_one(item, program, before, context, original, current, index)
            except Error as error:
                program.restore(before)
                self._explain(error, item, program, records)
                raise
            except Exception as error:
                program.restore(before)
                wrapped = PassError(
                    f"Pass {item.name} failed.",
                    seen=f"{type(error).__name__}: {error}",
                    next_step="this is a mistake in the pass; please report it with the dumped graph",
                )
                self._explain(wrapped, item, program, records)
                raise wrapped from error
            records.append(record)
        return records

    def _run_one(
        self,
        item: Pass,
        program: Program,
        before: Program,
        context: PassContext,
        original: list[list[Any]],
        current: list[list[Any]],
        index: int,
    ) -> tuple[PassRecord, list[list[Any]]]:
        _require_level(item, program)
        old_print = program.fingerprint()
        versions = {name: tensor_identity(tensor) for name, tensor in program.tensors()}
        context.origin = item.name
        context.remarks = []
        started = time.perf_counter()
        result = item.run(program, context)
        program.level = item.produces
        seconds = time.perf_counter() - started

        started = time.perf_counter()
        _check_result(item, result)
        changed = program.fingerprint() != old_print
        _check_storage(item, before, versions)
        _check_report(item, result, changed)
        thorough = self.verify == "each" or (self.verify == "ends" and index == len(self.passes) - 1)
        if changed and thorough:
            verify_program(program)
            if not item.changes_interface:
                check_interface(before, program)
        distance = None
        if self.check_batches and self.verify == "each":
            outputs = self._outputs(program) if changed else current
            if changed:
                self._check_numbers(item, before, program, current, outputs)
            current = outputs
            distance = output_distance(original, outputs)
        for instrument in self.instruments:
            instrument(item, before, program)
        record = PassRecord(
            text=str(item),
            changes=result.changes,
            seconds=seconds,
            check_seconds=time.perf_counter() - started,
            size=program_size(program),
            distance=distance,
            remarks=(*context.remarks, *result.remarks),
            facts=dict(result.facts),
        )
        return record, current

    def _outputs(self, program: Program) -> list[list[Any]]:
        if self.verify == "off":
            return []
        with torch.no_grad():
            return [program.run(batch) for batch in self.check_batches]

    def _check_numbers(
        self,
        item: Pass,
        before: Program,
        after: Program,
        old: list[list[Any]],
        new: list[list[Any]],
    ) -> None:
        """Hold a pass to what it keeps; on failure, find the layer where the numbers part."""
        for reference, value in zip(old, new, strict=True):
            for index, (ref, val) in enumerate(zip(reference, value, strict=True)):
                if not isinstance(ref, torch.Tensor):
                    continue
                name = before.signature.outputs[index].name
                lost = output_distance([[ref]], [[val]]) if ref.shape == val.shape else None
                if item.keeps.allows(ref, val) and (lost is None or lost.finite):
                    continue
                from sqcompile.compare import first_jump

                layer = first_jump(before, after, self.check_batches[0])
                raise NumericError(
                    f"Pass {item.name} changed the numbers more than it promises.",
                    where=f"output '{name}'" + (f", first at {layer}" if layer else ""),
                    seen=str(lost) if lost is not None else f"shape {tuple(val.shape)}",
                    expected=f"outputs {item.keeps}",
                    next_step="leave this layer out of the pass, or compare with: sqcompile compare",
                )

    def _explain(self, error: Error, item: Pass, program: Program, records: Sequence[PassRecord]) -> None:
        """Add to an error which pass failed, what ran before it, and where the last good graph is."""
        ran = ", ".join(record.text for record in records) or "no other pass"
        place = f"pass {item.name} (after {ran})"
        error.where = f"{place}; {error.where}" if error.where else place
        path = self._dump(program, item)
        if path is not None:
            hint = f"the graph before {item.name} is in {path}"
            error.next_step = f"{error.next_step}; {hint}" if error.next_step else hint

    def _dump(self, program: Program, item: Pass) -> Path | None:
        """Write the last good graph; a failing dump must not hide the error that it explains."""
        try:
            folder = self.dump_dir or Path(tempfile.gettempdir())
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"sqcompile-{os.getpid()}-before-{item.name}.txt"
            from sqcompile.text import program_text

            path.write_text(program_text(program, source=True) + "\n", encoding="utf-8")
            return path
        except (OSError, Error):
            return None


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


def check_order(passes: Sequence[Pass]) -> None:
    """Check that each pass finds the level that it requires, before anything runs.

    Raises:
        LevelError: If two passes conflict.
    """
    for first, second in itertools.pairwise(passes):
        if second.requires is not first.produces:
            raise LevelError(
                f"Pass {second.name} cannot follow {first.name}.",
                where=f"pass {second.name}",
                seen=f"{first.name} leaves level {first.produces}",
                expected=f"level {second.requires}",
                next_step=_order_hint(first, second),
            )


def _order_hint(first: Pass, second: Pass) -> str:
    from sqcompile.levels import Level

    if first.produces is Level.OBSERVED:
        return "put calibrate and freeze-observers between them"
    if second.requires is Level.OBSERVED:
        return "put insert-observers before it"
    if second.requires is Level.QDQ:
        return "quantize first: insert-observers, calibrate, freeze-observers, or quantize-weights"
    return f"put {second.name} before {first.name}"


def _require_level(item: Pass, program: Program) -> None:
    if program.level is not item.requires:
        raise LevelError(
            f"Pass {item.name} needs a program of level {item.requires}.",
            where=f"pass {item.name}",
            seen=f"level {program.level}",
            expected=f"level {item.requires}",
            next_step="change the order of the passes",
        )


def _check_result(item: Pass, result: object) -> None:
    if not isinstance(result, PassResult):
        raise PassContractError(
            f"Pass {item.name} returned no PassResult.",
            where=f"pass {item.name}",
            seen=type(result).__name__,
            expected="PassResult",
            next_step="return PassResult(changes=…) from run",
        )


def _check_report(item: Pass, result: PassResult, changed: bool) -> None:
    if changed == bool(result.changes) or (item.requires is not item.produces and changed):
        return
    raise PassContractError(
        f"Pass {item.name} misreports what it did.",
        where=f"pass {item.name}",
        seen=f"it reports {result.changes} changes, and the program has "
        + ("changed" if changed else "not changed"),
        expected="0 changes if and only if the program is untouched",
        next_step="count the rewrites: Rewriter.finish() returns their number",
    )


def _check_storage(item: Pass, before: Program, versions: dict[str, str]) -> None:
    """Tensors are immutable; those of the snapshot must not have been written to."""
    for name, tensor in before.tensors():
        if tensor_identity(tensor) != versions[name]:
            raise PassContractError(
                f"Pass {item.name} wrote into the tensor '{name}'.",
                where=f"tensor @{name}",
                seen="its storage was modified",
                expected="tensors are immutable: a pass replaces a tensor",
                next_step="make a new tensor and call Rewriter.replace_tensor",
            )
