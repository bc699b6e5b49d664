from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from support.quantize import settled, values
from torch import nn
from torch.export import Dim

from sqcompile import Program, trace
from sqcompile.calibration import Calibration
from sqcompile.errors import CalibrationError, InputError
from sqcompile.layers import layers_of
from sqcompile.mixed_precision import Candidate, Measure, Sensitivity, measure_sensitivity
from sqcompile.pipeline import PassContext

CANDIDATES = [
    Candidate.parse(text) for text in ("uint2:group=8:affine", "int8:channel=0", "int4:group=8+50%")
]


def classifier() -> Program:
    model = settled(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    return trace(model, (values(32, 16),), dynamic_shapes=({0: Dim("rows")},))


def context(program: Program, batches: Sequence[torch.Tensor] | None = None) -> PassContext:
    batches = [values(64, 16, seed=seed) for seed in range(4)] if batches is None else batches
    return PassContext(calibration=Calibration(list(batches), program.signature))


def measured(
    program: Program, measure: Measure = "divergence", candidates: Sequence[Candidate] = CANDIDATES
) -> Sensitivity:
    return measure_sensitivity(program, layers_of(program), candidates, context(program), measure=measure)


@pytest.mark.parametrize("measure", ["divergence", "error", "fisher"])
def test_fewer_bits_and_zeros_harm_more(measure: Measure) -> None:
    program = classifier()
    before = {name: tensor.clone() for name, tensor in program.tensors()}
    table = measured(program, measure)
    assert table.layers == ("0", "2")
    assert (table.losses[:, 0] > 20 * table.losses[:, 1]).all()
    assert (table.losses[:, 2] > 20 * table.losses[:, 1]).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.tensors())


def test_losses_are_those_of_the_changed_model() -> None:
    """The divergence of outputs, computed with the last layer's weight rounded by itself."""
    program = classifier()
    eight = Candidate.parse("int3:channel=0")
    seen: list[torch.Tensor] = []
    layer = layers_of(program)[-1]
    table = measured(program, "divergence", [eight])
    stored = program.tensor(layer.weight)
    dense = stored.detach().clone()
    batches = [values(64, 16, seed=seed) for seed in range(4)]
    with torch.no_grad():
        wanted = [torch.log_softmax(program(batch), -1) for batch in batches]
        # With independent inputs and a scale a row, the sweep's weight is found again from its outputs' change.
        from sqcompile.second_order import Hessian
        from sqcompile.second_order.rounding import round_weight

        hessian = Hessian(32)
        for batch in batches:
            hessian.add(torch.tanh(batch @ program.tensor("0.weight").T + program.tensor("0.bias")))
        stored.copy_(round_weight(dense, hessian, eight.format).weight)
        for batch, log in zip(batches, wanted, strict=True):
            own = torch.log_softmax(program(batch), -1)
            seen.append((log.exp() * (log - own)).sum(-1))
        stored.copy_(dense)
    assert table.losses[-1, 0] == pytest.approx(float(torch.cat(seen).mean()), rel=1e-3)


def test_fisher_is_the_divergence_to_second_order() -> None:
    """Small changes, and enough draws for an estimate of the gradient's squares."""
    program = classifier()
    batches = [values(2048, 16, seed=seed) for seed in range(4)]
    tables = [
        measure_sensitivity(
            program, layers_of(program), CANDIDATES[1:2], context(program, batches), measure=measure
        )
        for measure in ("divergence", "fisher")
    ]
    # The off-diagonal part of the Fisher matrix is left out: a factor, not an equality.
    ratio = tables[1].losses / tables[0].losses
    assert ((ratio > 0.5) & (ratio < 2)).all(), ratio


def test_bits_are_those_of_the_stored_weight() -> None:
    table = measured(classifier())
    expected = [[candidate.size_bits(shape) for candidate in CANDIDATES] for shape in ((32, 16), (8, 32))]
    assert np.array_equal(table.bits, np.array(expected, dtype=float))
    assert table.weights.tolist() == [512, 256]


def test_a_layer_that_cannot_take_a_candidate() -> None:
    model = settled(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    program = trace(model, (values(32, 6),), dynamic_shapes=({0: Dim("rows")},))
    two_of_four = [Candidate.parse("int8+2:4")]
    table = measure_sensitivity(
        program, layers_of(program), two_of_four, context(program, [values(64, 6)]), measure="error"
    )
    assert np.isfinite(table.losses).tolist() == [[False], [True]]


def test_without_data() -> None:
    program = classifier()
    with pytest.raises(CalibrationError, match="needs calibration data"):
        measure_sensitivity(program, layers_of(program), CANDIDATES, PassContext(), measure="divergence")


class Codes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).argmax(-1)


def test_outputs_that_are_no_numbers() -> None:
    program = trace(Codes(), (values(8, 4),))
    with pytest.raises(InputError, match="first output") as caught:
        measure_sensitivity(
            program, layers_of(program), CANDIDATES[1:2], context(program, [values(8, 4)]), measure="error"
        )
    assert "int64" in str(caught.value)
