"""Rounding a layer's weight to a format, or rounding and pruning it, so that its outputs change least."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sqcompile.quantization.affine import Search
from sqcompile.quantization.format import Format, PerChannel, PerGroup, PerTensor
from sqcompile.quantization.stored import Decoding, fit_decoding
from sqcompile.second_order.hessian import Hessian, inverse_factor
from sqcompile.second_order.least_squares import target
from sqcompile.second_order.sweep import Grid, chooser, sweep
from sqcompile.sparsity import Pattern, Sparsity


@dataclass(frozen=True)
class Rounded:
    """A weight on the grid of its format.

    Attributes:
        weight: The new weight [O, K].
        sparsity: What the sweep has pruned; None if nothing was to be.
        decoding: What its codes are decoded with.
        damping: What the Hessian took to be inverted.
    """

    weight: Tensor
    sparsity: Sparsity | None
    decoding: Decoding
    damping: float


def grid_obstacle(format: Format) -> str | None:
    """Say why a sweep over columns cannot round to a format, or return None."""
    granularity = format.granularity
    if isinstance(granularity, PerTensor) or granularity == PerChannel(0):
        return None
    if isinstance(granularity, PerGroup) and granularity.axis in (-1, 1):
        return None
    return f"is rounded to nearest: no sweep has a scale {granularity}"


def round_weight(
    weight: Tensor,
    hessian: Hessian,
    format: Format,
    *,
    search: Search = "mse",
    act_order: bool = True,
    damping: float = 0.01,
    sparsity: float | None = None,
    pattern: Pattern | None = None,
    kept: Tensor | None = None,
    where: str = "",
) -> Rounded:
    """Round a weight in one sweep over its columns, which may prune as well.

    Scales and tables are fitted to the weight as it was, so that columns may be treated in any order and yet
    keep their groups.

    Args:
        weight: The weight [O, K]. What it should have been for the inputs it gets now, if the Hessian knows
            those of the dense model, is computed here.
        hessian: Of its inputs.
        format: Its format, one without a `grid_obstacle`.
        search: Of scales.
        act_order: Treat columns with large inputs first; not where the sweep prunes, in whose patterns the
            columns are neighbours.
        damping: What is added to the Hessian's diagonal, as a share of its mean; more if it is singular.
        sparsity: Fraction of the weight to zero; None prunes nothing, or what an N:M pattern says.
        pattern: Pattern of the zeros; None: unstructured.
        kept: Mask that is in force, [O, K].
        where: The layer, for errors.

    Source: Frantar et al. 2023, arXiv 2210.17323, algorithm 1; Frantar and Alistarh 2023, arXiv 2301.00774.

    Raises:
        CalibrationError: If no damping makes the Hessian regular.
        InputError: If the weight is not finite.
    """
    pattern = Pattern() if pattern is None else pattern
    prunes = sparsity is not None or pattern.m > 0
    wanted = target(weight, hessian)
    decoding = fit_decoding(wanted, format, search, hessian.diagonal)
    order, matrix = None, hessian.matrix
    if act_order and not prunes:
        order = hessian.diagonal.argsort(descending=True, stable=True)
        matrix = matrix[order][:, order]
    factor, took = inverse_factor(matrix, damping, where)
    step = pattern.m or max(16, pattern.columns)
    swept = sweep(
        wanted,
        factor,
        grid=_grid(decoding, format, weight.shape[1]),
        choose=chooser(pattern, sparsity or 0.0) if prunes else None,
        kept=kept,
        order=order,
        step=step,
        block=128 // step * step or step,
    )
    zeros = Sparsity(swept.mask, pattern) if prunes and swept.mask is not None else None
    return Rounded(swept.weight, zeros, decoding, took)


def _grid(decoding: Decoding, format: Format, depth: int) -> Grid:
    group_size = format.granularity.size if isinstance(format.granularity, PerGroup) else depth
    scale = decoding.scale
    rows = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    shifts = decoding.zero_point.reshape(rows.shape)
    return Grid(rows.float(), shifts.float(), group_size, format.qmin, format.qmax, decoding.table)
