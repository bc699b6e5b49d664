"""Rounding each weight up or down, learned by gradients so that the layer's outputs change least."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sqcompile.quantization import affine
from sqcompile.quantization.affine import Search
from sqcompile.quantization.format import Format
from sqcompile.quantization.stored import fit_decoding
from sqcompile.second_order.hessian import Hessian
from sqcompile.second_order.least_squares import target
from sqcompile.second_order.rounding import Rounded

# The sigmoid is stretched, so that 0 and 1 are reached and not only neared.
_HIGH, _LOW = 1.1, -0.1
# For this share of the steps nothing pulls to 0 or 1; the pull then sharpens from the first power to the second.
_WARM, _POWERS = 0.2, (20.0, 2.0)
# How much the pull counts beside the error, where rounding to nearest has an error of 1 a weight. Less of it leaves
# many weights undecided, which the last rounding then decides for the worse (measured from 0.01 to 1).
_PULL = 1.0


def soft(variable: Tensor) -> Tensor:
    """Return what is added to a weight's lower code, 0 to 1: a stretched sigmoid of what is learned."""
    return (variable.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def objective(change: Tensor, hessian: Tensor, up: Tensor, power: float | None) -> Tensor:
    """Return E ‖change x‖² + pull · Σ (1 - |2 up - 1|^power).

    Shapes: change [O, K], in units in which rounding to nearest has an error of 1 a weight; hessian [K, K]; up [O, K].

    Args:
        change: What is added to the weight.
        hessian: H of its inputs.
        up: How far each weight is rounded up, 0 to 1.
        power: Of the pull to 0 and 1; None: no pull.
    """
    error = ((change @ hessian) * change).sum()
    if power is None:
        return error
    return error + _PULL * (1 - (2 * up - 1).abs().pow(power)).sum()


def learn_rounding(
    weight: Tensor,
    hessian: Hessian,
    format: Format,
    *,
    search: Search = "mse",
    steps: int = 300,
    rate: float = 0.03,
    kept: Tensor | None = None,
) -> Rounded:
    """Round a weight's entries up or down, as gradients of the output error say; row by row never worse than nearest.

    Source: Nagel et al. 2020, arXiv 2004.10568, equations 21 to 25; with the Hessian, the expectation over data is
        exact and no data is run again.

    Args:
        weight: The weight [O, K].
        hessian: Of its inputs; with those of the dense model, the weight is first fitted to them.
        format: A linear one.
        search: Of scales.
        steps: Steps of Adam.
        rate: Its learning rate.
        kept: Mask that is in force, [O, K]: zeros stay zeros.

    Raises:
        InputError: If the weight is not finite.
    """
    wanted = target(weight, hessian).float()
    if kept is not None:
        wanted = wanted * kept
    decoding = fit_decoding(wanted, format, search, hessian.diagonal)
    axis, group_size = format.granularity.pair
    zero = _spread(decoding.zero_point.float(), wanted, format)
    scale = _spread(decoding.scale.float(), wanted, format)
    low, high = format.qmin - zero, format.qmax - zero
    ratio = affine.divide(wanted, decoding.scale, axis, group_size)
    floor = ratio.floor()
    fixed = torch.zeros_like(floor, dtype=torch.bool) if kept is None else ~kept

    def value(up: Tensor) -> Tensor:
        return torch.where(fixed, 0.0, (floor + up).clamp(low, high) * scale)

    nearest = value((ratio.round() - floor).clamp(0, 1))
    matrix = hessian.matrix
    plain = _errors(nearest - wanted, matrix)
    if not bool((plain > 0).any()):
        return Rounded(nearest, None, decoding, 0.0)
    unit = math.sqrt(wanted.numel() / float(plain.sum()))
    # Starts where the soft value is the weight itself.
    share = ((ratio - floor - _LOW) / (_HIGH - _LOW)).clamp(1e-4, 1 - 1e-4)
    variable = share.logit().requires_grad_()
    adam = torch.optim.Adam([variable], lr=rate)
    with torch.enable_grad():
        for step in range(steps):
            adam.zero_grad()
            up = soft(variable)
            change = (value(up) - wanted) * unit
            objective(change, matrix, up, _power(step / max(1, steps - 1))).backward()
            adam.step()
    with torch.no_grad():
        found = value((soft(variable) >= 0.5).to(ratio))
        better = _errors(found - wanted, matrix) < plain
        return Rounded(torch.where(better[:, None], found, nearest), None, decoding, 0.0)


def _power(progress: float) -> float | None:
    if progress < _WARM:
        return None
    share = (progress - _WARM) / (1 - _WARM)
    first, last = _POWERS
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))


def _errors(change: Tensor, hessian: Tensor) -> Tensor:
    """Output error of each row, [O]."""
    return ((change @ hessian) * change).sum(1)


def _spread(parameter: Tensor, weight: Tensor, format: Format) -> Tensor:
    """Return a parameter of the scales, one for each weight."""
    blocks = affine.Blocks(weight, *format.granularity.pair)
    return (blocks.split(torch.zeros_like(weight)) + blocks.spread(parameter)).reshape(weight.shape)
