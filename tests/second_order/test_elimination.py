"""What taking units away costs, against least-squares fits of every possible next step."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sqcompile.second_order import Hessian, Reader, elimination_costs


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reader(x: Tensor, weight: Tensor, unit: list[int]) -> Reader:
    hessian = Hessian(x.shape[1])
    hessian.add(x)
    return Reader(weight, hessian, torch.tensor(unit))


def error_without(x: Tensor, weight: Tensor, gone: NDArray[np.bool_]) -> float:
    """Return the mean squared error of the outputs, summed over them, with the best weight for the rest."""
    inputs, outputs = x.double().numpy(), (x @ weight.T).double().numpy()
    rest = inputs[:, ~gone]
    fitted = rest @ np.linalg.lstsq(rest, outputs)[0] if rest.shape[1] else 0 * outputs
    return float(((outputs - fitted) ** 2).sum(1).mean())


def test_each_step_is_the_best_and_costs_what_a_refit_says() -> None:
    unit = [0, 1, 2, 0, 1, 2, -1, 3, 3]
    x = values(300, 9) @ (torch.eye(9) + 0.5 * values(9, 9, seed=1))
    weights = [values(4, 9, seed=2), values(20, 9, seed=3)]  # fewer outputs than inputs, and more
    costs = elimination_costs([reader(x, weight, unit) for weight in weights], 4, damping=1e-8).numpy()
    gone: list[int] = []
    before = 0.0
    highest = 0.0
    for _ in range(4):
        errors = {
            index: sum(error_without(x, weight, np.isin(unit, [*gone, index])) for weight in weights)
            for index in set(range(4)) - set(gone)
        }
        best = min(errors, key=errors.__getitem__)
        highest = max(highest, errors[best] - before)
        # float32 moments
        np.testing.assert_allclose(costs[best], highest, rtol=1e-3)
        gone.append(best)
        before = errors[best]


def test_of_two_alike_only_one_is_cheap() -> None:
    x = values(200, 4)
    x[:, 3] = x[:, 1]
    costs = elimination_costs([reader(x, torch.ones(1, 4), [0, 1, 2, 3])], 4, damping=1e-6)
    cheap = costs < 1e-3
    assert int(cheap.sum()) == 1
    assert bool(cheap[1] | cheap[3])


def test_many_units_go_in_rounds() -> None:
    x = values(900, 300)
    costs = elimination_costs([reader(x, values(5, 300, seed=1), list(range(300)))], 300)
    assert bool(torch.isfinite(costs).all())
    assert bool((costs > 0).all())


def test_inputs_that_were_never_active_cost_nothing() -> None:
    x = values(50, 3)
    x[:, 1] = 0
    costs = elimination_costs([reader(x, torch.ones(2, 3), [0, 1, 2])], 3)
    assert float(costs[1]) < 0.02 * float(costs[[0, 2]].min())
    silent = elimination_costs([reader(0 * x, torch.ones(2, 3), [0, 1, 2])], 3)
    assert bool(torch.isfinite(silent).all())
