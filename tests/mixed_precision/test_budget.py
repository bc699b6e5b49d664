from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest

from sqcompile.mixed_precision import allocate, allocate_within, frontier


def table(seed: int, layers: int = 5, candidates: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Losses that fall and costs that rise with the candidate; some candidates are impossible."""
    random = np.random.default_rng(seed)
    losses = np.sort(random.gamma(0.3, 1.0, (layers, candidates)) * 1e-4)[:, ::-1].copy()
    costs = np.sort(random.integers(1, 2000, (layers, candidates)).astype(float)) * 1e5
    losses[random.random(losses.shape) < 0.2] = np.inf
    losses[:, -1] = np.where(np.isfinite(losses).any(1), losses[:, -1], 1e-6)
    return losses, costs


def by_trying_all(losses: np.ndarray, costs: np.ndarray) -> list[tuple[float, float]]:
    """Cost and loss of every possible choice."""
    layers = range(len(losses))
    return [
        (sum(costs[layer, c] for layer, c in zip(layers, choice, strict=True)), total)
        for choice in itertools.product(range(losses.shape[1]), repeat=len(losses))
        if np.isfinite(total := sum(losses[layer, c] for layer, c in zip(layers, choice, strict=True)))
    ]


@pytest.mark.parametrize("seed", range(12))
def test_is_exact(seed: int) -> None:
    losses, costs = table(seed)
    choices = by_trying_all(losses, costs)
    cheapest, dearest = min(choices)[0], max(choices)[0]
    for share in (0.0, 0.1, 0.5, 1.0):
        budget = cheapest + share * (dearest - cheapest)
        best = min(loss for cost, loss in choices if cost <= budget)
        point = allocate(losses, costs, budget)
        assert point is not None
        assert point.loss == pytest.approx(best, rel=1e-9) and point.cost <= budget * (1 + 1e-9)
        smallest = min(cost for cost, loss in choices if loss <= best * (1 + 1e-9))
        within = allocate_within(losses, costs, best * (1 + 1e-9))
        assert within is not None
        assert within.cost == pytest.approx(smallest, rel=1e-9) and within.loss <= best * (1 + 1e-6)


def test_says_that_nothing_is_within_the_budget() -> None:
    losses, costs = np.array([[1.0, 0.5]]), np.array([[4.0, 8.0]])
    assert allocate(losses, costs, 3.9) is None
    assert allocate_within(losses, costs, 0.4) is None


def test_the_frontier_falls() -> None:
    losses, costs = table(3, layers=12)
    points = frontier(losses, costs, points=30)
    assert len(points) > 5
    for cheaper, dearer in itertools.pairwise(points):
        assert cheaper.cost < dearer.cost and cheaper.loss > dearer.loss
    assert points[-1].loss == pytest.approx(losses.min(1).sum())


PRINTED = """
import numpy as np
from sqcompile.mixed_precision import frontier

random = np.random.default_rng(0)
for _ in range(6):
    losses = np.sort(random.gamma(0.3, 1, (43, 4)) * 1e-4)[:, ::-1].copy()
    frontier(losses, np.array([[3.1, 4.1, 5.1, 9.1]]) * random.integers(1, 9, (43, 1)) * 32768)
print("heard")
"""


def test_prints_nothing() -> None:
    """The solver prints a line on some problems, among them these; --json answers must not have it."""
    done = subprocess.run([sys.executable, "-c", PRINTED], capture_output=True, text=True, check=True)
    assert done.stdout == "heard\n"
