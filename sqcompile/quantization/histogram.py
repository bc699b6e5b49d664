"""A histogram that grows with its data, without moving a single count out of place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Values are binned in pieces of this many, so that the temporaries stay below 16 MB.
_PIECE = 1 << 20

# Bins start this fine: only denormal numbers share the two around zero.
_LEAST_EXPONENT = -126


class Histogram:
    """Counts of values in bins whose width is a power of two and whose edges include zero.

    Wider data doubles the width until it fits: two neighbouring bins become one, so every count stays
    exact, and the result is that of one histogram over all the data, in any order and any split into
    batches. Merging two histograms is exact for the same reason. Between `bins` / 2 and `bins` bins
    lie on either side of zero up to the largest magnitude.

    Shapes: counts [2 * bins]; entry i counts the values in [i - bins, i - bins + 1) * width.

    Args:
        bins: Bins for each sign, a power of two.
    """

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.exponent = _LEAST_EXPONENT
        self.counts = torch.zeros(2 * bins, dtype=torch.int64)

    @property
    def width(self) -> float:
        """The width of a bin, in units of the data."""
        return math.ldexp(1.0, self.exponent)

    def add(self, x: Tensor, largest: float) -> None:
        """Count the values of `x`, all finite and at most `largest` in magnitude. Shapes: x [...]."""
        # largest < 2**power, so it lies below bins * width.
        power = math.frexp(largest)[1] if largest > 0 else _LEAST_EXPONENT
        self._coarsen(max(self.exponent, power - self.bins.bit_length() + 1))
        for piece in x.detach().reshape(-1).split(_PIECE):
            self.counts += self._count(piece)

    def merge(self, other: Histogram) -> None:
        """Add the counts of `other`, which has as many bins."""
        finer = Histogram(other.bins)
        finer.exponent, finer.counts = other.exponent, other.counts
        self._coarsen(max(self.exponent, other.exponent))
        finer._coarsen(self.exponent)
        self.counts += finer.counts

    def magnitudes(self) -> Tensor:
        """Return the counts by magnitude: entry i for [i, i + 1) * width. Shapes: result [bins]."""
        return self.counts[self.bins :] + self.counts[: self.bins].flip(0)

    def centers(self) -> Tensor:
        """Return the middle of each bin. Shapes: result [2 * bins], float64."""
        return (torch.arange(-self.bins, self.bins, dtype=torch.float64) + 0.5) * self.width

    def _count(self, x: Tensor) -> Tensor:
        # Float64: in float32 a tiny negative number over a wide bin would underflow to zero, and change sides.
        index = x.to(torch.float64, copy=True).mul_(math.ldexp(1.0, -self.exponent)).floor_().to(torch.int32)
        return torch.bincount(index.add_(self.bins), minlength=2 * self.bins).cpu()

    def _coarsen(self, exponent: int) -> None:
        if exponent == self.exponent:
            return
        # After log2(bins) doublings one bin is left below zero and one above; more change nothing.
        merged = 1 << min(exponent - self.exponent, self.bins.bit_length() - 1)
        inner = self.counts.view(-1, merged).sum(1)
        half = inner.numel() // 2
        self.counts = torch.zeros_like(self.counts)
        self.counts[self.bins - half : self.bins + half] = inner
        self.exponent = exponent


def quantile(counts: Tensor, fraction: float) -> float:
    """Return the position, in bins, below which `fraction` of the counts lie, linear within its bin.

    Shapes: counts [bins], not all zero.
    """
    target = fraction * float(counts.sum())
    below = counts.cumsum(0)
    bin = int(torch.searchsorted(below.double(), target))
    bin = min(bin, counts.numel() - 1)
    inside = float(counts[bin])
    return bin + (target - (float(below[bin]) - inside)) / inside if inside else float(bin)
