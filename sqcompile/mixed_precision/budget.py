"""Choosing one candidate for each layer under a budget: an integer program, solved exactly.

    minimize   Σ_l Σ_c loss[l, c] · x[l, c]
    subject to Σ_l Σ_c cost[l, c] · x[l, c] ≤ budget,   Σ_c x[l, c] = 1 for each layer l,   x ∈ {0, 1}

It is the multiple-choice knapsack problem; losses of layers add up, which is an assumption that the
measured loss of the whole choice puts to the test.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sqcompile.errors import InputError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """A choice.

    Attributes:
        choice: Index of the candidate of each layer, [L].
        cost: What it costs.
        loss: The sum of its losses.
    """

    choice: NDArray[np.int64]
    cost: float
    loss: float


def allocate(losses: Floats, costs: Floats, budget: float) -> Point | None:
    """Return the choice of least loss whose cost is within the budget, or None if none is.

    A candidate that a layer cannot take has an infinite loss.

    Args:
        losses: [L, C]; each layer has one finite entry at least.
        costs: [L, C].
        budget: Most that the choice may cost.
    """
    return _solve(losses, costs, budget)


def allocate_within(losses: Floats, costs: Floats, loss: float) -> Point | None:
    """Return the cheapest choice whose losses sum up to no more than `loss`, or None if none does."""
    possible = np.isfinite(losses)
    found = _solve(np.where(possible, costs, np.inf), np.where(possible, losses, 0.0), loss)
    return None if found is None else Point(found.choice, cost=found.loss, loss=found.cost)


def frontier(losses: Floats, costs: Floats, points: int = 17) -> list[Point]:
    """Return the best choices at evenly spaced costs, from the cheapest there is to the one of least loss.

    Choices that cost more than another and are no better are left out; cheapest first.
    """
    possible = np.isfinite(losses)
    low = float(np.where(possible, costs, np.inf).min(1).sum())
    best = losses.argmin(1)
    high = float(costs[np.arange(len(costs)), best].sum())
    found: list[Point] = []
    for budget in np.linspace(low, max(low, high), points):
        # Against rounding of the sum: the cheapest choice is within its own cost.
        point = allocate(losses, costs, float(budget) * (1 + 1e-12))
        if point is not None and (not found or point.loss < found[-1].loss):
            found.append(point)
    return found


def _solve(objective: Floats, limited: Floats, most: float) -> Point | None:
    """Minimize one sum with the other at `most`; entries of infinite objective are never taken."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array, vstack
    except ImportError as error:
        raise InputError(
            "Choosing formats under a budget needs SciPy.",
            seen=str(error),
            next_step="pip install sqcompile[llm]",
        ) from error
    layers, candidates = objective.shape
    possible = np.isfinite(objective)
    # To a common scale: the solver's tolerances are absolute.
    scale = float(np.abs(objective[possible]).max(initial=0.0)) or 1.0
    unit = float(np.abs(limited).max(initial=0.0)) or 1.0
    once = csr_array(
        (np.ones(layers * candidates), np.arange(layers * candidates), np.arange(layers + 1) * candidates)
    )
    rows = vstack([once, csr_array(limited.reshape(1, -1) / unit)])
    with _no_output():
        result = milp(
            np.where(possible, objective, 0.0).ravel() / scale,
            integrality=np.ones(layers * candidates),
            bounds=Bounds(0, possible.astype(float).ravel()),
            constraints=LinearConstraint(
                rows, np.append(np.ones(layers), -np.inf), np.append(np.ones(layers), most / unit)
            ),
            options={"mip_rel_gap": 0.0},
        )
    if result.x is None:
        return None
    choice = result.x.reshape(layers, candidates).argmax(1)
    picked = np.arange(layers), choice
    return Point(choice, cost=float(limited[picked].sum()), loss=float(objective[picked].sum()))


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    """Keep what the solver prints in spite of all off the standard output, which may be somebody's JSON.

    It prints through C, whose buffer has to be emptied before the output is given back.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if libc is None:
        yield
        return
    sys.stdout.flush()
    libc.fflush(None)
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
