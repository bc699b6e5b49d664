"""Helpers to test passes; users write passes too, so they are public.

    from sqcompile.testing import check_pass

    def test_folds_into_the_convolution_before_it() -> None:
        check_pass(FoldBatchNorm(), model, inputs, expected='''
            program (level aten)
              input  %x: f32[1, 3, 8, 8]
              …
        ''')

Set the environment variable `SQCOMPILE_ACCEPT=1` to have mismatching texts printed whole, ready to
be pasted after review.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sqcompile.calibration import Calibration
from sqcompile.fingerprint import checksum
from sqcompile.levels import Level
from sqcompile.pipeline import Pass, PassContext, PassManager, PassRecord, registry
from sqcompile.pipeline.manager import verify_program
from sqcompile.program import Program
from sqcompile.rewrite import has_side_effect
from sqcompile.text import program_text, text_diff
from sqcompile.tracing import trace
from sqcompile.tracing.export import normalize_inputs


class CheckedPass:
    """The result of `check_pass`: the programs before and after, and the manager's record."""

    def __init__(self, before: Program, after: Program, record: PassRecord) -> None:
        self.before = before
        self.after = after
        self.record = record

    @property
    def reasons(self) -> list[str]:
        """The reasons of the pass's remarks, in order."""
        return [remark.reason for remark in self.record.remarks]


def check_pass(
    item: Pass,
    model: nn.Module | Program,
    inputs: Any = None,
    *,
    expected: str | None = None,
    unchanged: bool = False,
    remarks: Sequence[str] | None = None,
    prepare: Sequence[Pass] = (),
    calibration: Iterable[Any] | None = None,
    dynamic_shapes: Any = None,
    idempotent: bool = True,
    seed: int = 0,
) -> CheckedPass:
    """Run one pass through the real pass manager and check everything that can be checked.

    Checked each time: the program before and after is valid; the change report is honest; the text
    is `expected` exactly; a second run changes nothing; outputs are equal as the pass's `keeps`
    says, and finite; no tensor of the input program was written to, byte for byte; the pass left no node
    behind that nothing uses; the same run from the start gives the same program; the pass survives being
    written as text and read.

    Args:
        item: The pass.
        model: A module to trace, or a program.
        inputs: Example inputs, in any form that `compile` takes.
        expected: Text of the program afterwards; indentation does not count.
        unchanged: Require that the pass leaves the program as it is.
        remarks: Parts of texts; each must occur in one of the remarks.
        prepare: Passes to run before, for passes that need another level.
        calibration: Calibration batches, for passes that need data.
        dynamic_shapes: As torch.export takes it.
        idempotent: Whether a second run must change nothing; not asked of passes that change the level.
        seed: Seed of the context.

    Returns:
        Both programs and the record.

    Raises:
        AssertionError: If a check fails.
        Error: Whatever the pass itself raises.
    """
    if isinstance(model, Program):
        program = model.snapshot()
        flat = None if inputs is None else program.signature.bind(*normalize_inputs(inputs))
    else:
        program = trace(model, inputs, dynamic_shapes=dynamic_shapes)
        flat = program.signature.bind(*normalize_inputs(inputs))
    context = PassContext(
        calibration=None if calibration is None else Calibration(calibration, program.signature), seed=seed
    )
    if prepare:
        PassManager(prepare).run(program, context)
    before = program.snapshot()
    contents = {name: tensor.detach().clone() for name, tensor in before.tensors()}
    text_before = program_text(before)

    batches = [] if flat is None else [flat]
    (record,) = PassManager([item], check_batches=batches).run(program, context)

    for name, tensor in before.tensors():
        assert torch.equal(tensor, contents[name]) or (
            tensor.is_floating_point()
            and torch.allclose(tensor, contents[name], rtol=0, atol=0, equal_nan=True)
        ), f"the pass wrote into the tensor '{name}'"
    text_after = program_text(program)
    if unchanged:
        assert record.changes == 0, f"the pass changed the program:\n{text_diff(text_before, text_after)}"
    if expected is not None:
        assert_text(text_after, expected)
    for part in remarks or ():
        reasons = [str(remark) for remark in record.remarks]
        assert any(part in reason for reason in reasons), f"no remark holds {part!r}; remarks: {reasons}"
    _check_text(item)
    left = _unused(program) - _unused(before)
    assert not left, (
        f"the pass leaves what nothing uses: {', '.join(sorted(left))}; end with Rewriter.finish()"
    )
    repeated = before.snapshot()
    PassManager([item]).run(repeated, replace(context, remarks=[]))
    assert repeated.fingerprint(content=True) == program.fingerprint(content=True), (
        "the same run gives another program; is something random, and not seeded by context.seed?\n"
        + (text_diff(text_after, program_text(repeated)) or _tensors_apart(program, repeated))
    )
    if idempotent and item.requires is item.produces:
        again = program.snapshot()
        (second,) = PassManager([item], check_batches=batches).run(again, context)
        assert second.changes == 0, (
            f"a second run changes it again:\n{text_diff(text_after, program_text(again))}"
        )
    return CheckedPass(before, program, record)


def _unused(program: Program) -> set[str]:
    """Return the calls whose value nothing uses, and which do nothing else."""
    return {
        f"%{node.name}" for node in program.compute_nodes() if not node.users and not has_side_effect(node)
    }


def _tensors_apart(program: Program, other: Program) -> str:
    theirs = dict(other.tensors())
    apart = [
        f"@{name}"
        for name, tensor in program.tensors()
        if name not in theirs or checksum(tensor) != checksum(theirs[name])
    ]
    return f"tensors with other values: {', '.join(apart)}" if apart else "other records beside the graph"


def _check_text(item: Pass) -> None:
    if registry().get(item.name) is not type(item):
        return  # a pass that is known nowhere by its name, such as one defined in a test
    again = Pass.parse(str(item))
    assert again == item, f"the pass reads back from its text as another: {item} as {again}"


def assert_text(seen: str, expected: str) -> None:
    """Assert that a program's text is as expected, whatever the indentation of the expectation.

    Raises:
        AssertionError: With a diff if not; with the whole text if SQCOMPILE_ACCEPT is set.
    """
    wanted = textwrap.dedent(expected).strip()
    if seen.strip() == wanted:
        return
    if os.environ.get("SQCOMPILE_ACCEPT"):
        raise AssertionError(f"the text is now:\n{seen}")
    raise AssertionError(f"the text differs:\n{text_diff(wanted, seen, names=('expected', 'seen'))}")


def traced(model: nn.Module, inputs: Any, *, dynamic_shapes: Any = None) -> Program:
    """Trace a module, as in eval mode, and verify the program."""
    program = trace(model, inputs, dynamic_shapes=dynamic_shapes)
    verify_program(program)
    assert program.level is Level.ATEN
    return program
