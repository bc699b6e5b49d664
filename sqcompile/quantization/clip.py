"""Searches for the range that a histogram is best clipped to."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sqcompile.quantization.affine import dequantize, quantize, scale_from_range
from sqcompile.quantization.format import Format
from sqcompile.quantization.histogram import Histogram

# Ranges tried for each side: under 1 % apart, and every optimum met so far is flatter than that.
_CANDIDATES = 128

# The two sides of an affine range depend on each other little: more rounds changed nothing measurable.
_ROUNDS = 2

# The loss of each range low[i]..high[i]. Shapes: low [R], high [R], result [R].
Loss = Callable[[Tensor, Tensor], Tensor]


def least_loss(loss: Loss, low: float, high: float, symmetric: bool) -> tuple[float, float]:
    """Return the range within low..high, around zero, that has the least loss; the widest of equals.

    Symmetric: one search over magnitudes. Affine: each side in turn, the other held.
    """
    fractions = torch.arange(_CANDIDATES, 0, -1, dtype=torch.float64) / _CANDIDATES
    if symmetric:
        clips = max(-low, high) * fractions
        best = float(clips[_first_least(loss(-clips, clips))])
        return -best, best
    lows, highs = low * fractions, high * fractions
    for _ in range(_ROUNDS if low < 0 < high else 1):
        if high > 0:
            high = float(highs[_first_least(loss(torch.full_like(highs, low), highs))])
        if low < 0:
            low = float(lows[_first_least(loss(lows, torch.full_like(lows, high)))])
    return low, high


def squared_error(histogram: Histogram, format: Format) -> Loss:
    """Return the loss "squared quantization error" of the counted values.

    A bin counts as its middle: with over a thousand bins to a few hundred codes, what that gets wrong is
    the same for every range.
    """
    used = histogram.counts.nonzero()[:, 0]
    values = histogram.centers()[used].float()
    counts = histogram.counts[used].double()

    def loss(lows: Tensor, highs: Tensor) -> Tensor:
        scale, zero_point = scale_from_range(lows, highs, format)
        rows = values.expand(lows.numel(), -1)
        codes = quantize(rows, scale, zero_point, 0, None, format.qmin, format.qmax, format.storage_dtype)
        return dequantize(codes, scale, zero_point, 0, None).sub_(rows).double().square_() @ counts

    return loss


def divergence(histogram: Histogram, format: Format) -> Loss:
    """Return the loss "Kullback-Leibler divergence" of the values before and after quantization.

    The reference is the histogram inside the range, with the counts outside added to its end bins; the
    candidate is the same histogram (without them) at the format's number of levels, each spread evenly
    over those of its bins that the reference fills. A level without counts still gets a ten-thousandth of
    one, since outliers moved to the end of a sparse tail would else forbid every clip. Symmetric formats
    compare magnitudes; affine formats the two-sided histogram. A range of fewer bins than levels cannot be
    judged and loses to every other. The bin of zero takes its neighbour's count: zero, often the most
    frequent value by far (ReLU), is represented exactly in any range and would outweigh all the rest.

    Source: Migacz, "8-bit inference with TensorRT", GTC 2017; the bin of zero as in NVIDIA's
    pytorch-quantization, levels without counts as in MXNet.
    """
    counts = (histogram.magnitudes() if format.symmetric else histogram.counts).double()
    zero = 0 if format.symmetric else histogram.bins
    counts[zero] = counts[zero + 1]
    levels = format.qmax - (format.middle if format.symmetric else format.qmin) + 1

    def loss(lows: Tensor, highs: Tensor) -> Tensor:
        starts = zero if format.symmetric else (lows / histogram.width).floor() + zero
        ends = (highs / histogram.width).ceil() + zero
        bounds = torch.broadcast_tensors(torch.as_tensor(starts, dtype=torch.float64), ends)
        windows = zip(*(bound.long().tolist() for bound in bounds), strict=True)
        return torch.tensor([_divergence(counts, start, end, levels) for start, end in windows])

    return loss


def _divergence(counts: Tensor, start: int, end: int, levels: int) -> float:
    bins = end - start
    if bins < levels:
        return math.inf
    inside = counts[start:end]
    reference = inside.clone()
    reference[0] += counts[:start].sum()
    reference[-1] += counts[end:].sum()
    filled = reference > 0
    level = torch.arange(bins) * levels // bins
    mass = torch.bincount(level, weights=inside, minlength=levels)
    share = mass / torch.bincount(level, weights=filled.double(), minlength=levels)
    p, q = reference[filled], share[level[filled]].clamp(min=1e-4)
    if not p.numel():
        return 0.0
    return float((p * (p / q).log()).sum() / p.sum() + (q.sum() / p.sum()).log())


def _first_least(losses: Tensor) -> int:
    """Return the first index of the least loss; `argmin` promises none of several."""
    return int((losses == losses.min()).nonzero()[0])
