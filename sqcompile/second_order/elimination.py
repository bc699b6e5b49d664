"""What it costs to take inputs from layers whose other inputs make up for them, in the order of least cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sqcompile.second_order.hessian import Hessian

# Units are taken in at most so many rounds: one by one where they are few, so that of two that can stand for
# each other only one is cheap.
_ROUNDS = 128


@dataclass(frozen=True)
class Reader:
    """A layer, as one that reads units.

    Attributes:
        weight: Its weight, [O, K].
        hessian: H of its inputs, [K, K].
        unit: Of each input, the unit that it goes with; -1 where it stays, [K].
    """

    weight: Tensor
    hessian: Hessian
    unit: Tensor


def elimination_costs(readers: Sequence[Reader], count: int, damping: float = 1e-2) -> Tensor:
    """Return how much the mean squared error of the readers' outputs grows when each unit goes.

    Units go one after the other, the cheapest first, and each time all inputs that are left are refitted:
    taking inputs U costs tr(W_U (H⁻¹_UU)⁻¹ W_Uᵀ), after which what remains of H⁻¹ and W is their Schur
    complement. Costs never fall in the order of removal, so that they rank the units in it.

    Shapes: the result [count], float64.
    Source: Kurtić et al. 2023, arXiv 2302.04089, equations 2 to 4 (structured optimal brain surgeon).

    Args:
        readers: The layers that read the units.
        count: Number of units.
        damping: What is added to H's diagonal, as a share of its mean.
    """
    systems = [_System(reader, damping) for reader in readers]
    costs = torch.full((count,), torch.inf, dtype=torch.float64)
    left = torch.ones(count, dtype=torch.bool)
    at_once = max(1, count // _ROUNDS)
    highest = torch.zeros((), dtype=torch.float64)
    while bool(left.any()):
        now = torch.stack([system.costs(count) for system in systems]).sum(0)
        now[~left] = torch.inf
        chosen = torch.argsort(now, stable=True)[: min(at_once, int(left.sum()))]
        costs[chosen] = torch.maximum(now[chosen], highest)
        highest = costs[chosen].max()
        left[chosen] = False
        for system in systems:
            system.eliminate(chosen)
    return costs


class _System:
    """H⁻¹ and W of one reader, over the inputs that are left."""

    def __init__(self, reader: Reader, damping: float) -> None:
        matrix = reader.hessian.matrix.to(torch.float64)
        mean = float(matrix.diagonal().mean())
        matrix.diagonal().add_(damping * mean if mean > 0 else 1.0)
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
        weight = reader.weight.detach().to(torch.float64)
        # Only W's inner products count, so that K rows are enough.
        self._weight = torch.linalg.qr(weight, mode="r").R if weight.shape[0] > weight.shape[1] else weight
        self._unit = reader.unit

    def costs(self, count: int) -> Tensor:
        """Return what each unit costs; 0 for those that are gone or not read."""
        result = torch.zeros(count, dtype=torch.float64)
        order = torch.argsort(self._unit, stable=True)
        units, sizes = torch.unique_consecutive(self._unit[order], return_counts=True)
        starts = sizes.cumsum(0) - sizes
        for size in sizes.unique().tolist():
            chosen = (sizes == size) & (units >= 0)
            if not bool(chosen.any()):
                continue
            places = order[starts[chosen, None] + torch.arange(size)]
            blocks = self._inverse[places[:, :, None], places[:, None, :]]
            columns = self._weight[:, places].permute(1, 2, 0)
            solved = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), columns, upper=False)
            result[units[chosen]] = solved.square().sum((1, 2))
        return result

    def eliminate(self, units: Tensor) -> None:
        """Take the inputs of some units, and let the others make up for them."""
        gone = torch.isin(self._unit, units)
        if not bool(gone.any()):
            return
        rows = self._inverse[gone]
        factor = torch.linalg.cholesky(rows[:, gone])
        shares = torch.cholesky_solve(rows[:, ~gone], factor)
        self._weight = self._weight[:, ~gone] - self._weight[:, gone] @ shares
        self._inverse = self._inverse[~gone][:, ~gone] - rows[:, ~gone].T @ shares
        self._unit = self._unit[~gone]
