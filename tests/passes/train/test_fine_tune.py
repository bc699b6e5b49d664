from __future__ import annotations

import pytest
import torch
from support.passes import refuse_other_levels
from torch import nn

import sqcompile
from sqcompile import Pass, PassContext, trace
from sqcompile.errors import PassOptionError, TrainingError
from sqcompile.passes import FineTune, MaskWeights
from sqcompile.pipeline import PassManager
from sqcompile.testing import check_pass

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = X @ torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(8, 4)


def fit(module: nn.Module) -> float:
    """Least squares by gradient descent; returns the last loss."""
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05, weight_decay=0.01)
    loss = torch.zeros(())
    for _ in range(150):
        loss = (module(X) - Y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def nothing(module: nn.Module) -> None:
    """Train nothing."""


def test_trains_what_is_left_after_pruning() -> None:
    prune = MaskWeights(sparsity=0.25)
    checked = check_pass(
        FineTune(train=fit),
        model(),
        (X,),
        prepare=[prune],
        idempotent=False,
        expected="""
            program (level aten)
              input  %input_1: f32[64, 8]
              tensor @weight_mask: bool[4, 8]
              tensor @weight: f32[4, 8]
              tensor @bias: f32[4]
              %mask: f32[4, 8] = mask(@weight, @weight_mask)
              %linear: f32[64, 4] = linear(%input_1, %mask, @bias)
              return output=%linear
        """,
    )
    assert checked.record.changes == 2

    def loss(program: sqcompile.Program) -> float:
        return float((program(X) - Y).detach().square().mean())

    assert checked.record.facts["result"] == pytest.approx(loss(checked.after), rel=0.05)  # one step earlier
    assert loss(checked.after) < 0.6 * loss(checked.before), "a quarter of the weights is missing"


@pytest.mark.parametrize("freeze", [False, True])
def test_freeze_norms(freeze: bool) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)).eval()
    program = trace(original, (X,))
    item = FineTune(train=lambda module: fit(module.train()), freeze_norms=freeze)
    PassManager([item]).run(program, PassContext())
    assert torch.equal(program.tensor("1.running_mean"), original[1].running_mean) == freeze
    assert not torch.equal(program.tensor("1.weight"), original[1].weight)


def test_text_names_the_function() -> None:
    item = FineTune(train=fit)
    assert str(item) == f"fine-tune{{train={__name__}:fit}}"
    assert Pass.parse(str(item)) == item
    assert Pass.parse("fine-tune{train=tuning.py:fit}") == FineTune(train="tuning.py:fit")  # type: ignore[arg-type]


def test_the_report_shows_the_result_and_the_model_is_as_it_was() -> None:
    original = model()
    weight = original.weight.detach().clone()
    compiled = sqcompile.compile(original, [FineTune(train=fit)], example_inputs=(X,), backend="reference")
    assert compiled.report.passes[0].facts["result"] < 0.1
    assert torch.equal(original.weight, weight)


def test_refuses_other_levels() -> None:
    refuse_other_levels(FineTune(train=fit))


def test_refuses_to_go_without_a_function() -> None:
    with pytest.raises(PassOptionError, match="'train'"):
        FineTune()
    with pytest.raises(PassOptionError, match="'train'"):
        Pass.parse("fine-tune{train=tuning.py}")


def test_an_error_names_the_pass() -> None:
    with pytest.raises(TrainingError, match="changed no parameter") as caught:
        sqcompile.compile(model(), [FineTune(train=nothing)], example_inputs=(X,), backend="reference")
    assert "pass fine-tune" in str(caught.value)
