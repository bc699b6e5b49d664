"""The context: calibration data for passes, progress, and remarks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from support.programs import data, mlp

from sqcompile.calibration import Calibration
from sqcompile.errors import CalibrationError, PassContractError
from sqcompile.pipeline import PassContext
from sqcompile.remarks import Remark

T = TypeVar("T")


class Counting:
    """Progress that writes down what it is told."""

    def __init__(self) -> None:
        self.tracked: list[tuple[str, int]] = []

    def track(self, items: Iterable[T], description: str) -> Iterator[T]:
        count = 0
        for item in items:
            count += 1
            yield item
        self.tracked.append((description, count))

    def note(self, text: str) -> None:
        pass


def test_a_batch_that_is_written_into_is_refused() -> None:
    """It is the caller's own tensor, and the next pass would calibrate on what is left of it."""
    batch = data(2, 8)
    context = PassContext(Calibration([batch], mlp().signature), origin="hasty")
    with pytest.raises(PassContractError, match="hasty wrote into calibration batch 0") as caught:
        for (x,) in context.batches("looking"):
            x.clamp_(min=0)
    assert "clone" in str(caught.value.next_step)
    for (x,) in context.batches("looking"):
        x.clone().clamp_(min=0)


def test_batches_are_bound_and_counted() -> None:
    progress = Counting()
    batches = [data(2, 8, seed=seed) for seed in range(3)]
    context = PassContext(Calibration(batches, mlp().signature), progress=progress)
    for _ in range(2):  # several passes read the data
        assert [batch[0] for batch in context.batches("looking")] == batches
    assert progress.tracked == [("looking", 3), ("looking", 3)]


def test_no_calibration_data() -> None:
    context = PassContext(origin="calibrate")
    with pytest.raises(CalibrationError, match="calibrate needs calibration data") as caught:
        next(context.batches("looking"))
    error = caught.value
    assert error.where == "pass calibrate" and error.seen and error.expected and error.next_step


def test_remarks_say_who_and_where() -> None:
    program = mlp()
    node = next(program.compute_nodes())
    context = PassContext(origin="fold-batch-norm")
    context.remark(node, "it has two users")
    context.remark("program", "nothing to fold")
    first, second = context.remarks
    assert str(first).startswith("fold-batch-norm: linear (first, programs.py:")
    assert str(first).endswith("): it has two users")
    assert str(second) == "fold-batch-norm: program: nothing to fold"
    assert second == Remark("fold-batch-norm", "program", "nothing to fold")


def test_contexts_share_nothing() -> None:
    first, second = PassContext(), PassContext()
    first.remark("program", "…")
    assert second.remarks == [] and second.calibration is None and second.seed == 0


def test_bad_batches_fail_while_they_are_read() -> None:
    def stream() -> Iterator[Any]:
        yield data(2, 8)
        yield torch.full((2, 8), torch.nan)

    context = PassContext(Calibration(stream(), mlp().signature))
    batches = context.batches("looking")
    next(batches)
    with pytest.raises(CalibrationError, match="NaN"):
        next(batches)
