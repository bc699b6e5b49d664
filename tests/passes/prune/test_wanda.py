from __future__ import annotations

import pytest
import torch
from support.passes import refuse_other_levels
from support.quantize import settled, values
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import trace
from sqcompile.calibration import Calibration
from sqcompile.errors import CalibrationError, PassOptionError
from sqcompile.passes import MaskWeights, Wanda
from sqcompile.pipeline import Pass, PassContext, PassManager, parse_pass
from sqcompile.sparsity import Pattern
from sqcompile.testing import check_pass


def batches(depth: int, count: int = 4) -> list[Tensor]:
    """Inputs whose channels differ in size by up to a hundred times."""
    return [values(32, depth, seed=seed) * torch.logspace(-1, 1, depth) for seed in range(count)]


def chain() -> nn.Module:
    return settled(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def test_masks_by_magnitude_times_activation_row_by_row() -> None:
    model = settled(nn.Linear(8, 3))
    checked = check_pass(
        Wanda(sparsity=0.5),
        model,
        (batches(8)[0],),
        calibration=batches(8),
        expected="""
            program (level aten)
              input  %input_1: f32[32, 8]
              tensor @0.weight_mask: bool[3, 8]
              tensor @0.weight: f32[3, 8]
              tensor @0.bias: f32[3]
              %mask: f32[3, 8] = mask(@0.weight, @0.weight_mask)
              %linear: f32[32, 3] = linear(%input_1, %mask, @0.bias)
              return output=%linear
        """,
    )
    weight = model[0].weight.detach()  # type: ignore[index, union-attr, operator]
    scores = weight.abs() * torch.cat(batches(8)).norm(dim=0)
    mask = checked.after.tensor("0.weight_mask")
    for row, kept in zip(scores, mask, strict=True):
        assert int(kept.sum()) == 4 and row[kept].min() > row[~kept].max()
    assert torch.equal(checked.after.tensor("0.weight"), weight)


def test_refit_makes_up_and_runs_once() -> None:
    def error(item: Pass) -> float:
        data = batches(16, 12)
        program = trace(chain(), (data[0],), dynamic_shapes=({0: Dim("rows")},))
        wanted = [program(x) for x in data[8:]]
        PassManager([item]).run(program, PassContext(calibration=Calibration(data[:8], program.signature)))
        return sum(float((program(x) - y).square().sum()) for x, y in zip(data[8:], wanted, strict=True))

    plain = error(Wanda(sparsity=0.5))
    assert plain < 0.5 * error(MaskWeights(sparsity=0.5)) and error(Wanda(sparsity=0.5, refit=True)) < plain
    check_pass(Wanda(sparsity=0.5, refit=True), chain(), (batches(16)[0],), calibration=batches(16))


@pytest.mark.parametrize("text", ["2:4", "1x4", "4x4"])
def test_patterns(text: str) -> None:
    pattern = Pattern.parse(text)
    item = Wanda(pattern=pattern, sparsity=None if pattern.m else 0.5)
    checked = check_pass(item, chain(), (batches(16)[0],), calibration=batches(16))
    for promise in checked.after.sparsity.values():
        assert promise.pattern == pattern and pattern.holds(promise.mask) and promise.sparsity == 0.5


def test_earlier_masks_count() -> None:
    checked = check_pass(
        Wanda(sparsity=0.5, layers=("0",)),
        chain(),
        (batches(16)[0],),
        calibration=batches(16),
        prepare=[MaskWeights(sparsity=0.25)],
    )
    before, after = (program.sparsity["0.weight"].mask for program in (checked.before, checked.after))
    # A row that had lost more than half already loses nothing more.
    assert not bool((after & ~before).any())
    assert torch.equal(after.sum(1), before.sum(1).clamp(max=8))
    assert torch.equal(checked.after.sparsity["2.weight"].mask, checked.before.sparsity["2.weight"].mask)


def test_convolutions_are_scored_by_what_lies_under_their_kernels() -> None:
    x = values(4, 3, 6, 6) * torch.logspace(-1, 1, 6)  # the last columns are large
    model = settled(nn.Conv2d(3, 4, 3, padding=1))
    checked = check_pass(Wanda(sparsity=0.5), model, (x,), calibration=[x])
    weight = model[0].weight.detach()  # type: ignore[index, union-attr, operator]
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    mask = checked.after.tensor("0.weight_mask")
    assert mask.shape == weight.shape
    norms = torch.stack(
        [
            padded[:, :, row : row + 6, column : column + 6].square().sum((0, 2, 3)).sqrt()
            for row in range(3)
            for column in range(3)
        ],
        1,
    ).reshape(3, 3, 3)
    scores = weight.abs() * norms
    for row, kept in zip(scores, mask, strict=True):
        # 27 inputs, of which half, rounded down, go
        assert int(kept.sum()) == 14 and row[kept].min() > row[~kept].max()


def test_leaves_convolutions_with_groups_alone() -> None:
    x = values(2, 4, 6, 6)
    check_pass(
        Wanda(sparsity=0.5),
        settled(nn.Conv2d(4, 4, 3, groups=4)),
        (x,),
        calibration=[x],
        unchanged=True,
        remarks=["its inputs are divided into 4 groups"],
    )


def test_mistakes() -> None:
    program = trace(chain(), (batches(16)[0],))
    with pytest.raises(CalibrationError, match="needs calibration data"):
        PassManager([Wanda(sparsity=0.5)]).run(program, PassContext())
    refuse_other_levels(Wanda(sparsity=0.5))


@pytest.mark.parametrize("text", ["wanda", "wanda{sparsity=-0.1}", "wanda{pattern=2:4,sparsity=0.3}"])
def test_options_that_cannot_be(text: str) -> None:
    with pytest.raises(PassOptionError, match="Option 'sparsity'"):
        parse_pass(text)
