"""Scales that make most errors small and let a few be large, without data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sqcompile.quantization.affine import SMALLEST_SCALE, Blocks, divide, reduce_blocks
from sqcompile.quantization.format import Format

# As in the reference: of errors in steps of the scale.
_POWER = 0.7
_STRENGTH = 10.0
_GROWTH = 1.01


def half_quadratic(
    x: Tensor, scale: Tensor, zero_point: Tensor, format: Format, iterations: int = 20
) -> tuple[Tensor, Tensor]:
    """Return scales and zero points of less error Σ |x - Q(x)|^p, p = 0.7, than those given; never of more.

    A sum of low powers forgives outliers, and fits the bulk of the weights. It is minimized by splitting: with the
    large errors e taken out, what is left is a least-squares problem. In steps of the scale, v = x / scale:

    - e ← sign(r) max(|r| - |r|^(p-1) / β, 0), r = v - (q - z); β grows by 1 % each time
    - scale ← scale · Σ (v - e)(q - z) / Σ (q - z)²; z ← round(mean(q - (v - e)))

    Shapes: x [...]; scale and zero point as `format.granularity.scale_shape(x.shape)`.
    Source: Badri and Shaji 2023, "Half-quadratic quantization of large machine learning models". Theirs keeps
        the scale and solves for a zero point with fractions; ours are integers, so that the scale is solved for.

    Args:
        x: The values.
        scale: Scales to start from.
        zero_point: Zero points to start from.
        format: A linear one; if it is symmetric, zero points stay.
        iterations: Steps at most.
    """
    axis, group_size = format.granularity.pair
    blocks = Blocks(x, axis, group_size)
    x = x.detach().float()

    def reduced(values: Tensor, reduce: Callable[..., Tensor] = torch.sum) -> Tensor:
        return reduce_blocks(values, axis, group_size, reduce)

    def moved(values: Tensor, offset: Tensor) -> Tensor:
        return (blocks.split(values) + blocks.spread(offset)).reshape(values.shape)

    def rounded(ratio: Tensor, zero: Tensor) -> Tensor:
        """Codes less the zero point."""
        return moved(moved(ratio.round(), zero).clamp_(format.qmin, format.qmax), -zero)

    scale, zero = scale.float(), zero_point.float()
    ratio = divide(x, scale, axis, group_size)
    steps = rounded(ratio, zero)
    best = (scale, zero)
    least = reduced((ratio - steps).abs().pow(_POWER)) * scale.pow(_POWER)
    strength = _STRENGTH
    for _ in range(iterations):
        rest = ratio - steps
        size = rest.abs().clamp_(min=torch.finfo(torch.float32).tiny)
        kept = ratio - rest.sign() * (size - size.pow(_POWER - 1) / strength).clamp_(min=0)
        power, product = reduced(steps.square()), reduced(kept * steps)
        usable = (power > 0) & (product > 0)
        factor = torch.where(usable, product / power, torch.ones_like(scale))
        scale = (scale * factor).clamp(min=SMALLEST_SCALE)
        if not format.symmetric:
            shift = reduced(steps - divide(kept, factor, axis, group_size), torch.mean)
            zero = (zero + shift).round().clamp(format.qmin, format.qmax)
        ratio = divide(x, scale, axis, group_size)
        steps = rounded(ratio, zero)
        error = reduced((ratio - steps).abs().pow(_POWER)) * scale.pow(_POWER)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        strength *= _GROWTH
    return best[0], best[1].to(torch.int32)
