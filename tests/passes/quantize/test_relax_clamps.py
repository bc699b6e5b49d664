from __future__ import annotations

import pytest
import torch
from support.passes import refuse_other_levels
from support.quantize import run, settled, values
from torch import nn
from torch.export import Dim

from sqcompile import trace
from sqcompile.errors import CalibrationError, PassOptionError
from sqcompile.passes import CanonicalizeActivations, EqualizeLayers, RelaxClamps
from sqcompile.testing import check_pass


def test_turns_a_clamp_that_cuts_nothing_into_relu() -> None:
    x = values(2, 3)
    check_pass(
        RelaxClamps(),
        settled(nn.Linear(3, 4), nn.ReLU6(), nn.Linear(4, 2)),
        (x,),
        calibration=[x],
        expected="""
            program (level aten)
              input  %input_1: f32[2, 3]
              tensor @0.weight: f32[4, 3]
              tensor @0.bias: f32[4]
              tensor @2.weight: f32[2, 4]
              tensor @2.bias: f32[2]
              %linear: f32[2, 4] = linear(%input_1, @0.weight, @0.bias)
              %relu: f32[2, 4] = relu(%linear)
              %linear_1: f32[2, 2] = linear(%relu, @2.weight, @2.bias)
              return output=%linear_1
        """,
    )


def test_keeps_a_clamp_that_cuts() -> None:
    x = torch.tensor([[1.0, 7.0, 2.0, 3.0]])
    check_pass(
        RelaxClamps(),
        nn.ReLU6(),
        (x,),
        calibration=[x],
        unchanged=True,
        remarks=["stays a clamp: 25.00 % of its values are above 6"],
    )
    check_pass(RelaxClamps(cut=0.25), nn.ReLU6(), (x,), calibration=[x], idempotent=True)


@pytest.mark.parametrize("clamp", [nn.ReLU6(), nn.Hardtanh(0.0, 6.0)], ids=["relu6", "hardtanh"])
@pytest.mark.parametrize("prepare", [[], [CanonicalizeActivations()]], ids=["traced", "canonical"])
def test_knows_the_ways_to_write_a_clamp(clamp: nn.Module, prepare: list[CanonicalizeActivations]) -> None:
    checked = check_pass(RelaxClamps(), clamp, (values(2, 3),), prepare=prepare, calibration=[values(2, 3)])
    assert checked.record.changes > 0 and "relu(" in checked.after.text()


@pytest.mark.parametrize("clamp", [nn.Hardtanh(-1.0, 1.0), nn.ReLU(), nn.Hardtanh(1.0, 6.0)])
def test_leaves_other_bounds(clamp: nn.Module) -> None:
    check_pass(
        RelaxClamps(),
        clamp,
        (values(2, 3),),
        unchanged=True,
        remarks=["has no clamp from zero to a bound"],
    )


def test_measures_over_all_batches_and_sizes() -> None:
    program = trace(nn.ReLU6(), (torch.ones(2, 3),), dynamic_shapes={"input": {0: Dim("batch")}})
    above = torch.full((1, 3), 7.0)
    (record,) = run([RelaxClamps(cut=0.1)], program, [torch.ones(8, 3), above])
    assert record.remarks[0].reason == "stays a clamp: 11.11 % of its values are above 6"
    (record,) = run([RelaxClamps(cut=0.1)], program, [torch.ones(9, 3), above])
    assert record.changes > 0


def test_a_clamp_that_is_an_output_may_be_relaxed() -> None:
    checked = check_pass(
        RelaxClamps(cut=1.0), nn.ReLU6(), (10 * values(2, 3),), calibration=[10 * values(2, 3)]
    )
    assert torch.equal(checked.after(10 * values(2, 3)), torch.relu(10 * values(2, 3)))


def test_lets_layers_be_equalized() -> None:
    x = values(2, 3)
    model = settled(nn.Linear(3, 4), nn.ReLU6(), nn.Linear(4, 2))
    program = trace(model, (x,))
    assert run([EqualizeLayers()], program)[0].facts == {}
    *_, record = run([RelaxClamps(), EqualizeLayers()], program, [x])
    assert record.facts == {"pairs": 1}


def test_asks_for_data() -> None:
    program = trace(nn.ReLU6(), (values(2, 3),))
    with pytest.raises(CalibrationError, match="relax-clamps needs calibration data"):
        run([RelaxClamps()], program)


@pytest.mark.parametrize("cut", [-0.1, 1.1])
def test_refuses_shares_that_are_none(cut: float) -> None:
    with pytest.raises(PassOptionError, match="a share of values"):
        RelaxClamps(cut=cut)


def test_refuses_programs_past_its_level() -> None:
    refuse_other_levels(RelaxClamps())
