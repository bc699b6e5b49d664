"""Moving the unevenness of inputs into weights."""

from __future__ import annotations

import pytest
import torch
from support.gated import SCALED, Odd, batches, changed, gated
from support.passes import refuse_other_levels
from support.programs import data, seeded
from support.quantize import run
from torch import Tensor

from sqcompile.errors import CalibrationError, PassOptionError, SelectionError
from sqcompile.evaluate import run_watched
from sqcompile.layers import layers_of
from sqcompile.passes import SmoothQuant
from sqcompile.program import Program
from sqcompile.tracing import trace


def test_scales_every_input_and_keeps_the_function() -> None:
    program = gated().snapshot()
    (record,) = run([SmoothQuant()], program, batches())
    x = torch.cat(batches())
    torch.testing.assert_close(program(x), gated()(x), rtol=1e-4, atol=1e-4)  # scaled, and rounded to float32
    assert changed(program) == SCALED
    assert not record.remarks and record.facts == {"groups": 3}


def test_evens_the_inputs_out() -> None:
    program = gated().snapshot()
    before = peaks(program)
    run([SmoothQuant(strength=0.8)], program, batches())
    after = peaks(program)
    assert float(before.amax() / before.median()) > 5
    assert float(after.amax() / after.median()) < 0.5 * float(before.amax() / before.median())


def peaks(program: Program) -> Tensor:
    """The largest values of each channel that the head reads."""
    (head,) = (layer for layer in layers_of(program) if layer.name == "head")
    assert head.data is not None
    found: list[Tensor] = []
    run_watched(
        program, [torch.cat(batches())], [head.data], lambda node, value: found.append(value.abs().amax(0))
    )
    return found[0]


def test_says_why_an_input_is_not_scaled() -> None:
    program = trace(seeded(Odd), (data(2, 8),))
    (record,) = run([SmoothQuant()], program, [data(2, 8)])
    assert [remark.reason for remark in record.remarks] == [
        "its input is not scaled: it is made by input",
        "its input is not scaled: it goes to add too",
        "its input is not scaled: it is made by tanh",
    ]
    assert record.changes == 0


def test_layers_that_are_left_out_stay_with_all_that_read_the_same() -> None:
    program = gated().snapshot()
    run([SmoothQuant(exclude=("gate",))], program, batches())
    assert changed(program) == {
        "up.weight",
        "up.bias",
        "down.weight",
        "norm.weight",
        "norm.bias",
        "head.weight",
    }
    program = gated().snapshot()
    run([SmoothQuant(layers=("head",))], program, batches())
    assert changed(program) == {"norm.weight", "norm.bias", "head.weight"}


def test_refuses_what_cannot_be() -> None:
    for strength in (0.0, 1.1):
        with pytest.raises(PassOptionError, match="strength"):
            SmoothQuant(strength=strength)
    with pytest.raises(SelectionError, match="nothing_like_it"):
        run([SmoothQuant(layers=("nothing_like_it",))], gated().snapshot(), batches())
    with pytest.raises(CalibrationError):
        run([SmoothQuant()], gated().snapshot())
    refuse_other_levels(SmoothQuant())
