"""Codes that are indices into a table: encoding, decoding, and fitting table and scale.

Scales cover groups of values as those of affine codes do; `sqcompile.quantization.mappings` has the tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sqcompile.quantization import affine
from sqcompile.quantization.affine import Search
from sqcompile.quantization.format import Format
from sqcompile.quantization.mappings import LARGEST_ENTRY, Codebook, Mapping

# Of normalized weights, for choosing a table: four to an entry.
_BINS = 1024

# Steps of a search of scales, half of those for affine codes: each looks every value up.
_SCALES = 32


@dataclass(frozen=True)
class Fitted:
    """A table and the scales that belong to it.

    Attributes:
        mapping: The mapping with its parameters chosen.
        table: Value of each code in steps of the scale, int8 [2**bits].
        scale: float32, as `format.granularity.scale_shape`.
    """

    mapping: Mapping
    table: Tensor
    scale: Tensor


def lookup(codes: Tensor, table: Tensor) -> Tensor:
    """Return the entry of each code. Shapes: codes [...], table [2**bits]; result as codes."""
    return table[codes.long()]


def encode(steps: Tensor, table: Tensor) -> Tensor:
    """Return the code of the nearest entry, the lower of two equally near.

    Args:
        steps: Values divided by their scale, [...].
        table: Ascending, [2**bits].

    Returns:
        uint8 codes, [...].
    """
    exact = table.float()
    return torch.bucketize(steps, (exact[1:] + exact[:-1]) / 2).to(torch.uint8)


def nearest_entries(table: Tensor) -> Tensor:
    """Return what 8-bit codes with 128 in their middle become where only a table's entries are allowed.

    Values at run time are quantized to 8 bits and looked up in this: the nearest entry, the lower of two equally near,
    as an 8-bit code itself. So integer kernels take them as they take all others.

    Shapes: table ascending, int8 [2**bits]; result uint8 [256].
    """
    middle = LARGEST_ENTRY + 1
    steps = torch.arange(-middle, middle, device=table.device)
    return (lookup(encode(steps, table), table).int() + middle).to(torch.uint8)


def fake_lookup(
    x: Tensor,
    scale: Tensor,
    table: Tensor,
    axis: int | None,
    group_size: int | None,
    whole_steps: bool = False,
) -> Tensor:
    """Return values as their codes restore them, with gradients to them and to their scales.

    With `whole_steps` the entry nearest to the value's 8-bit code is taken, as `nearest_entries` has it.

    To x, straight through between the ends of the table and zero outside. To the scale, with v = x / scale: entry - v
    inside, else the nearer end, as for linear codes (`affine.fake_quantize_gradient`).

    Shapes: x [...]; scale as `scale_shape` says; table ascending, int8 [2**bits]; result as x.
    Source: Esser et al. 2020 (LSQ), eq. 3 and 5, with the nearest entry in place of the nearest integer.
    """
    result: Tensor = _FakeLookup.apply(x, scale, table, axis, group_size, whole_steps)  # type: ignore[no-untyped-call]
    return result


class _FakeLookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        table: Tensor,
        axis: int | None,
        group_size: int | None,
        whole_steps: bool,
    ) -> Tensor:
        steps = affine.divide(x, scale, axis, group_size)
        entries = lookup(encode(steps.round() if whole_steps else steps, table), table)
        ctx.save_for_backward(steps, entries, table)
        ctx.pair = axis, group_size
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return affine.dequantize(entries, scale, zero, axis, group_size).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        steps, entries, table = ctx.saved_tensors
        inside = (steps >= table[0]) & (steps <= table[-1])
        slope = torch.where(inside, entries - steps, entries.to(steps.dtype))
        axis, group_size = ctx.pair
        to_scale = affine.reduce_blocks(slope * gradient.float(), axis, group_size, torch.sum)
        return gradient * inside, to_scale, None, None, None, None


def fit(
    weight: Tensor, format: Format, search: Search = "minmax", importance: Tensor | None = None
) -> Fitted:
    """Choose table and scales for a tensor.

    Open parameters of the mapping, and a codebook, are chosen for the whole tensor by the least squared
    error, each value weighted by its importance. Scales: `minmax` covers every value; `mse` has the least
    squared error group by group, among candidates down to a fifth of that.

    Args:
        weight: The tensor.
        format: Its format; the mapping is not linear.
        search: Of scales; `half-quadratic` is for linear mappings, and means `mse` here.
        importance: Weight of each value's squared error, broadcast to `weight`: of the columns of a linear
            layer, the diagonal of its Hessian; None weighs all alike.

    Raises:
        InputError: If a value is NaN or infinite.
        FormatError: If the mapping has no table of so many bits.
    """
    weight = weight.detach().float()
    errors = torch.ones_like(weight) if importance is None else importance.float().expand_as(weight)
    # As eight bits would have it: a table has their entries. Zero points are 0.
    widest, _ = affine.scale_for_tensor(weight, Format(granularity=format.granularity, narrow=True))
    mapping, scale = _choose(weight, widest, format, errors)
    if search != "minmax":
        scale, error = _best_scale(weight, widest, _table(mapping, format, weight), format, errors)
        if mapping != format.mapping:  # the table was chosen for other scales
            other, _ = _choose(weight, scale, format, errors)
            other_scale, other_error = _best_scale(
                weight, widest, _table(other, format, weight), format, errors
            )
            if other_error < error:
                mapping, scale = other, other_scale
    return Fitted(mapping, _table(mapping, format, weight), scale)


def _table(mapping: Mapping, format: Format, beside: Tensor) -> Tensor:
    """Return a mapping's table where a tensor is."""
    return mapping.table(format.bits).to(beside.device)


def _choose(weight: Tensor, scale: Tensor, format: Format, errors: Tensor) -> tuple[Mapping, Tensor]:
    """Return the mapping whose table has the least error with these scales, and the scales that go with it.

    A fitted table is stretched to the whole range of entries, and its scales shrink alike.
    """
    candidates = format.mapping.candidates()
    fitted = isinstance(format.mapping, Codebook) and format.mapping.entries is None
    if len(candidates) == 1 and not fitted:
        return format.mapping, scale
    centers, counts = _histogram(weight, scale, format, errors)
    if fitted:
        means = _means(centers, counts, 1 << format.bits)
        stretch = LARGEST_ENTRY / max(abs(means).max(), 1.0)
        entries = tuple(int(mean) for mean in np.rint(means * stretch))
        return Codebook(entries), (scale / stretch).clamp(min=affine.SMALLEST_SCALE)

    def loss(mapping: Mapping) -> float:
        table = _table(mapping, format, centers)
        return float(((lookup(encode(centers, table), table) - centers).square() * counts).sum())

    return min(candidates, key=loss), scale


def _histogram(weight: Tensor, scale: Tensor, format: Format, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Return middles of bins over the range of entries, or of values if it is wider, and the weight of each."""
    axis, group_size = format.granularity.pair
    steps = affine.divide(weight, scale, axis, group_size)
    reach = max(LARGEST_ENTRY, float(steps.abs().max())) if steps.numel() else LARGEST_ENTRY
    # An error of a step is one of `scale` in the weight.
    squared = affine.divide(torch.ones_like(weight), 1 / scale.square(), axis, group_size)
    width = 2 * reach / _BINS
    bins = ((steps + reach) / width).long().clamp(max=_BINS - 1)
    counts = torch.bincount(bins.flatten(), weights=(errors * squared).double().flatten(), minlength=_BINS)
    centers = (torch.arange(_BINS, dtype=torch.float64, device=weight.device) + 0.5) * width - reach
    return centers, counts


def _means(centers: Tensor, counts: Tensor, size: int) -> NDArray[np.float64]:
    """Return the means, ascending and zero among them, that represent a histogram with the least squared error.

    Values on a line are split best into runs of neighbours, so dynamic programming over the bins finds the
    best of all tables: `least[z][j]` is the error of the first j bins with so many means, z of them zero.

    Source: Wang and Song 2011, "Ckmeans.1d.dp: optimal k-means clustering in one dimension by dynamic
    programming", R Journal 3(2); the run that zero represents is an addition.
    """
    x, c = centers.cpu().numpy(), counts.cpu().numpy()
    mass, first, second = (np.concatenate([[0.0], np.cumsum(c * x**power)]) for power in range(3))

    def between(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return sums[None, :] - sums[:, None]  # [i, j]: bins i to j

    masses, firsts, around_zero = between(mass), between(first), between(second)
    with np.errstate(invalid="ignore", divide="ignore"):
        around_mean = around_zero - np.where(masses > 0, firsts**2 / masses, 0.0)
    order = np.tri(len(x) + 1, dtype=bool).T  # a run may be empty, and ends no sooner than it starts
    around_mean = np.where(order, np.maximum(around_mean, 0.0), np.inf)
    around_zero = np.where(order, around_zero, np.inf)
    start = np.full(len(x) + 1, np.inf)
    start[0] = 0.0
    least = [start, np.full(len(x) + 1, np.inf)]
    choices = []
    for _ in range(size):
        plain, after_zero, zero = (
            before[:, None] + cost
            for before, cost in ((least[0], around_mean), (least[1], around_mean), (least[0], around_zero))
        )
        takes_zero = zero.min(0) < after_zero.min(0)
        choices.append(
            (plain.argmin(0), np.where(takes_zero, zero.argmin(0), after_zero.argmin(0)), takes_zero)
        )
        least = [plain.min(0), np.minimum(zero.min(0), after_zero.min(0))]
    means = []
    end, with_zero = len(x), True
    for from_plain, from_any, takes_zero in reversed(choices):
        begin = int((from_any if with_zero else from_plain)[end])
        if with_zero and takes_zero[end]:
            with_zero = False
            means.append(0.0)
        elif mass[end] > mass[begin]:
            means.append((first[end] - first[begin]) / (mass[end] - mass[begin]))
        else:
            means.append(0.0)  # a run of no values
        end = begin
    return np.sort(np.array(means))


def _best_scale(
    weight: Tensor, widest: Tensor, table: Tensor, format: Format, errors: Tensor
) -> tuple[Tensor, float]:
    """Return the scale of least error for each group, and the error of all."""
    candidates = ((widest * factor).clamp(min=affine.SMALLEST_SCALE) for factor in affine.shrinks(_SCALES))
    (best,), errors_left = affine.least_error(
        ((scale,) for scale in candidates),
        lambda scale: _squared_error(weight, scale, table, format, errors),
    )
    return best, float(errors_left.double().sum())


def _squared_error(weight: Tensor, scale: Tensor, table: Tensor, format: Format, errors: Tensor) -> Tensor:
    """Return the weighted squared error of each group, as the scale."""
    axis, group_size = format.granularity.pair
    codes = encode(affine.divide(weight, scale, axis, group_size), table)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    restored = affine.dequantize(lookup(codes, table), scale, zero, axis, group_size)
    return affine.reduce_blocks((restored - weight).square() * errors, axis, group_size, torch.sum)
