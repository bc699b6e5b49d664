"""What the page draws: zeros where they are, ranges that were chosen, graphs as they changed."""

from __future__ import annotations

import pytest
import torch
from support.programs import data
from torch import nn

import sqcompile
from sqcompile import report_pictures
from sqcompile.api import Compiled
from sqcompile.passes import pipelines
from sqcompile.report_pictures import GraphTexts, activation_ranges, weight_maps
from sqcompile.text import program_text
from sqcompile.tracing import trace


def compiled(
    passes: object, *layers: nn.Module, shape: tuple[int, ...] = (4, 8), **options: object
) -> Compiled:
    x = data(*shape)
    made = sqcompile.compile(
        nn.Sequential(*layers).eval(),
        passes,
        (x,),
        [x],
        backend="reference",
        **options,  # type: ignore[arg-type]
    )
    assert isinstance(made, Compiled)
    return made


def test_maps_show_where_weights_are_zero() -> None:
    layer = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[1] = 0.0
        layer.weight[:, 6:] = 0.0
    program = trace(nn.Sequential(layer).eval(), (data(2, 8),))
    assert weight_maps(program, {"0": 0.4}) == {"0": ("ffffff00", "00000000", "ffffff00", "ffffff00")}
    assert weight_maps(program, {"0": 0.1}) == {}


def test_a_large_map_is_averaged_and_keeps_what_is_rare() -> None:
    layer = nn.Linear(640, 64, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, :320] = 1.0
        layer.weight[0, 639] = 1.0  # one of twenty in its place
    (lines,) = weight_maps(trace(nn.Sequential(layer).eval(), (data(2, 640),)), {"0": 0.5}).values()
    assert len(lines) == 32 and set(lines[1:]) == {"f" * 32 + "0" * 32}
    assert lines[0] == "f" * 32 + "0" * 31 + "1"


def test_maps_see_masks_and_codes() -> None:
    made = compiled("mask-weights{sparsity=0.5,pattern=2:4},apply-masks,quantize-weights", nn.Linear(8, 8))
    assert list(made.report.weight_maps) == ["0"]
    shown = "".join(made.report.weight_maps["0"])
    # Rounding may bring a zero more; the mask's half is gone for sure.
    assert shown.count("0") >= 32 and set(shown) <= {"0", "f"}


def test_ranges_of_activations() -> None:
    torch.manual_seed(0)
    made = compiled(pipelines.int8_static(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    found = made.report.activations
    assert [item.name for item in found] and all(item.format.startswith(("uint8", "int8")) for item in found)
    for item in found:
        assert sum(item.counts) in (4 * 8, 4 * 16, 4 * 4)
        assert item.low <= item.range_low < item.range_high <= item.high
        # Calibrated on the batch that was checked: clipped is what costs less than coarser steps.
        assert item.clipped < 0.2


def test_values_beyond_the_range_are_clipped() -> None:
    made = compiled(pipelines.int8_static(), nn.Linear(8, 16))
    (first, *_) = activation_ranges(made.program, [100 * data(4, 8)])
    assert first.clipped > 0.5 and first.high > first.range_high


def test_programs_without_fixed_scales_have_no_ranges() -> None:
    assert compiled("quantize-weights", nn.Linear(8, 8)).report.activations == []


def test_graphs_are_kept_as_they_change() -> None:
    made = compiled("remove-noops,mask-weights{sparsity=0.5},apply-masks", nn.Linear(8, 8))
    graphs = made.report.graphs
    assert graphs is not None
    # remove-noops changed nothing.
    assert [stage.title for stage in graphs.stages] == [
        "as traced", "after mask-weights{sparsity=0.5}", "after apply-masks"
    ]  # fmt: skip
    text = "\n".join(graphs.lines[place] for place in graphs.stages[-1].lines)
    assert text == program_text(made.program)
    assert len(graphs.lines) == len(set(graphs.lines))


def test_graphs_that_are_too_long_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    program = trace(nn.Sequential(nn.Linear(8, 8)).eval(), (data(2, 8),))
    graphs = GraphTexts()
    graphs._keep("as traced", program)
    monkeypatch.setattr(report_pictures, "_GRAPH_LINES", len(graphs.lines))
    graphs._keep("the same", program)
    assert not graphs.full and len(graphs.stages) == 1
    graphs._keep("another", trace(nn.Sequential(nn.Linear(8, 4)).eval(), (data(2, 8),)))
    assert graphs.full and len(graphs.stages) == 1


def test_without_checks_nothing_is_drawn() -> None:
    report = compiled("quantize-weights{weight=int2:channel=0}", nn.Linear(8, 8), verify="off").report
    assert (report.graphs, report.weight_maps, report.activations) == (None, {}, [])
