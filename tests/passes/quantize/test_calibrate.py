from __future__ import annotations

import pytest
import torch
from support.quantize import refuse_level, run, settle, settled, values
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import Level, trace
from sqcompile.errors import CalibrationError
from sqcompile.passes import Calibrate, InsertObservers
from sqcompile.quantization import Format, MinMax, MovingAverage
from sqcompile.testing import check_pass


def mlp() -> nn.Sequential:
    return settled(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_feeds_every_observer_of_a_value() -> None:
    model, batches = mlp(), [values(5, 3, seed=seed) for seed in range(3)]
    checked = check_pass(
        Calibrate(),
        model,
        (batches[0],),
        prepare=[InsertObservers(observer=MinMax())],
        calibration=batches,
        idempotent=False,  # each run makes new states
        expected="""
            program (level observed)
              input  %input_1: f32[5, 3]
              tensor @0.weight: f32[4, 3]
              tensor @0.bias: f32[4]
              tensor @2.weight: f32[2, 4]
              tensor @2.bias: f32[2]
              %observe_2: f32[5, 3] = observe(%input_1, observer='input_1')
              %observe: f32[4, 3] = observe(@0.weight, observer='0.weight')
              %linear: f32[5, 4] = linear(%observe_2, %observe, @0.bias)
              %relu: f32[5, 4] = relu(%linear)
              %observe_3: f32[5, 4] = observe(%relu, observer='relu')
              %observe_1: f32[2, 4] = observe(@2.weight, observer='2.weight')
              %linear_1: f32[5, 2] = linear(%observe_3, %observe_1, @2.bias)
              return output=%linear_1
        """,
    )
    everything = torch.cat(batches)
    hidden = torch.relu(model[0](everything))
    states = checked.after.observers
    assert states["input_1"].range() == (everything.min(), everything.max())
    assert states["relu"].range() == (hidden.min(), hidden.max())
    assert states["input_1"].count == everything.numel() and states["input_1"].batches == 3
    assert states["0.weight"].count == 0  # weights are known without data
    assert checked.record.facts == {"batches": 3}


def test_needs_no_data_where_every_range_is_known() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.sigmoid())

    check_pass(
        Calibrate(),
        settle(Gate()),
        (values(2, 3),),
        prepare=[InsertObservers()],
        unchanged=True,
        remarks=["has no observer that needs data"],
    )


def test_starts_afresh_and_leaves_older_programs_their_states() -> None:
    program = trace(mlp(), (values(5, 3),))
    run([InsertObservers(observer=MovingAverage()), Calibrate()], program, [values(5, 3)])
    before = program.snapshot()
    old = before.observers["input_1"]
    kept = old.range()
    run([Calibrate()], program, [10 * values(5, 3)])
    new = program.observers["input_1"]
    assert new is not old and new.batches == 1
    assert before.observers["input_1"] is old and old.range() == kept
    assert float(new.range()[1]) == pytest.approx(10 * float(kept[1]))


def test_a_shared_observer_sees_all_values_that_share_it() -> None:
    class Convs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large, self.last = nn.Conv1d(3, 2, 1), nn.Conv1d(3, 2, 1), nn.Conv1d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.small(x), self.large(x)], 1))

    model, x = settle(Convs()), values(5, 3, 7)
    program = trace(model, (x,))
    run([InsertObservers(observer=MinMax()), Calibrate()], program, [x])
    both = torch.cat([model.small(x), model.large(x)])
    assert program.observers["cat"].range() == (both.min(), both.max())


def test_takes_batches_of_every_size_that_the_program_takes() -> None:
    program = trace(mlp(), (values(5, 3),), dynamic_shapes={"input": {0: Dim("batch")}})
    run([InsertObservers(), Calibrate()], program, [values(5, 3), values(2, 3)])
    assert program.observers["input_1"].count == 21


def test_asks_for_data_that_is_missing_or_empty() -> None:
    program = trace(mlp(), (values(5, 3),))
    run([InsertObservers()], program)
    with pytest.raises(CalibrationError, match="calibrate needs calibration data, and there is none"):
        run([Calibrate()], program)
    with pytest.raises(CalibrationError, match="Calibration data is empty"):
        run([Calibrate()], program, [])
    with pytest.raises(CalibrationError, match=r"(?s)does not fit the model.*calibration batch 1"):
        run([Calibrate()], program, [values(5, 3), values(5, 4)])
    with pytest.raises(CalibrationError, match=r"(?s)NaN or infinity.*batch 0, input 'input'"):
        run([Calibrate()], program, [values(5, 3) / 0])
    assert program.observers["input_1"].count == 0


def test_names_the_place_where_the_model_overflows() -> None:
    class Overflow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.exp())

    program = trace(settle(Overflow()), (values(2, 3),))
    run([InsertObservers()], program)
    with pytest.raises(CalibrationError, match=r"(?s)not finite.*node %exp.*6 infinite of 6 values, batch 1"):
        run([Calibrate()], program, [torch.full((2, 3), 1000.0)])


def test_observes_constants_that_take_part_as_values() -> None:
    """A stored tensor that a convolution's result is added to is a value like others."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
            self.position = nn.Parameter(torch.ones(2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.conv(x) + self.position)

    model = settle(Scaled())
    program = trace(model, (values(1, 2, 4, 4),))
    run([InsertObservers(observer=MinMax()), Calibrate()], program, [values(1, 2, 4, 4)])
    assert program.observers["position"].range() == (model.position.min(), model.position.max())


def test_refuses_programs_of_another_level() -> None:
    refuse_level(Calibrate(), Level.ATEN)
    refuse_level(Calibrate(), Level.QDQ)


def test_does_not_watch_more_than_the_format_says() -> None:
    program = trace(mlp(), (values(5, 3),))
    run([InsertObservers(activation=Format.parse("int16")), Calibrate()], program, [values(5, 3)])
    assert program.observers["input_1"].range()[0].shape == ()
