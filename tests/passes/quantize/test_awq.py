"""Scaling inputs for weights of few bits."""

from __future__ import annotations

import pytest
import torch
from support.gated import SCALED, Odd, batches, changed, gated
from support.passes import refuse_other_levels
from support.programs import data, seeded
from support.quantize import run

from sqcompile.errors import CalibrationError, PassOptionError, SelectionError
from sqcompile.passes import AWQ, QuantizeWeights
from sqcompile.program import Program
from sqcompile.quantization.format import Format
from sqcompile.tracing import trace

FORMAT = Format.parse("int3:group=16")


@torch.no_grad()
def error(program: Program) -> float:
    x = torch.cat(batches(8)[4:])
    return float((program(x) - gated()(x)).square().mean())


def test_scales_every_input_and_keeps_the_function() -> None:
    program = gated().snapshot()
    (record,) = run([AWQ(weight=FORMAT)], program, batches())
    x = torch.cat(batches())
    torch.testing.assert_close(program(x), gated()(x), rtol=1e-4, atol=1e-4)  # scaled, and rounded to float32
    assert changed(program) == SCALED
    assert not record.remarks


@pytest.mark.parametrize("text", ["int3:group=16", "int3:group=16:mapping=nf"])
def test_makes_rounding_hurt_less(text: str) -> None:
    format = Format.parse(text)
    plain, scaled = gated().snapshot(), gated().snapshot()
    rounding = QuantizeWeights(weight=format, search="mse")
    run([rounding], plain)
    record, _ = run([AWQ(weight=format), rounding], scaled, batches())
    assert error(scaled) < 0.85 * error(plain)  # measured: 0.73 with linear steps
    gains = record.facts["error"]
    assert set(gains) == {"gate", "down", "head"} and all(0 < gain <= 1 for gain in gains.values())


def test_layers_that_are_left_out_stay_with_all_that_read_the_same() -> None:
    program = gated().snapshot()
    (record,) = run([AWQ(weight=FORMAT, exclude=("up",))], program, batches())
    assert "gate.weight" not in changed(program)
    assert [remark.reason for remark in record.remarks] == [
        "its input is not scaled: 'up' reads it too, and is not selected"
    ]


def test_says_why_an_input_is_not_scaled() -> None:
    program = trace(seeded(Odd), (data(2, 8),))
    (record,) = run([AWQ(weight=FORMAT)], program, [data(2, 8)])
    assert len(record.remarks) == 3 and record.changes == 0


def test_one_exponent_is_no_search_beyond_the_ends() -> None:
    program = gated().snapshot()
    run([AWQ(weight=FORMAT, steps=1)], program, batches())
    ratio = gated().tensor("norm.weight") / program.tensor("norm.weight")
    assert ratio.shape == (32,) and bool((ratio > 0).all())


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(PassOptionError, match="steps"):
        AWQ(steps=0)
    with pytest.raises(PassOptionError, match="weight"):
        AWQ(weight=Format.parse("uint8:affine:dynamic"))
    with pytest.raises(SelectionError, match="nothing_like_it"):
        run([AWQ(layers=("nothing_like_it",))], gated().snapshot(), batches())
    with pytest.raises(CalibrationError):
        run([AWQ()], gated().snapshot())
    refuse_other_levels(AWQ())
