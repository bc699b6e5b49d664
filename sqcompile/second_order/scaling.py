"""Factors for the inputs of layers: which ones let rounding hurt their outputs least."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sqcompile.second_order.hessian import Hessian

# Ratios of scales beyond this would leave the range in which float32 products keep their digits.
_LARGEST = 1e4

Round = Callable[[int, Tensor], Tensor]
"""Takes the place of a weight among the layers, and the weight scaled; returns it rounded."""


def activation_scale(
    weights: Sequence[Tensor], hessian: Hessian, rounded: Round, steps: int = 20
) -> tuple[Tensor, float, float]:
    """Return the scale of a value's channels for which rounding its layers' weights costs least.

    Tries s = m^a for a = 0, 1/steps, …, 1, where m is the mean magnitude of each channel, and takes the one with
    the least Σ over layers of E ‖(Q(W · s) / s - W) x‖². With a = 0 the scale is 1, so that it is never worse.

    Shapes: weights [O, K]; result [K], positive, with 1 in the middle of its range.
    Source: Lin et al. 2023, arXiv 2306.00978, equations 4 and 5; the expectation is exact, by the Hessian.

    Args:
        weights: The weights of all layers that read the value.
        hessian: Of the value.
        rounded: Rounds a weight.
        steps: How finely a is searched.

    Returns:
        The scale, its error, and that of the scale 1.
    """
    best = torch.ones_like(hessian.magnitude)
    least = plain = torch.inf
    for step in range(steps + 1):
        scale = _centred(hessian.magnitude, step / steps)
        error = 0.0
        for index, weight in enumerate(weights):
            change = rounded(index, weight * scale) / scale - weight
            error += float(((change @ hessian.matrix) * change).sum())
        if step == 0:
            plain = error
        if error < least:
            best, least = scale, error
    return best, least, plain


def smoothing_scale(weights: Sequence[Tensor], peak: Tensor, strength: float) -> Tensor:
    """Return the scale that moves the unevenness of a value's channels into the weights that read it.

    s_j = max|x_j|^t / max|w_j|^(1-t); channels that are always zero stay.

    Shapes: weights [O, K]; peak [K], the largest |x| of each channel; result [K], positive.
    Source: Xiao et al. 2022, arXiv 2211.10438, equation 4.
    """
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).to(peak)
    counts = (peak > 0) & (largest > 0)
    scale = peak.pow(strength) / largest.pow(1 - strength)
    return torch.where(counts, scale, torch.ones_like(scale)).clamp(1 / _LARGEST, _LARGEST)


def _centred(magnitude: Tensor, power: float) -> Tensor:
    """Return magnitude^power around 1; 1 for channels that are always zero."""
    counts = magnitude > 0
    if power == 0 or not bool(counts.any()):
        return torch.ones_like(magnitude)
    scale = torch.where(counts, magnitude, torch.ones_like(magnitude)).pow(power)
    middle = (scale[counts].amax() * scale[counts].amin()).sqrt()
    scale = torch.where(counts, scale / middle, torch.ones_like(scale))
    return scale.clamp(1 / _LARGEST, _LARGEST)
