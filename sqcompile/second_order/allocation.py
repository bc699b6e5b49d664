"""How many weights each layer can do without, where all together lose a given share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from sqcompile.layers import Layer
from sqcompile.pipeline.context import PassContext
from sqcompile.program import Program
from sqcompile.pruning import PrunableWeight
from sqcompile.second_order.hessian import Hessian
from sqcompile.second_order.layers import visit_layers

Allocation = Literal["uniform", "outliers", "sensitivity"]
"""How layers share the zeros; see `allocate`."""

# A score this many times the mean is an outlier: the middle of the values that the paper recommends.
_OUTLIER = 5.0
# Bins a decade, over so many decades below the largest score of a layer.
_BINS, _DECADES = 64, 16
_STEPS = 60


def allocate(
    program: Program,
    weights: Sequence[PrunableWeight],
    context: PassContext,
    *,
    by: Allocation,
    sparsity: float,
    spread: float,
    max_bytes: int,
) -> dict[str, float]:
    """Return the sparsity of each weight, by its name; of all together it is the one asked for.

    Scores are |w_ij| · √(mean x_j²), on the dense program's own data.

    - `outliers`: blocks with many scores above five times their mean keep more: the density of a block moves with its
      share of outliers, by at most `spread` around the mean.
    - `sensitivity`: the sum of what layers lose, each as a share of its output's power, is the least: one threshold
      for score² / Σ score² of all layers, each layer within `spread` of the mean.

    Source: Yin et al. 2023, arXiv 2310.05175, section 3.2 (outliers), with blocks counting by their size.

    Args:
        program: The program; it is only read.
        weights: What is going to be pruned.
        context: Holds the calibration data.
        by: The rule.
        sparsity: Of all weights together.
        spread: How far a layer may be from it.
        max_bytes: Memory for the values of all batches at one place of the graph.
    """
    sizes = {weight.name: weight.tensor.numel() for weight in weights}
    if by == "uniform" or not weights:
        return dict.fromkeys(sizes, sparsity)
    named = {weight.layer.node: weight for weight in weights}
    scores: dict[str, dict[str, Tensor]] = {}
    found: dict[str, float] = {}
    losses: dict[str, Tensor] = {}

    def visit(layer: Layer, hessian: Hessian) -> Tensor:
        weight = named[layer.node]
        score = weight.matrix(weight.dense).abs().float() * hessian.diagonal.sqrt()
        if by == "sensitivity":
            losses[weight.name] = _cumulated(score)
        else:
            block = block_of(layer.name)
            # One block's scores at a time: layers come in the order of blocks.
            for other in [key for key in scores if key != block]:
                found[other] = outlier_share(list(scores.pop(other).values()))
            scores.setdefault(block, {})[weight.name] = score
        return weight.dense

    visit_layers(
        program,
        [weight.layer for weight in weights],
        visit,
        context,
        max_bytes=max_bytes,
        purpose="comparing layers",
    )
    if by == "sensitivity":
        return _least_loss(losses, sizes, sparsity, spread)
    for block, rest in scores.items():
        found[block] = outlier_share(list(rest.values()))
    blocks = {weight.name: block_of(weight.layer.name) for weight in weights}
    return _by_outliers({name: found[blocks[name]] for name in sizes}, sizes, sparsity, spread)


def block_of(name: str) -> str:
    """Return the numbered module that a layer lies in (`model.layers.3`), or the layer's own name."""
    found = re.match(r"(.*?\.\d+)(\.|$)", name)
    return found[1] if found else name


def outlier_share(scores: Sequence[Tensor]) -> float:
    """Return the share of scores above five times their mean."""
    flat = torch.cat([score.flatten() for score in scores])
    return float((flat > _OUTLIER * flat.mean()).double().mean())


def _by_outliers(
    shares: Mapping[str, float], sizes: Mapping[str, int], sparsity: float, spread: float
) -> dict[str, float]:
    low, high = min(shares.values()), max(shares.values())
    if high == low:
        return dict.fromkeys(sizes, sparsity)
    densities = {name: (share - low) / (high - low) * 2 * spread for name, share in shares.items()}
    mean = sum(densities[name] * sizes[name] for name in sizes) / sum(sizes.values())
    return _within({name: sparsity - densities[name] + mean for name in sizes})


def _cumulated(score: Tensor) -> Tensor:
    """Return for each bin of score² / Σ score², ascending, the share of weights below its end."""
    square = score.double().square()
    total = float(square.sum())
    place = (square / (total or 1.0)).clamp(min=10.0**-_DECADES).log10().add(_DECADES).mul(_BINS).long()
    counts = torch.bincount(place.clamp(0, _DECADES * _BINS).flatten(), minlength=_DECADES * _BINS + 1)
    return counts.cumsum(0).double() / score.numel()


def _least_loss(
    losses: Mapping[str, Tensor], sizes: Mapping[str, int], sparsity: float, spread: float
) -> dict[str, float]:
    low, high = max(0.0, sparsity - spread), min(1.0, sparsity + spread)

    def at(threshold: float) -> dict[str, float]:
        """The share of each layer below a threshold, a fraction of a bin by straight lines."""
        place, part = int(threshold), threshold - int(threshold)
        result = {}
        for name, below in losses.items():
            before = float(below[place - 1]) if place else 0.0
            share = before + part * (float(below[min(place, len(below) - 1)]) - before)
            result[name] = min(max(share, low), high)
        return result

    def mean(shares: Mapping[str, float]) -> float:
        return sum(shares[name] * sizes[name] for name in sizes) / sum(sizes.values())

    return _within(at(_bisect(lambda threshold: mean(at(threshold)) >= sparsity, _DECADES * _BINS + 1.0)))


def _bisect(reached: Callable[[float], bool], end: float) -> float:
    """Return where something that stays reached begins to be, between 0 and `end`."""
    first, last = 0.0, math.nextafter(end, 0)
    for _ in range(_STEPS):
        middle = (first + last) / 2
        first, last = (first, middle) if reached(middle) else (middle, last)
    return last


def _within(sparsities: Mapping[str, float]) -> dict[str, float]:
    """Keep them where a sparsity can be."""
    return {name: min(max(value, 0.0), 0.999) for name, value in sparsities.items()}
