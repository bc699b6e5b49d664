"""Pooling, resizing, padding and norms of images."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from sqcompile.backends.native.lower.context import (
    Lowering,
    dtype_of,
    lowers,
    node_argument,
    tensor_of,
)
from sqcompile.backends.native.lower.images import (
    CodesImage,
    codes_of,
    define_codes,
    image_shape,
    is_image,
    pixels_of,
    planes_of,
)
from sqcompile.backends.native.lower.windows import pair
from sqcompile.backends.native.plan import Shape, Value
from sqcompile.operators.table import argument

aten = torch.ops.aten

_CODES = (torch.uint8, torch.int8)


def _no_image(node: fx.Node) -> str | None:
    if not is_image(node_argument(node, 0)):
        return "an image without a batch, or of a changing number of channels"
    dtype = tensor_of(node_argument(node, 0)).dtype
    return None if dtype in (torch.float32, *_CODES) else f"images of {dtype}"


def _no_floats(node: fx.Node) -> str | None:
    if tensor_of(node_argument(node, 0)).dtype is not torch.float32:
        return f"images of {tensor_of(node_argument(node, 0)).dtype}"
    return _no_image(node)


def _on_image(
    context: Lowering,
    node: fx.Node,
    operation: str,
    ints: tuple[int, ...] = (),
    floats: tuple[float, ...] = (),
) -> Value:
    """Add a step that computes each channel by itself, on floats or on codes."""
    x = node_argument(node, 0)
    if tensor_of(x).dtype in _CODES:
        image = codes_of(context, x)
        shape: Shape = (*image_shape(context, node), image.value.shape[3])
        value = context.step(operation, [image.value], "u8", shape, ints, floats)
        return define_codes(context, node, CodesImage(value, image.channels, image.shift))
    pixels = pixels_of(context, context.value(x))
    shape = (*image_shape(context, node), pixels.shape[3])
    value = context.step(operation, [pixels], pixels.dtype, shape, ints, floats)
    return planes_of(context, value, context.shape(node))


def _spatial(node: fx.Node) -> int:
    return tensor_of(node).dim() - 2


def _pool_ints(node: fx.Node) -> tuple[int, ...]:
    """Return kernel, stride and padding; a stride that is not given is the kernel's size."""
    spatial = _spatial(node)
    stride = argument(node, 2)
    kernel = argument(node, 1)
    return (
        *pair(kernel, spatial, 1),
        *pair(stride if stride not in ([], None) else kernel, spatial, 1),
        *pair(argument(node, 3), spatial, 0),
    )


@lowers(aten.max_pool2d.default, aten.max_pool1d.default, check=_no_image)
def _max_pool(context: Lowering, node: fx.Node) -> Value:
    dilation = pair(argument(node, 4), _spatial(node), 1)
    return _on_image(context, node, "max_pool", (*_pool_ints(node), *dilation))


@lowers(aten.avg_pool2d.default, aten.avg_pool1d.default, check=_no_floats)
def _average_pool(context: Lowering, node: fx.Node) -> Value:
    divisor = argument(node, 6, None) if node.target is aten.avg_pool2d.default else None
    assert divisor is None or isinstance(divisor, int)
    return _on_image(
        context, node, "average_pool", (*_pool_ints(node), int(bool(argument(node, 5))), divisor or 0)
    )


@lowers(aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool1d.default, check=_no_floats)
def _adaptive_average(context: Lowering, node: fx.Node) -> Value:
    return _on_image(context, node, "adaptive_average")


# --- resizing ------------------------------------------------------------------------------------------


def _steps(
    context: Lowering, node: fx.Node, given: object, *, align_corners: bool
) -> tuple[float, float] | None:
    """Return input pixels for an output pixel, as PyTorch computes them; None if that depends on a call."""
    spatial = _spatial(node)
    source, result = (tensor_of(item).shape[2:] for item in (node_argument(node, 0), node))
    factors = list(given) if isinstance(given, (list, tuple)) else [None] * spatial
    steps = []
    for size, wanted, factor in zip(source, result, factors, strict=True):
        if not align_corners and isinstance(factor, (int, float)) and factor > 0:
            steps.append(1 / factor)
        elif not isinstance(size, int) or not isinstance(wanted, int):
            return None
        elif align_corners:
            steps.append((size - 1) / (wanted - 1) if wanted > 1 else 0.0)
        else:
            steps.append(size / wanted)
    return (1.0, steps[0]) if spatial == 1 else (steps[0], steps[1])


def _factors(node: fx.Node, first: int) -> object:
    """Return the factors of a resize: a list, or one argument each."""
    if node.target._overloadname == "vec":  # type: ignore[union-attr]
        return argument(node, first)
    given = [argument(node, first + place) for place in range(_spatial(node))]
    return given


_NEAREST = (aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default, aten.upsample_nearest1d.vec)
_BILINEAR = (aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default)


def _resize_steps(context: Lowering | None, node: fx.Node) -> tuple[float, float] | None:
    linear = node.target in _BILINEAR
    align_corners = linear and bool(argument(node, 2))
    return _steps(context, node, _factors(node, 3 if linear else 2), align_corners=align_corners)  # type: ignore[arg-type]


def _no_resize(node: fx.Node) -> str | None:
    if _resize_steps(None, node) is None:
        return "a resize whose factor depends on the call"
    return _no_floats(node) if node.target in _BILINEAR else _no_image(node)


@lowers(*_NEAREST, check=_no_resize)
def _nearest(context: Lowering, node: fx.Node) -> Value:
    steps = _resize_steps(context, node)
    assert steps is not None
    return _on_image(context, node, "resize_nearest", (), steps)


@lowers(*_BILINEAR, check=_no_resize)
def _bilinear(context: Lowering, node: fx.Node) -> Value:
    steps = _resize_steps(context, node)
    assert steps is not None
    return _on_image(context, node, "resize_bilinear", (int(bool(argument(node, 2))),), steps)


@lowers(aten.pixel_shuffle.default)
def _pixel_shuffle(context: Lowering, node: fx.Node) -> Value:
    """[N, C r², H, W] -> [N, C, H r, W r]."""
    value, factor = context.value(node.args[0]), argument(node, 1)
    assert isinstance(factor, int)
    batch, _, height, width = value.shape
    shape = context.shape(node)
    parts = context.reshape(value, (batch, shape[1], factor, factor, height, width))
    return context.reshape(context.permute(parts, (0, 1, 4, 2, 5, 3)), shape)


@lowers(aten.channel_shuffle.default)
def _channel_shuffle(context: Lowering, node: fx.Node) -> Value:
    """[N, g k, …] -> [N, k g, …]."""
    value, groups = context.value(node.args[0]), argument(node, 1)
    assert isinstance(groups, int)
    channels = value.shape[1]
    assert isinstance(channels, int)
    parts = context.reshape(value, (value.shape[0], groups, channels // groups, *value.shape[2:]))
    order = (0, 2, 1, *range(3, parts.rank))
    return context.reshape(context.permute(parts, order), context.shape(node))


# --- padding and norms ---------------------------------------------------------------------------------


def _no_pad(node: fx.Node) -> str | None:
    mode = argument(node, 2) if node.target is aten.pad.default else "constant"
    widths = argument(node, 1)
    if not isinstance(widths, (list, tuple)) or not all(isinstance(width, int) for width in widths):
        return "padding that depends on the call"
    if mode not in ("constant", "reflect", "replicate", "circular"):
        return f"padding by '{mode}'"
    shape = tensor_of(node_argument(node, 0)).shape
    padded = [axis for axis in range(len(shape)) if any(_widths(node)[axis])]
    if mode != "constant" and not all(isinstance(shape[axis], int) for axis in padded):
        return f"padding by '{mode}' of a dimension that depends on the call"
    return None


def _widths(node: fx.Node) -> list[tuple[int, int]]:
    """Return what is added before and behind, by dimension."""
    given = argument(node, 1)
    assert isinstance(given, (list, tuple))
    rank = tensor_of(node).dim()
    pairs = [(int(given[place]), int(given[place + 1])) for place in range(0, len(given), 2)]
    return [(0, 0)] * (rank - len(pairs)) + pairs[::-1]


@lowers(aten.pad.default, aten.constant_pad_nd.default, check=_no_pad)
def _pad(context: Lowering, node: fx.Node) -> Value:
    value, widths, shape = context.value(node.args[0]), _widths(node), context.shape(node)
    mode = argument(node, 2) if node.target is aten.pad.default else "constant"
    if mode != "constant":
        return _pad_by_places(context, value, widths, str(mode))
    # Negative widths cut off.
    for axis, (before, behind) in enumerate(widths):
        if before < 0 or behind < 0:
            length = value.shape[axis] + min(before, 0) + min(behind, 0)
            value = context.slice(value, axis, -min(before, 0), length)
    if value.shape == shape:
        return value
    number = argument(node, 3 if node.target is aten.pad.default else 2)
    filler = context.number(0 if number is None else number, value.dtype)
    return context.step("pad", [value, filler], value.dtype, shape, [max(before, 0) for before, _ in widths])


def _pad_by_places(context: Lowering, value: Value, widths: list[tuple[int, int]], mode: str) -> Value:
    for axis, (before, behind) in enumerate(widths):
        if not before and not behind:
            continue
        size = value.shape[axis]
        assert isinstance(size, int)
        places = np.arange(-before, size + behind)
        if mode == "replicate":
            places = places.clip(0, size - 1)
        elif mode == "circular":
            places = places % size
        else:
            places = np.abs(places)
            places = np.where(places >= size, 2 * (size - 1) - places, places)
        shape = [*value.shape[:axis], len(places), *value.shape[axis + 1 :]]
        index = context.plan.add_constant(places.astype(np.int64))
        value = context.step("index", [value, index], value.dtype, shape, (axis,))
    return value


def _no_batch_norm(node: fx.Node) -> str | None:
    if argument(node, 5):
        return "batch norm that is training"
    if any(not isinstance(node.args[place], fx.Node) for place in (3, 4)):
        return "batch norm without running statistics"
    return _no_floats(node) if tensor_of(node).dim() > 2 else None


@lowers(aten.batch_norm.default, check=_no_batch_norm)
def _batch_norm(context: Lowering, node: fx.Node) -> Value:
    """Multiply each channel by a factor and add a shift."""
    weight, bias, mean, variance = (context.constant(node.args[place]) for place in (1, 2, 3, 4))
    assert mean is not None and variance is not None
    epsilon = argument(node, 7)
    assert isinstance(epsilon, float)
    factor = (variance.double() + epsilon).rsqrt()
    if weight is not None:
        factor = factor * weight.double()
    shift = -mean.double() * factor
    if bias is not None:
        shift = shift + bias.double()
    value = context.value(node.args[0], "f32")
    shape = (1, -1, *[1] * (value.rank - 2))
    scaled = context.binary("mul", value, context.stored(factor.float().reshape(shape)))
    return context.step(
        "add", [scaled, context.stored(shift.float().reshape(shape))], dtype_of(node), context.shape(node)
    )


def _no_prelu(node: fx.Node) -> str | None:
    return None if tensor_of(node).dtype is torch.float32 else f"images of {tensor_of(node).dtype}"


@lowers(aten.elu.default, check=_no_prelu)
def _elu(context: Lowering, node: fx.Node) -> Value:
    alpha, scale, inner = (float(argument(node, place, 1)) for place in (1, 2, 3))  # type: ignore[arg-type]
    value = context.value(node.args[0], "f32")
    shape = value.shape
    below = context.binary("mul", value, context.number(inner, "f32"))
    below = context.step("exp", [below], "f32", shape)
    below = context.binary("sub", below, context.number(1.0, "f32"))
    below = context.binary("mul", below, context.number(alpha * scale, "f32"))
    above = context.binary("mul", value, context.number(scale, "f32"))
    positive = context.step("lt", [context.number(0, "f32"), value], "boolean", shape)
    return context.step("where", [positive, above, below], "f32", shape)
