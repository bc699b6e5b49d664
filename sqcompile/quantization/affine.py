"""Quantize and dequantize: the one home of rounding, saturation, scales and zero points.

    codes = saturate(round_half_to_even(x / scale) + zero_point)        value = (codes - zero_point) * scale

in float32 arithmetic, exactly as ONNX QuantizeLinear-21 and DequantizeLinear-21 define it. Every
function takes tensors of size zero, records no gradient (the operators of `sqcompile.operators` do that,
with the gradients at the end of this file), and allocates at most two temporaries of the size of its
input. All but those that check values run under fake tensors with symbolic sizes. A granularity is the
pair (axis, group_size) of `format.scale_shape`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from sqcompile.errors import FormatError, InputError
from sqcompile.quantization.format import Format, middle_code, scale_shape

# The product of two scales (input times weight: the scale of a bias) stays a normal float32 number.
SMALLEST_SCALE = 2.0**-63

# A bias takes at most half of the int32 range and leaves the other half to the products summed onto it.
BIAS_LIMIT = 2**30

Search = Literal["minmax", "mse", "half-quadratic"]


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    group_size: int | None,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the codes of `x`, in `dtype`; the code of a NaN is undefined.

    Shapes: x [...]; scale and zero_point as `scale_shape` says; result as x.
    Raises: FormatError if the scale's shape does not fit.
    Source: ONNX QuantizeLinear-21.
    """
    check_shape(x, scale, axis, group_size)
    blocks = Blocks(x, axis, group_size)
    codes = _divided(x, scale, blocks)
    blocks.split(codes).round_().add_(blocks.spread(zero_point))
    codes.clamp_(qmin, qmax)
    if dtype == torch.uint8:
        # Float to uint8 directly is not vectorised on CPUs: five times slower than by way of int16.
        return codes.to(torch.int16).to(torch.uint8)
    return codes.to(dtype)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    group_size: int | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the values that `codes` stand for, in `dtype`.

    Shapes: codes [...]; scale and zero_point as `scale_shape` says; result as codes.
    Raises: FormatError if the scale's shape does not fit.
    Source: ONNX DequantizeLinear-21.
    """
    check_shape(codes, scale, axis, group_size)
    blocks = Blocks(codes, axis, group_size)
    values = codes.to(torch.float32, copy=True)
    view = blocks.split(values)
    view.sub_(blocks.spread(zero_point))
    view.mul_(blocks.spread(scale))
    return values.to(dtype)


def divide(x: Tensor, scale: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """Return each value in steps of its scale, in float32.

    Shapes: x [...]; scale as `scale_shape` says; result as x.
    Raises: FormatError if the scale's shape does not fit.
    """
    check_shape(x, scale, axis, group_size)
    return _divided(x, scale, Blocks(x, axis, group_size))


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    group_size: int | None,
    qmin: int,
    qmax: int,
) -> Tensor:
    """Return dequantize(quantize(x)) in x's dtype, without the codes in between."""
    check_shape(x, scale, axis, group_size)
    blocks = Blocks(x, axis, group_size)
    values = _divided(x, scale, blocks)
    view = blocks.split(values)
    # Clamping to bounds shifted by the zero point would save two passes, but clamps to tensors are slow.
    view.round_().add_(blocks.spread(zero_point))
    values.clamp_(qmin, qmax)
    view.sub_(blocks.spread(zero_point)).mul_(blocks.spread(scale))
    return values.to(x.dtype)


def scale_from_range(low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Return the scale (float32) and zero point (int32) that cover low..high, and always zero.

    Affine: scale = (high - low) / (qmax - qmin), zero_point = round(saturate(qmin - low / scale)).
    Symmetric: scale = max(-low, high) / (qmax - middle), zero_point = middle. A range of width zero, which
    is a tensor of zeros, gets the scale 1; no scale is below `SMALLEST_SCALE`.

    Shapes: low and high of equal shape, one entry a scale; results alike.
    Raises: InputError if a bound is not finite, or low is above high.
    Source: ONNX DynamicQuantizeLinear-11; the scale 1 for zeros as ONNX Runtime.
    """
    valid = low.isfinite() & high.isfinite() & (low <= high)
    if not bool(valid.all()):
        raise InputError(
            "a quantization range is not finite, or upside down",
            seen=f"{int((~valid).sum())} of {valid.numel()} ranges, first "
            f"{float(low[~valid][0]):g}..{float(high[~valid][0]):g}",
            expected="low <= high, both finite",
        )
    return unchecked_scale(low, high, format.qmin, format.qmax, format.symmetric)


def unchecked_scale(
    low: Tensor, high: Tensor, qmin: int, qmax: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point as `scale_from_range`, unchecked; a NaN in a bound makes the scale NaN."""
    low = low.detach().float().clamp(max=0)
    high = high.detach().float().clamp(min=0)
    middle = middle_code(qmin, qmax)
    if symmetric:
        span, steps = torch.maximum(-low, high), qmax - middle
    else:
        # Finite bounds may lie further apart than the largest float32.
        span, steps = (high - low).clamp(max=torch.finfo(torch.float32).max), qmax - qmin
    scale = (span / steps).clamp(min=SMALLEST_SCALE)
    scale = torch.where(span == 0, 1.0, scale)
    if symmetric:
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    return scale, (qmin - low / scale).clamp(qmin, qmax).round().to(torch.int32)


def scale_for_tensor(
    x: Tensor, format: Format, search: Search = "minmax", steps: int = 64
) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point for the values of `x`, usually a weight.

    `minmax` covers every value. `mse` also tries ranges shrunk in equal steps down to a fifth of that and
    keeps, for each scale separately, the one with the least squared error; it is never worse than `minmax`.
    `half-quadratic` goes on from there to the least sum of a low power of the errors; see `half_quadratic`.

    Shapes: x [...]; results as `format.granularity.scale_shape(x.shape)`.
    Raises: InputError if x holds NaN or infinity.
    """
    axis, group_size = format.granularity.pair
    low, high = block_range(x, axis, group_size)
    if not bool((low.isfinite() & high.isfinite()).all()):
        count = int((~x.isfinite()).sum())
        raise InputError(
            "a tensor to quantize is not finite",
            seen=f"{count} of {x.numel()} values are NaN or infinite",
            next_step="mend the model's weights first; their origin is often a diverged training run",
        )
    scale, zero_point = scale_from_range(low, high, format)
    if search == "minmax":
        return scale, zero_point
    if search not in ("mse", "half-quadratic"):
        raise InputError(f"no search is called {search!r}", expected="'minmax', 'mse' or 'half-quadratic'")
    ranges = (scale_from_range(low * factor, high * factor, format) for factor in shrinks(steps))
    best, _ = least_error(ranges, lambda scale, zero_point: _squared_error(x, scale, zero_point, format))
    if search == "half-quadratic":
        from sqcompile.quantization.half_quadratic import half_quadratic

        return half_quadratic(x, best[0], best[1], format)
    return best[0], best[1]


def shrinks(steps: int) -> Iterator[float]:
    """Yield what a search of ranges multiplies them by: 1, and equal steps down to a fifth."""
    return (1 - 0.8 * step / steps for step in range(steps + 1))


def least_error(
    candidates: Iterable[tuple[Tensor, ...]], error: Callable[..., Tensor]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the candidate of least error, chosen for each scale by itself, the first of equals; and the errors.

    Args:
        candidates: Tensors with one entry a scale; at least one.
        error: Takes a candidate; returns the error that each scale causes, alike.
    """
    remaining = iter(candidates)
    best = next(remaining)
    least = error(*best)
    for candidate in remaining:
        found = error(*candidate)
        better = found < least
        least = torch.where(better, found, least)
        best = tuple(torch.where(better, new, old) for new, old in zip(candidate, best, strict=True))
    return best, least


def quantize_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return int32 codes and the scale of a bias: codes = round(bias / scale), scale = input * weight scale.

    Shapes: bias [C]; input_scale []; weight_scale [C] or []; results [C] and weight_scale's shape.
    Raises: InputError if a code exceeds `BIAS_LIMIT`, where the int32 sum it enters could overflow.
    Source: ONNX QLinearConv-10 (the bias has scale x_scale * w_scale and zero point 0).
    """
    scale = input_scale.detach().float() * weight_scale.detach().float()
    # Float64: codes beyond 2**24 are not exact in float32.
    codes = (bias.detach().double() / scale.double()).round()
    excess = ~(codes.abs() <= BIAS_LIMIT)
    if bool(excess.any()):
        worst = float(codes[excess].abs().max())
        raise InputError(
            "a bias is too large for its scale, or not finite",
            seen=f"{int(excess.sum())} of {codes.numel()} channels, largest code {worst:.3g}",
            expected=f"codes up to {BIAS_LIMIT}",
            next_step="raise the weight's scale to at least least_weight_scale(bias, input_scale)",
        )
    return codes.to(torch.int32), scale


def least_weight_scale(bias: Tensor, input_scale: Tensor) -> Tensor:
    """Return, for each channel, the smallest weight scale whose bias code stays within `BIAS_LIMIT`.

    Channels whose weights are all but zero need it: their own scale would be too fine for their bias.

    Shapes: bias [C]; input_scale []; result [C].
    """
    # A hair more than the limit, so that rounding to float32 and back cannot cross it.
    least = bias.detach().double().abs() / (input_scale.detach().double() * BIAS_LIMIT) * (1 + 2**-20)
    return least.clamp(min=SMALLEST_SCALE).float()


def block_range(x: Tensor, axis: int | None, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest value for each scale; zeros where a scale has no values.

    Shapes: x [...]; results as `scale_shape` says.
    """
    x = x.detach()
    if _known(x.numel() == 0):
        empty = x.new_zeros(scale_shape(x.shape, axis, group_size))
        return empty, empty.clone()
    if axis is None:
        # One pass for both; per axis, two separate reductions are over ten times faster on CPUs.
        low, high = torch.aminmax(x)
        return low, high
    return reduce_blocks(x, axis, group_size, torch.amin), reduce_blocks(x, axis, group_size, torch.amax)


def reduce_blocks(
    x: Tensor, axis: int | None, group_size: int | None, reduce: Callable[[Tensor, list[int], bool], Tensor]
) -> Tensor:
    """Return reduce(values, dims, keepdim) over the values of each scale.

    Shapes: x [...]; result as `scale_shape` says.
    """
    shape = scale_shape(x.shape, axis, group_size)
    if axis is None:
        return reduce(x, list(range(x.dim())), False)
    axis %= x.dim()
    if group_size is None:
        return reduce(x, [dim for dim in range(x.dim()) if dim != axis], False) if x.dim() > 1 else x.clone()
    length = x.shape[axis]
    if group_size == -1 or _known(length <= group_size):
        return reduce(x, [axis], True).expand(shape)  # from one group to none, if the axis is empty
    whole = length // group_size
    groups = reduce(
        x.narrow(axis, 0, whole * group_size).unflatten(axis, (whole, group_size)), [axis + 1], False
    )
    if whole * group_size == length:  # guards a symbolic length: the two cases are different graphs
        return groups
    tail = reduce(x.narrow(axis, whole * group_size, length - whole * group_size), [axis], True)
    return torch.cat([groups, tail], axis)


def check_shape(x: Tensor, scale: Tensor, axis: int | None, group_size: int | None) -> None:
    """Raise FormatError unless the scale's shape fits; sizes that are symbolic pass."""
    # Without it, one scale for many groups would broadcast silently.
    expected = scale_shape(x.shape, axis, group_size)
    sizes = (*expected, *scale.shape)
    if len(expected) == scale.dim() and not all(isinstance(size, int) for size in sizes):
        return  # comparing symbolic sizes would pin them
    if expected != tuple(scale.shape):
        raise FormatError(
            "a scale does not fit its tensor",
            where=f"axis={axis}, group_size={group_size}, tensor {list(x.shape)}",
            seen=f"scale of shape {list(scale.shape)}",
            expected=str(list(expected)),
        )


def dequantize_gradient(
    gradient: Tensor, codes: Tensor, zero_point: Tensor, axis: int | None, group_size: int | None
) -> Tensor:
    """Return the gradient to the scale of `dequantize`: the sum of gradient * (codes - zero_point)."""
    blocks = Blocks(codes, axis, group_size)
    steps = codes.to(torch.float32, copy=True)
    blocks.split(steps).sub_(blocks.spread(zero_point))
    return reduce_blocks(steps.mul_(gradient), axis, group_size, torch.sum)


def fake_quantize_gradient(
    gradient: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    group_size: int | None,
    qmin: int,
    qmax: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients to x and to the scale of `fake_quantize`.

    To x, straight through inside the clipping range and zero outside. The range is closed: with a scale
    from the largest weight, that weight lies on its edge, and would never train in an open one.
    To the scale, with v = x / scale: round(v) - v inside, else the nearer bound, in steps.

    Source: Esser et al. 2020 (LSQ), eq. 3 and 5, without the gradient scale of its section 2.2;
    zero points as in Bhalgat et al. 2020 (LSQ+).
    """
    blocks = Blocks(x, axis, group_size)
    view = blocks.split(_divided(x, scale, blocks))
    zero = blocks.spread(zero_point)
    low, high = qmin - zero, qmax - zero
    inside = ((view >= low) & (view <= high)).reshape(x.shape)
    slope = torch.where(view <= low, low, torch.where(view >= high, high, view.round() - view))
    to_scale = reduce_blocks(slope.reshape(x.shape) * gradient.float(), axis, group_size, torch.sum)
    return gradient * inside, to_scale


class Blocks:
    """How a tensor of x's shape and its scales are laid out to broadcast against each other.

    Decided once for each operation: asked twice about symbolic sizes, the answer could change in between.
    """

    def __init__(self, x: Tensor, axis: int | None, group_size: int | None) -> None:
        self.shape = x.shape
        self.axis = axis if axis is None else axis % x.dim()
        self.group_size = group_size
        self.one_group = self.complete = False
        if self.axis is not None and group_size is not None:
            length = x.shape[self.axis]
            self.one_group = group_size == -1 or _known(length <= group_size)
            self.complete = not self.one_group and _known(length % group_size == 0)

    def split(self, x: Tensor) -> Tensor:
        """Return a view of x, with the axis split into (groups, group size) where all are complete."""
        if not self.complete:
            return x
        assert self.axis is not None and self.group_size is not None
        split: Tensor = x.unflatten(self.axis, (self.shape[self.axis] // self.group_size, self.group_size))
        return split

    def spread(self, parameter: Tensor) -> Tensor:
        """Return the parameter in float32, so that it broadcasts against a tensor from `split`."""
        parameter = parameter.detach().float()
        if self.axis is None or self.one_group:
            return parameter
        if self.group_size is None:
            return parameter.reshape([-1 if dim == self.axis else 1 for dim in range(len(self.shape))])
        if self.complete:
            return parameter.unsqueeze(self.axis + 1)
        # An incomplete last group: a temporary of x's size, freed after its one use.
        wide = parameter.repeat_interleave(self.group_size, self.axis)
        return wide.narrow(self.axis, 0, self.shape[self.axis])


def _divided(x: Tensor, scale: Tensor, blocks: Blocks) -> Tensor:
    """Return x / scale in float32, dense in memory in x's order of dimensions."""
    x = x.detach()
    if x.dtype != torch.float32:
        ratio = x.to(torch.float32)
        blocks.split(ratio).div_(blocks.spread(scale))
        return ratio
    # Written into a tensor of x's own layout: a plain quotient's layout also depends on the scale's.
    ratio = torch.empty_like(x)
    torch.div(blocks.split(x), blocks.spread(scale), out=blocks.split(ratio))
    return ratio


def _squared_error(x: Tensor, scale: Tensor, zero_point: Tensor, format: Format) -> Tensor:
    axis, group_size = format.granularity.pair
    error = fake_quantize(x.detach().float(), scale, zero_point, axis, group_size, format.qmin, format.qmax)
    return reduce_blocks(error.sub_(x.detach()).square_(), axis, group_size, torch.sum)


def _known(condition: bool | torch.SymBool) -> bool:
    """Return the truth of `condition`; False where symbolic sizes leave it open, adding no guard."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    known: bool = statically_known_true(condition)
    return known
