"""One sweep over a weight's columns that prunes, rounds, or both, and makes up for the error as it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sqcompile.quantization.lookup import encode, lookup
from sqcompile.sparsity import Pattern

Chooser = Callable[[Tensor, Tensor | None], Tensor]
"""Takes scores of some columns and the mask in force there, both [O, C]; returns the mask, True where kept."""


@dataclass(frozen=True)
class Grid:
    """The values that a weight may take: (q - zero_point) · scale for qmin ≤ q ≤ qmax, or entry · scale.

    Shapes: scale and zero_point [O, G], where G groups of `group_size` columns make up K (the last may be
    shorter); G = 1 and group_size = K for one scale a row.
    """

    scale: Tensor
    zero_point: Tensor
    group_size: int
    qmin: int
    qmax: int
    table: Tensor | None = None

    def round(self, column: Tensor, index: int) -> Tensor:
        """Return the nearest value for each weight of a column, [O]."""
        group = index // self.group_size
        scale, zero_point = self.scale[:, group], self.zero_point[:, group]
        if self.table is not None:
            return lookup(encode(column / scale, self.table), self.table) * scale
        # As `affine.quantize` does, so that its codes are these.
        codes = (column / scale).round_().add_(zero_point).clamp_(self.qmin, self.qmax)
        return codes.sub_(zero_point).mul_(scale)


@dataclass(frozen=True)
class Swept:
    """What a sweep returns.

    Attributes:
        weight: The new weight [O, K]; zero where pruned, on the grid where rounded.
        mask: True where kept, [O, K]; None if nothing was pruned.
        error: Estimated output error, Σ over outputs of the mean square.
    """

    weight: Tensor
    mask: Tensor | None
    error: float


def sweep(
    weight: Tensor,
    factor: Tensor,
    *,
    grid: Grid | None = None,
    choose: Chooser | None = None,
    kept: Tensor | None = None,
    order: Tensor | None = None,
    step: int = 128,
    block: int = 128,
) -> Swept:
    """Prune and round a weight column by column; columns still to come make up for each column's error.

    For column k with error e_k = (w_k - ŵ_k) / U_kk, all later columns j change by -e_k U_kj. Changes
    within a block of columns are made at once, those behind it when the block is done.

    Args:
        weight: The weight [O, K].
        factor: U of `inverse_factor`, [K, K]; of the permuted Hessian if an order is given.
        grid: The values to round to; None leaves what is kept in floating point.
        choose: Chooses what to keep of `step` columns at a time, by the scores (w_k / U_kk)²; None prunes
            nothing.
        kept: Mask that is in force, [O, K]: what it removed stays removed.
        order: The order in which columns are treated, [K]; None is their own.
        step: Columns that are chosen together: a multiple of the pattern's columns, a divisor of `block`.
        block: Columns whose changes are made at once.

    Source: Frantar et al. 2023, arXiv 2210.17323, algorithm 1; Frantar and Alistarh 2023, arXiv
    2301.00774, algorithm 1, which prunes and rounds in one sweep.
    """
    # One column a row: that is how they are read and written.
    columns = weight.detach().float().T.contiguous()
    masks = None if kept is None else kept.T.contiguous()
    if order is not None:
        columns = columns[order]
        masks = None if masks is None else masks[order]
    if choose is not None and masks is None:
        masks = torch.ones_like(columns, dtype=torch.bool)
    places = range(columns.shape[0]) if order is None else order.tolist()
    diagonal = factor.diagonal()
    error = 0.0
    for start in range(0, columns.shape[0], block):
        end = min(start + block, columns.shape[0])
        local = factor[start:end, start:end]
        errors = torch.empty_like(columns[start:end])
        for k in range(start, end):
            if choose is not None and masks is not None and (k - start) % step == 0:
                stop = min(k + step, end)
                scores = (columns[k:stop] / diagonal[k:stop, None]).square()
                chosen = choose(scores.T, None if kept is None else masks[k:stop].T)
                masks[k:stop] &= chosen.T
            column = columns[k]
            value = column if grid is None else grid.round(column, places[k])
            if masks is not None:
                value = value * masks[k]
            delta = (column - value) / diagonal[k]
            errors[k - start] = delta
            columns[k] = value
            if k + 1 < end:
                columns[k + 1 : end].addr_(local[k - start, k + 1 - start :], delta, alpha=-1)
        error += float(errors.square().sum())
        if end < columns.shape[0]:
            columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    if order is not None:
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        columns = columns[back]
        masks = None if masks is None else masks[back]
    result = columns.T.contiguous()
    return Swept(result, None if masks is None else masks.T.contiguous(), error)


def chooser(pattern: Pattern, sparsity: float) -> Chooser:
    """Return a chooser that removes the least scores of the columns that it is given, by a pattern."""

    def choose(scores: Tensor, kept: Tensor | None) -> Tensor:
        return pattern.mask(scores, sparsity, kept)

    return choose
