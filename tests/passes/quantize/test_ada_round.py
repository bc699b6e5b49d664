"""Learned rounding as a pass."""

from __future__ import annotations

import pytest
import torch
from support.gated import batches, gated
from support.passes import refuse_other_levels
from support.quantize import run

from sqcompile.errors import CalibrationError, PassOptionError, SelectionError
from sqcompile.passes import AdaRound, QuantizeWeights
from sqcompile.program import Program
from sqcompile.quantization.format import Format

FORMAT = Format.parse("uint3:group=16:affine")


@torch.no_grad()
def error(program: Program) -> float:
    x = torch.cat(batches(8)[4:])
    return float((program(x) - gated()(x)).square().mean())


def test_stores_codes_that_hurt_less_than_nearest() -> None:
    plain, learned = gated().snapshot(), gated().snapshot()
    run([QuantizeWeights(weight=FORMAT, search="mse")], plain)
    (record,) = run([AdaRound(weight=FORMAT, steps=100)], learned, batches())
    assert error(learned) < 0.8 * error(plain)
    assert record.facts == {"learned": 4}
    assert {name for name, _ in learned.tensors() if name.endswith("_codes")} == {
        f"{name}.weight_codes" for name in ("gate", "up", "down", "head")
    }


def test_options_choose_layers_and_formats() -> None:
    program = gated().snapshot()
    formats = (("down", "float"), ("gate", Format.parse("int4:group=16:mapping=nf")))
    (record,) = run(
        [AdaRound(weight=FORMAT, exclude=("head",), formats=formats, steps=5, dense_targets=False)],
        program,
        batches(),
    )
    stored = {name for name, _ in program.tensors()}
    assert {"down.weight", "head.weight", "up.weight_codes", "gate.weight_table"} <= stored
    assert [remark.reason for remark in record.remarks] == [
        "is rounded to nearest: its mapping is not linear"
    ]


def test_the_same_program_comes_out_each_time() -> None:
    programs = [gated().snapshot() for _ in range(2)]
    for program in programs:
        run([AdaRound(weight=FORMAT, steps=10)], program, batches())
    assert programs[0].fingerprint(content=True) == programs[1].fingerprint(content=True)


def test_refuses_what_cannot_be() -> None:
    with pytest.raises(PassOptionError, match="steps"):
        AdaRound(steps=0)
    with pytest.raises(PassOptionError, match="rate"):
        AdaRound(rate=0.0)
    with pytest.raises(PassOptionError, match="weight"):
        AdaRound(weight=Format.parse("uint8:affine:dynamic"))
    with pytest.raises(SelectionError, match="nothing_like_it"):
        run([AdaRound(layers=("nothing_like_it",))], gated().snapshot(), batches())
    with pytest.raises(CalibrationError):
        run([AdaRound()], gated().snapshot())
    refuse_other_levels(AdaRound())
