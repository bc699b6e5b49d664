"""The layers to leave in floating point are found by trying, the worst first."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from support.programs import data, mlp

from sqcompile.bisect import bisect_layers, leave_out
from sqcompile.errors import SelectionError
from sqcompile.pipeline import Pass, PassContext, PassManager, parse_pipeline
from sqcompile.pipeline.text import pass_text
from sqcompile.program import Program


def run(passes: Sequence[Pass]) -> Program:
    program = mlp().snapshot()
    PassManager(passes).run(program, PassContext())
    return program


BATCHES = [[data(16, 8)]]


def test_leaves_the_layer_that_does_the_harm() -> None:
    coarse = "quantize-weights{weight=int8:channel=0,formats=[[second,int2:channel=0]]}"
    trials = bisect_layers(mlp(), parse_pipeline(coarse), run, BATCHES)
    assert [trial.left for trial in trials] == [(), ("second",)]
    # Two bits keep a tenth of the power as noise at best; eight bits of one layer less than a thousandth.
    assert trials[0].distance.sqnr_db < 15 and trials[1].distance.sqnr_db > 30
    assert trials[1].size_bytes > trials[0].size_bytes
    (left,) = trials[1].passes
    (read,) = parse_pipeline(pass_text(left))
    assert read == left, "what is printed can be pasted"


def test_goes_on_until_it_is_good_or_all_is_left() -> None:
    even = parse_pipeline("quantize-weights{weight=int2:channel=0}")
    trials = bisect_layers(mlp(), even, run, BATCHES, gain_db=200.0)
    assert sorted(trials[-1].left) == ["first", "second"]
    assert trials[-1].distance.sqnr_db == float("inf")
    assert len(bisect_layers(mlp(), even, run, BATCHES, gain_db=200.0, most=1)) == 2


def test_an_exact_program_needs_nothing() -> None:
    assert len(bisect_layers(mlp(), parse_pipeline("remove-noops"), run, BATCHES)) == 1


def test_overrides_go_where_a_pass_takes_them() -> None:
    passes = parse_pipeline("remove-noops,wanda{sparsity=0.5},quantize-weights")
    texts = [pass_text(item) for item in leave_out(passes, ["first"])]
    assert texts[0] == "remove-noops"
    assert "exclude=[first]" in texts[1] and "formats={first:float}" in texts[2]
    assert leave_out(passes, []) == passes
    with pytest.raises(SelectionError, match="None of the passes can leave a layer out"):
        leave_out(parse_pipeline("remove-noops,fold-constants"), ["first"])
