from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sqcompile import trace
from sqcompile.channels import find_groups
from sqcompile.errors import InputError
from sqcompile.regularization import (
    L1,
    GroupLasso,
    Penalty,
    Units,
    proximal_steps,
    shrink_factor,
    soft_threshold,
)

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def hidden_units(module: nn.Module) -> Units:
    program = trace(module, (X,))
    (group,) = find_groups(program)
    units = Units.of(program, group)
    assert isinstance(units, Units)
    return units


def minimize(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Find the least value of a convex function by brute force: the definition of a proximal operator."""
    x = start.clone().double().requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(x)
        value.backward()
        return value

    optimizer.step(closure)
    return x.detach()


def test_soft_threshold() -> None:
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0])
    assert soft_threshold(x, 1.0).tolist() == [-2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert torch.equal(soft_threshold(x, 0.0), x)
    v = torch.tensor([2.0, -1.5, 0.75])  # beyond the threshold the objective is smooth, and the minimum plain
    found = minimize(lambda w: 0.5 * (w - v).square().sum() + 0.5 * w.abs().sum(), v)
    torch.testing.assert_close(soft_threshold(v, 0.5).double(), found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("amount", [0.5, 3.0])
def test_shrinking_a_group_minimizes_its_objective(amount: float) -> None:
    v = torch.tensor([2.0, -1.0, 2.0])  # norm 3
    shrunk = v * shrink_factor(v.norm(), torch.tensor(amount))
    if amount < 3:
        found = minimize(lambda w: 0.5 * (w - v).square().sum() + amount * w.norm(), v)
        torch.testing.assert_close(shrunk.double(), found, rtol=0, atol=1e-5)
    else:
        assert not shrunk.any(), "a norm of at most the amount becomes zero as a whole"
    assert shrink_factor(torch.zeros(1), torch.ones(1)).item() == 0


def test_values_are_the_sums_that_they_say() -> None:
    module = model()
    weight = module[2].weight
    assert float(L1(module, ["2.weight"], 0.5).value()) == pytest.approx(0.5 * float(weight.abs().sum()))
    lasso = GroupLasso(module, [hidden_units(module)], 0.5)
    expected = 0.5 * math.sqrt(2) * float(weight.norm(dim=0).sum())  # two outputs read each neuron
    assert float(lasso.value()) == pytest.approx(expected)
    lasso.value().backward()
    assert module[0].weight.grad is None, "what makes a unit is not penalized"
    torch.testing.assert_close(weight.grad, 0.5 * math.sqrt(2) * (weight / weight.norm(dim=0)).detach())


def test_the_gradient_of_a_unit_that_is_zero_is_finite() -> None:
    module = model()
    with torch.no_grad():
        module[2].weight[:, 1] = 0
    GroupLasso(module, [hidden_units(module)], 1.0).value().backward()
    assert module[2].weight.grad.isfinite().all() and not module[2].weight.grad[:, 1].any()


def test_a_step_is_the_proximal_operator() -> None:
    module = model()
    before = module[2].weight.detach().clone()
    L1(module, ["2.weight"], 2.0).step(lambda parameter: 0.05)
    assert torch.equal(module[2].weight, soft_threshold(before, 0.1))
    before = module[2].weight.detach().clone()
    GroupLasso(module, [hidden_units(module)], 2.0).step(lambda parameter: 0.05)
    factor = (1 - 0.1 * math.sqrt(2) / before.norm(dim=0)).clamp(min=0)
    torch.testing.assert_close(module[2].weight.detach(), before * factor)


def steps_of(penalty: Penalty, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    with proximal_steps(penalty):
        optimizer.zero_grad()
        module(X).square().mean().backward()
        optimizer.step()


def test_proximal_steps_follow_any_optimizer_of_the_module() -> None:
    module, twin, other = model(), model(), model()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    steps_of(L1(module, ["0.weight"], 0.5), module, optimizer)
    plain = torch.optim.SGD(twin.parameters(), 0.1)
    twin(X).square().mean().backward()
    plain.step()
    assert torch.equal(module[0].weight, soft_threshold(twin[0].weight, 0.05))
    assert torch.equal(module[2].weight, twin[2].weight)
    steps_of(L1(other, ["0.weight"], 100.0), twin, plain)
    assert torch.equal(other[0].weight, model()[0].weight), "another module's optimizer"
    optimizer.step()
    assert module[0].weight.any()
    before = module[0].weight.detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(module[0].weight, before), "after the end there are no more steps"


def test_a_parameter_that_the_optimizer_does_not_have_stays() -> None:
    module = model()
    units = hidden_units(module)
    for penalty in (L1(module, ["2.weight"], 10.0), GroupLasso(module, [units], 10.0)):
        steps_of(penalty, module, torch.optim.SGD(module[0].parameters(), 0.1))
        assert torch.equal(module[2].weight, model()[2].weight)


def test_lasso_recovers_which_inputs_count() -> None:
    """Least squares with orthonormal inputs, whose lasso has a closed form: the thresholded solution."""
    inputs = torch.linalg.qr(torch.randn(32, 6, generator=torch.Generator().manual_seed(1)))[0] * math.sqrt(
        32
    )
    truth = torch.tensor([[1.0, 0.0, -0.5, 0.05, 0.0, 0.3]])
    module = nn.Linear(6, 1, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), 0.2)
    with proximal_steps(L1(module, ["weight"], 0.2)):
        for _ in range(100):
            optimizer.zero_grad()
            (0.5 * (module(inputs) - inputs @ truth.T).square().mean()).backward()
            optimizer.step()
    # The objective is ½‖w − truth‖² + 0.2 ‖w‖₁; after 100 contractions by 0.8 nothing of the start is left.
    torch.testing.assert_close(module.weight.detach(), soft_threshold(truth, 0.2), rtol=0, atol=1e-5)
    assert (module.weight == 0).sum() == 3, "exactly zero, and not only small"


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_refuses_strengths(strength: float) -> None:
    with pytest.raises(InputError, match="0 or more"):
        L1(model(), ["0.weight"], strength)
