from __future__ import annotations

from typing import Any

import pytest
import torch
from support.quantize import refuse_level, settled, values
from torch import nn
from torch.export import Dim

from sqcompile import Level, Program, trace
from sqcompile.calibration import Calibration
from sqcompile.errors import PassOptionError
from sqcompile.layers import layers_of
from sqcompile.mixed_precision import Candidate
from sqcompile.passes import GPTQ, MixedPrecision, QuantizeWeights, SparseGPT
from sqcompile.pipeline import PassContext, PassManager, parse_pass
from sqcompile.pipeline.manager import PassRecord
from sqcompile.pipeline.text import pass_text
from sqcompile.quantization import Format
from sqcompile.report import value_format

FORMATS = tuple(Candidate.parse(f"uint{bits}:group=8:affine") for bits in (2, 3, 4, 8))
QUANTIZE = GPTQ(weight=Format.parse("uint4:group=8:affine"))


def uneven() -> nn.Sequential:
    """A middle layer that hardly matters: what it makes is scaled down before the rest adds up."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.much = nn.Linear(16, 16)
            self.little = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.much(x) + 1e-3 * self.little(x)

    return settled(Block(), nn.ReLU(), nn.Linear(16, 8))


def compiled(item: MixedPrecision) -> tuple[Program, PassRecord, PassContext]:
    data = [values(64, 16, seed=seed) for seed in range(6)]
    program = trace(uneven(), (data[0],), dynamic_shapes=({0: Dim("rows")},))
    context = PassContext(calibration=Calibration(data, program.signature))
    (record,) = PassManager([item]).run(program, context)
    return program, record, context


def formats(program: Program) -> dict[str, str]:
    return {layer.name: value_format(layer.weight_value) for layer in layers_of(program)}


@pytest.mark.parametrize("measure", ["divergence", "fisher", "error"])
def test_bits_go_where_they_matter(measure: Any) -> None:
    item = MixedPrecision(quantize=QUANTIZE, candidates=FORMATS, bits=8.0, measure=measure)
    program, record, context = compiled(item)
    assert program.level is Level.QDQ
    assert record.facts["bits"] <= 8.0
    chosen = record.facts["choice"]
    assert chosen["0.little"] == "uint2:group=8:affine"
    assert chosen["0.much"] != chosen["0.little"]
    assert formats(program)["0.little"] == "uint2:group=8"
    assert {name: text.split(":")[0] for name, text in chosen.items()} == {
        name: text.split(":")[0] for name, text in formats(program).items()
    }
    assert any("bits a weight" in remark.reason for remark in context.remarks)


def test_is_better_than_one_format_of_the_same_size() -> None:
    data = [values(64, 16, seed=seed) for seed in range(20, 24)]
    dense = trace(uneven(), (data[0],), dynamic_shapes=({0: Dim("rows")},))
    three = FORMATS[1].format
    # Every layer at three bits takes 3 + 35 / 8 bits a weight.
    errors = []
    for item in (
        GPTQ(weight=three),
        MixedPrecision(quantize=QUANTIZE, candidates=FORMATS, bits=3 + 35 / 8, measure="error"),
    ):
        program = trace(uneven(), (data[0],), dynamic_shapes=({0: Dim("rows")},))
        calibration = [values(64, 16, seed=seed) for seed in range(6)]
        PassManager([item]).run(program, PassContext(calibration=Calibration(calibration, program.signature)))
        with torch.no_grad():
            errors.append(sum(float((program(x) - dense(x)).square().sum()) for x in data))
    assert errors[1] < 0.7 * errors[0]


def test_prunes_where_that_is_chosen() -> None:
    item = MixedPrecision(
        quantize=QUANTIZE,
        prune=SparseGPT(sparsity=0.5),
        candidates=(Candidate.parse("uint8:group=8:affine"), Candidate.parse("uint4:group=8:affine+75%")),
        bits=10.0,
    )
    program, record, _ = compiled(item)
    assert record.facts["choice"]["0.little"] == "uint4:group=8:affine+75%"
    assert record.facts["choice"]["0.much"] == "uint8:group=8:affine"
    zeros = {
        layer.name: float((layer_values(program, layer.name) == 0).float().mean())
        for layer in layers_of(program)
    }
    assert zeros["0.little"] == pytest.approx(0.75) and zeros["0.much"] < 0.2


def layer_values(program: Program, name: str) -> torch.Tensor:
    from sqcompile.evaluate import constant_value

    layer = next(layer for layer in layers_of(program) if layer.name == name)
    value = constant_value(program, layer.weight_value)
    assert value is not None
    return value


def test_the_smallest_within_an_increase() -> None:
    loose, tight = (
        compiled(MixedPrecision(quantize=QUANTIZE, candidates=FORMATS, increase=increase))[1].facts
        for increase in (0.05, 0.001)
    )
    assert loose["bits"] < tight["bits"]
    assert loose["predicted"] > tight["predicted"]


def test_layers_left_out_get_what_the_quantizing_pass_says() -> None:
    item = MixedPrecision(
        quantize=QuantizeWeights(weight=Format(), formats=(("kind:head", "float"),)),
        candidates=FORMATS,
        bits=6.4,
        layers=("0.*",),
    )
    program, _, _ = compiled(item)
    assert formats(program)["2"] == "float32"
    assert formats(program)["0.little"] == "uint2:group=8"


def test_a_budget_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times as the bits of a weight, but for the first candidate, which has no kernel."""
    candidates = (Candidate.parse("int3:channel=0"), *FORMATS)

    class Timed:
        def product_ns(self, shape: tuple[int, int], format: Format, *zeros: Any) -> float | None:
            return None if format == candidates[0].format else 1e6 * format.bits * shape[0] * shape[1] / 640

    monkeypatch.setattr("sqcompile.passes.quantize.mixed_precision.get_backend", lambda name: Timed())
    item = MixedPrecision(quantize=QUANTIZE, candidates=candidates, milliseconds=3.3)
    facts = compiled(item)[1].facts
    assert facts["cost"] <= 3.3 and facts["unit"] == "ms a row"
    assert facts["choice"]["0.little"] == "uint2:group=8:affine"
    assert "int3:channel=0" not in facts["choice"].values()
    with pytest.raises(PassOptionError, match="cannot meet the budget") as caught:
        compiled(MixedPrecision(quantize=QUANTIZE, candidates=candidates, milliseconds=1.9))
    assert "2 milliseconds or more" in str(caught.value)


def test_says_what_is_closest_to_a_budget() -> None:
    with pytest.raises(PassOptionError, match="cannot meet the budget") as caught:
        compiled(MixedPrecision(quantize=QUANTIZE, candidates=FORMATS, bits=6.0))
    assert "6.25 bits or more" in str(caught.value)  # two bits, and 34 of a scale and zero point for eight
    with pytest.raises(PassOptionError, match="cannot meet the budget") as caught:
        compiled(MixedPrecision(quantize=QUANTIZE, candidates=FORMATS, increase=1e-12))
    assert "even the best formats" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "quantize"),
        ({"quantize": QUANTIZE}, "bits"),
        ({"quantize": QUANTIZE, "bits": 4.0, "megabytes": 1.0}, "megabytes"),
        ({"quantize": QUANTIZE, "bits": 0.0}, "bits"),
        ({"quantize": SparseGPT(sparsity=0.5), "bits": 4.0}, "quantize"),
        ({"quantize": QUANTIZE, "bits": 4.0, "candidates": (Candidate.parse("int8+50%"),)}, "prune"),
        ({"quantize": QUANTIZE, "bits": 4.0, "candidates": ()}, "candidates"),
        ({"quantize": QUANTIZE, "increase": 0.01, "measure": "error"}, "measure"),
        ({"quantize": QUANTIZE, "bits": 4.0, "max_batches": 0}, "max_batches"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes(options: dict[str, Any], named: str) -> None:
    with pytest.raises(PassOptionError) as caught:
        MixedPrecision(**options)
    assert named in str(caught.value)


def test_text() -> None:
    text = (
        "mixed-precision{quantize=gptq{search=minmax},prune=sparse-gpt{sparsity=0.5},bits=3.5,"
        "candidates=[uint3:group=32:affine,int8:channel=0+1x4:80%]}"
    )
    item = parse_pass(text)
    assert pass_text(item) == text
    assert parse_pass(pass_text(item)) == item


def test_refuses_programs_past_aten() -> None:
    refuse_level(MixedPrecision(quantize=QUANTIZE, bits=4.0), Level.QDQ)
