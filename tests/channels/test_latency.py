"""The search for a latency: against made-up clocks, and once against a real one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.passes import zoo_program
from support.programs import data, seeded
from support.removal import remove
from torch import nn

from sqcompile import Program
from sqcompile.calibration import Calibration
from sqcompile.channels import count_macs
from sqcompile.channels.flow import flow_of
from sqcompile.channels.latency import search_latency
from sqcompile.errors import PassOptionError
from sqcompile.passes import RemoveChannels, RemoveHeads, RemoveNeurons
from sqcompile.pipeline import PassContext
from sqcompile.tracing import trace


def stepped(share: float) -> tuple[int, float]:
    """Candidates have 1 to 64 parts of 64."""
    parts = max(1, int(share * 64))
    return parts, parts / 64


@pytest.mark.parametrize(
    ("clock", "trials"),
    [
        (lambda macs: macs, 3),
        (lambda macs: 0.3 + 0.7 * macs, 4),
        (lambda macs: macs**0.5, 6),
        (lambda macs: macs**2, 6),
        (lambda macs: 0.2 if macs < 0.4 else 1.0, 8),
    ],
    ids=["in proportion", "with a fixed part", "root", "square", "step"],
)
@pytest.mark.parametrize("budget", [0.8, 0.5, 0.35])
def test_meets_the_budget_and_not_by_much(
    clock: Callable[[float], float], trials: int, budget: float
) -> None:
    search = search_latency(stepped, lambda parts: clock(parts / 64), budget)
    assert search.best is not None
    assert search.best.measured <= budget
    assert len(search.trials) <= trials
    largest = max(parts for parts in range(1, 65) if clock(parts / 64) <= budget)
    # What could have stayed is within the tolerance, or a few steps.
    assert search.best.measured >= 0.94 * budget or search.best.candidate >= largest - 4


def test_predicts_by_what_was_measured() -> None:
    search = search_latency(stepped, lambda parts: 0.3 + 0.7 * parts / 64, 0.5)
    first, second = search.trials
    assert first.predicted == pytest.approx(first.macs)  # nothing is known yet
    assert second.predicted == pytest.approx(second.measured)


def test_says_that_a_budget_cannot_be_met() -> None:
    search = search_latency(stepped, lambda parts: 0.6 + 0.4 * parts / 64, 0.5)
    assert search.best is None
    assert min(trial.candidate for trial in search.trials) == 1


def test_a_clock_that_says_nonsense_ends() -> None:
    turns = iter([0.9, 1.3, 0.2, 0.9, 0.1, 2.0, 0.3, 0.4])
    search = search_latency(stepped, lambda parts: next(turns), 0.5)
    assert search.best is None or search.best.measured <= 0.5


@pytest.fixture
def macs_are_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that says 1 ms, and for candidates half of that and half by their multiply-accumulates."""

    class Clock:
        def __init__(self, program: Program, *_: object) -> None:
            self.whole = count_macs(flow_of(program))
            self.time_ns = 1e6

        def share(self, candidate: Program) -> float:
            return 0.5 + 0.5 * count_macs(flow_of(candidate)) / self.whole

    monkeypatch.setattr("sqcompile.channels.budget.Stopwatch", Clock)


@pytest.mark.usefixtures("macs_are_time")
@pytest.mark.parametrize(
    "item",
    [
        RemoveChannels(latency=0.7),
        RemoveChannels(latency_ms=0.7),
        RemoveChannels(latency=0.7, scope="global", kinds=("channels", "neurons")),
    ],
    ids=["share", "milliseconds", "global"],
)
def test_removal_stops_at_the_budget(item: RemoveChannels) -> None:
    program = zoo_program("vgg")
    context = PassContext()
    shrunk, result = remove(item, program, context)
    time = 0.5 + 0.5 * count_macs(flow_of(shrunk)) / count_macs(flow_of(program))
    assert 0.6 < time <= 0.7
    found = result.facts["latency"]
    assert found["after_ns"] == pytest.approx(time * 1e6)
    assert found["before_ns"] == 1e6
    assert found["trials"][-1]["predicted_ns"] == pytest.approx(found["predicted_ns"])
    assert f"takes {time:.3g} ms of 1 ms in onnxruntime (predicted: " in str(context.remarks[-1])
    _, again = remove(item, program)
    assert again.facts == result.facts


@pytest.mark.usefixtures("macs_are_time")
def test_a_latency_out_of_reach_says_what_is_in_reach() -> None:
    with pytest.raises(PassOptionError, match=r"0\.5\d* ms or more"):
        remove(RemoveChannels(latency=0.4), zoo_program("vgg"))


@pytest.mark.usefixtures("macs_are_time")
def test_removes_nothing_where_the_time_is_enough() -> None:
    for item in (RemoveNeurons(latency=1.0), RemoveHeads(latency_ms=2.0)):
        context = PassContext()
        _, result = remove(item, zoo_program("bert"), context)
        assert result.changes == 0
        assert "takes 1 ms in onnxruntime as it is" in str(context.remarks)


def test_a_real_clock_measures_real_candidates() -> None:
    program = zoo_program("vgg")
    batch = data(2, 3, 32, 32)
    for context in (PassContext(Calibration([(batch,)], program.signature)), PassContext()):
        # With one channel a layer it takes a third of the time; neighbours slow down both alike.
        _, result = remove(RemoveChannels(latency=0.9, backend="reference", threads=1), program, context)
        found = result.facts["latency"]
        assert found["backend"] == "reference"
        assert 0 < found["after_ns"] <= 0.9 * found["before_ns"]
        assert result.changes > 0


def test_batch_norms_are_folded_before_the_clock_starts() -> None:
    """The native engine has no batch norm, as it never meets one."""
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    )
    program = trace(model, (data(1, 3, 8, 8),))
    _, result = remove(RemoveChannels(latency=1.0, backend="native"), program)
    assert result.facts["latency"]["before_ns"] > 0
