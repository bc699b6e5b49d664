"""Convolutions: in integers where data and weight are 8-bit codes, else in floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from sqcompile.backends.native import _native
from sqcompile.backends.native.lower.choice import Candidate
from sqcompile.backends.native.lower.context import Lowering, lowers, node_argument, product, tensor_of
from sqcompile.backends.native.lower.convolution_forms import WeightForm, choose_form
from sqcompile.backends.native.lower.images import (
    CodesImage,
    codes_of,
    image_shape,
    is_image,
    padded_channels,
    pixels_of,
    planes_of,
)
from sqcompile.backends.native.lower.quantized import Granularity
from sqcompile.backends.native.lower.windows import CONVOLUTIONS, Windows, convolution_windows
from sqcompile.backends.native.plan import Size, Value
from sqcompile.operators.table import argument

aten = torch.ops.aten
sq = torch.ops.sqcompile

# Products that an int32 sum of 8-bit products holds; kernels/qgemm/qgemm.h.
_MOST_PRODUCTS = 65536
# Of pixels that have several columns; kernels/qimage/qimage.h.
_MOST_TAP_BYTES, _MOST_TAP_STEP = 64, 16
_INT8 = np.iinfo(np.int8)

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


def _no_convolution(node: fx.Node) -> str | None:
    if (
        not is_image(node_argument(node, 0))
        or tensor_of(node_argument(node, 0)).dim() != tensor_of(node_argument(node, 1)).dim()
    ):
        return "a convolution without a batch, or of a changing number of channels"
    if not _is_stored(node_argument(node, 1)):
        return "a convolution whose weight is computed"
    bias = argument(node, 2)
    if isinstance(bias, fx.Node) and not _is_stored(bias):
        return "a convolution whose bias is computed"
    if tensor_of(node).dtype is not torch.float32:
        return f"products of {tensor_of(node).dtype}"
    return None


def _is_stored(node: fx.Node) -> bool:
    return node.op == "get_attr" or (
        node.op == "call_function" and all(_is_stored(source) for source in node.all_input_nodes)
    )


@lowers(*CONVOLUTIONS, check=_no_convolution)
def _convolution(context: Lowering, node: fx.Node) -> Value:
    windows = convolution_windows(node)
    low, followers = _clamp_after(node)
    layer = integer_layer(context, node)
    shape = context.shape(node)
    if layer is not None:
        result = layer.add(context, Target(low=low))
    else:
        result = _float_convolution(context, node, windows, low)
    for follower in followers:
        context.define(follower, planes_of(context, result, shape))
    return planes_of(context, result, shape)


def _clamp_after(node: fx.Node) -> tuple[float, list[fx.Node]]:
    """Return the lowest result, and the operator that would have clamped it, which is done then."""
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.relu.default:
        return 0.0, users
    return -math.inf, []


def kernel_matrices(weight: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Return a weight as [groups, outputs, taps, inputs], whatever kind of convolution it is of."""
    weight = weight.reshape(*weight.shape[:2], *windows.kernel)
    groups = windows.groups
    if windows.transposed:
        # [in, out of a group, …], and applied from its end.
        weight = weight.flip(2, 3).reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    else:
        weight = weight.reshape(groups, -1, *weight.shape[1:])
    return weight.flatten(3).transpose(2, 3).contiguous()


# --- floats --------------------------------------------------------------------------------------------


def _float_convolution(context: Lowering, node: fx.Node, windows: Windows, low: float) -> Value:
    weight, bias = (context.constant(argument(node, position)) for position in (1, 2))
    assert weight is not None
    matrices = kernel_matrices(weight.detach().float(), windows)
    groups, outputs, _, inputs = matrices.shape
    depthwise = groups > 1 and outputs == inputs == 1
    numbers = None if bias is None else np.ascontiguousarray(bias.detach().float().numpy())
    operands: list[Value | None] = [pixels_of(context, context.value(node.args[0], "f32"))]
    if depthwise:
        operands.append(context.stored(matrices[:, 0, :, 0].t()))
        if numbers is not None:
            operands.append(context.plan.add_constant(numbers))
    else:
        packed = np.concatenate([_pack_floats(matrix.flatten(1).numpy()) for matrix in matrices])
        operands.append(context.plan.add_constant(packed, "fgemm"))
        if numbers is not None:
            operands.append(context.plan.add_constant(_panels(numbers, groups), "panels"))
        add_convolution(
            context,
            WeightForm("float32", "conv", 1.0, packed.nbytes),
            matrices.shape,
            product(image_shape(context, node)),
        )
    shape = (*image_shape(context, node), groups * outputs)
    ints = (*windows.ints, groups, inputs, outputs)
    return context.step(
        "conv_depthwise" if depthwise else "conv", operands, "f32", shape, ints, (low, math.inf)
    )


def _pack_floats(matrix: Floats) -> Floats:
    packed = np.zeros(_native.fgemm_packed_bytes(matrix.shape[0], matrix.shape[1], False), np.uint8)
    _native.fgemm_pack(np.ascontiguousarray(matrix), False, packed)
    return packed.view(np.float32)


def _panels(numbers: NDArray[np.generic], groups: int) -> NDArray[np.generic]:
    """Return numbers by output, each group's filled up to whole panels."""
    numbers = numbers.reshape(groups, -1)
    room = padded_channels(numbers.shape[1]) - numbers.shape[1]
    return np.ascontiguousarray(np.pad(numbers, ((0, 0), (0, room))).reshape(-1))


# --- codes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How codes stand for values: one scale and zero point for a tensor.

    Attributes:
        scale: Of one step.
        zero: The code of zero, after the shift.
        low: The lowest code, after the shift.
        high: The highest code, after the shift.
        shift: What is added to the program's codes to make them unsigned.
    """

    scale: float
    zero: int
    low: int
    high: int
    shift: int


def tensor_scale(context: Lowering, node: fx.Node) -> Scale | None:
    """Return the scale of a quantize or dequantize, if it is one fixed scale for 8-bit codes."""
    if node.target not in (sq.quantize.default, sq.dequantize.default):
        return None
    how = Granularity.of(node, 3, max(tensor_of(node).dim(), 1))
    codes = node if node.target is sq.quantize.default else node_argument(node, 0)
    dtype = tensor_of(codes).dtype
    if how.axis is not None or dtype not in (torch.uint8, torch.int8):
        return None
    parts = [node_argument(node, position) for position in (1, 2)]
    if not all(context.is_constant(part) for part in parts):
        return None
    scale, zero = (context.constant(part) for part in parts)
    if scale is None or zero is None or scale.numel() != 1 or zero.numel() != 1:
        return None
    shift = 128 if dtype is torch.int8 else 0
    number = float(scale.reshape(()))
    if not math.isfinite(number) or number <= 0:
        return None
    return Scale(number, int(zero.reshape(())) + shift, how.qmin + shift, how.qmax + shift, shift)


@dataclass(frozen=True)
class Target:
    """What a convolution of codes ends in: floats, or codes of a scale.

    Attributes:
        scale: Of the codes; None for floats.
        low: The lowest value.
        high: The highest value.
        other: Another image to add, its scale, and the scale and bounds of the sum.
        table: What codes are looked up in at the end, [256] u8.
    """

    scale: Scale | None = None
    low: float = -math.inf
    high: float = math.inf
    other: tuple[CodesImage, Scale] | None = None
    total: Target | None = None
    table: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class IntegerLayer:
    """A convolution whose data and weight are codes.

    Attributes:
        node: The convolution.
        source: Its data's codes.
        data: Their scale.
        windows: Its geometry.
        matrices: int8 [groups, outputs, taps, inputs]: codes less zero points.
        scales: Of each output's weights, float64 [outputs of all groups].
        bias: int32, in steps of data and weight, or None.
        offset: Bias in floats where it is no whole number of steps, or None.
    """

    node: fx.Node
    source: fx.Node
    data: Scale
    windows: Windows
    matrices: NDArray[np.int8]
    scales: NDArray[np.float64]
    bias: Ints | None
    offset: Floats | None

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel has a kernel of its own."""
        groups, outputs, _, inputs = self.matrices.shape
        return bool(groups > 1 and outputs == inputs == 1)

    def add(self, context: Lowering, target: Target) -> Value:
        """Add the step; returns [N, H, W, C] of floats, or of codes with channels filled up."""
        few = None if self.is_depthwise else few_channels(context, self)
        if few is None:
            return self._step(context, codes_of(context, self.source), target)
        layer, image = few
        return layer._step(context, image, target)

    def _step(self, context: Lowering, image: CodesImage, target: Target) -> Value:
        groups, outputs, _, inputs = self.matrices.shape
        zero = self.data.zero
        sums = self.matrices.astype(np.int64).sum((2, 3)).reshape(-1)
        bias = (0 if self.bias is None else self.bias.astype(np.int64)) - zero * sums
        step = 1.0 if target.scale is None else target.scale.scale
        scales = (self.data.scale * self.scales / step).astype(np.float32)
        offset = np.zeros_like(scales) if self.offset is None else (self.offset / step).astype(np.float32)
        wrapped = (bias & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
        per_panel = 1 if self.is_depthwise else groups
        arrays = [
            context.plan.add_constant(_panels(array, per_panel), "panels")
            for array in (sums.astype(np.int32), wrapped, scales, offset)
        ]
        shape = image_shape(context, self.node)
        form = self._form()
        operator = self._operator if form.parts is None else form.operator
        weight = [self._weight(context)] if form.parts is None else _stored_parts(context, form)
        operands: list[Value | None] = [image.value, *weight, *arrays]
        ints = [*self.windows.ints, groups, inputs, outputs, zero, 0, 0]
        if form.parts is not None:
            ints.append(form.chunk)
        if not self.is_depthwise:
            add_convolution(context, form, self.matrices.shape, product(shape))
        channels = groups * outputs
        if target.scale is None:
            floats = (target.low, target.high, 0.0, 0.0, 0.0, 0.0)
            return context.step(operator, operands, "f32", (*shape, channels), ints, floats)
        low, high = code_bounds(target.scale, target.low, target.high)
        last = target.scale
        own_scale = other_scale = sum_low = sum_high = 0.0
        if target.other is not None and target.total is not None and target.total.scale is not None:
            other, how = target.other
            last = target.total.scale
            operands.append(other.value)
            own_scale, other_scale = target.scale.scale / last.scale, how.scale / last.scale
            sum_low, sum_high = code_bounds(last, target.total.low, target.total.high)
            ints[17] = how.zero
        elif target.table is not None:
            operands.append(None)
        ints[16] = last.zero
        if target.table is not None:
            operands.append(context.plan.add_constant(target.table))
        floats = (low, high, own_scale, other_scale, sum_low, sum_high)
        return context.step(operator, operands, "u8", (*shape, padded_channels(channels)), ints, floats)

    @property
    def _operator(self) -> str:
        return "conv_q8_depthwise" if self.is_depthwise else "conv_q8"

    def _form(self) -> WeightForm:
        """Return how the weight is stored: dense, but for one group whose zeros pay."""
        if self.matrices.shape[0] != 1:
            return WeightForm("int8", self._operator, 1.0, self.matrices.size)
        return choose_form(_in_four_columns(self.matrices[0]))

    def _weight(self, context: Lowering) -> Value:
        if self.is_depthwise:
            kernels = self.matrices[:, 0, :, 0].T
            room = padded_channels(kernels.shape[1]) - kernels.shape[1]
            return context.plan.add_constant(np.ascontiguousarray(np.pad(kernels, ((0, 0), (0, room)))))
        packed = [_pack_codes(matrix) for matrix in self.matrices]
        return context.plan.add_constant(np.concatenate(packed), "qgemm")


def _pack_codes(matrix: NDArray[np.int8]) -> NDArray[np.int8]:
    """Pack [outputs, taps, inputs], the inputs of each tap in fours."""
    outputs = matrix.shape[0]
    rows = _in_four_columns(matrix)
    packed = np.zeros(_native.qgemm_packed_bytes(*rows.shape), np.int8)
    _native.qgemm_pack(np.ascontiguousarray(rows), packed, np.zeros(padded_channels(outputs), np.int32))
    return packed


def _in_four_columns(matrix: NDArray[np.int8]) -> NDArray[np.int8]:
    """Return [outputs, taps, inputs] as rows, the inputs of each tap filled up to fours."""
    outputs, taps, inputs = matrix.shape
    room = -(-inputs // 4) * 4
    return np.pad(matrix, ((0, 0), (0, 0), (0, room - inputs))).reshape(outputs, taps * room)


def _stored_parts(context: Lowering, form: WeightForm) -> list[Value]:
    assert form.parts is not None
    index, values, start = form.parts
    return [
        context.plan.add_constant(index, "qblock_index"),
        context.plan.add_constant(values, "qblock_values"),
        context.plan.add_constant(start, "qblock_start"),
    ]


def add_convolution(context: Lowering, form: WeightForm, matrices: Sequence[int], pixels: Size) -> None:
    """Say what became of the convolution of the next steps: it is a product of as many rows as it makes pixels.

    Args:
        context: The plan under construction.
        form: The form of its weight.
        matrices: Shape of the weight, [groups, outputs, places of the kernel, inputs].
        pixels: Output pixels of all images.
    """
    groups, outputs, taps, inputs = matrices
    dense = "float32" if form.operator == "conv" else "int8"
    choice = Candidate(dense, 1.0, form.size_bytes)
    context.add_product(form.name, choice, groups * outputs, taps * inputs, pixels, form.remark, form.time)


def code_bounds(scale: Scale, low: float, high: float) -> tuple[float, float]:
    """Return the lowest and highest code for bounds of values, counted from the zero point."""
    first, last = float(scale.low - scale.zero), float(scale.high - scale.zero)
    bounds = [
        default if math.isinf(bound) else float(np.rint(np.float32(bound) / np.float32(scale.scale)))
        for bound, default in ((low, first), (high, last))
    ]
    return min(max(bounds[0], first), last), min(max(bounds[1], first), last)


def integer_layer(context: Lowering, node: fx.Node) -> IntegerLayer | None:
    """Return a convolution as one of codes, or None if its data or weight is none, or does not fit."""
    key = ("integer layer", node)
    if key not in context.shared:
        context.shared[key] = _integer_layer(context, node)
    layer: IntegerLayer | None = context.shared[key]
    return layer


def _integer_layer(context: Lowering, node: fx.Node) -> IntegerLayer | None:
    data, weight = node_argument(node, 0), node_argument(node, 1)
    scale = tensor_scale(context, data) if data.target is sq.dequantize.default else None
    if scale is None or not is_image(data) or weight.target is not sq.dequantize.default:
        return None
    windows = convolution_windows(node)
    axis = 1 if windows.transposed else 0
    outputs = tensor_of(node).shape[1]
    assert isinstance(outputs, int)
    stored = _weight_codes(context, weight, axis, outputs, windows)
    if stored is None:
        return None
    values, scales = stored
    matrices = _in_fours(kernel_matrices(torch.from_numpy(values), windows))
    if matrices.shape[2] * (-(-matrices.shape[3] // 4) * 4) > _MOST_PRODUCTS:
        return None
    bias, offset = _bias(context, argument(node, 2), scale.scale * scales, outputs)
    return IntegerLayer(node, node_argument(data, 0), scale, windows, matrices.numpy(), scales, bias, offset)


def _weight_codes(
    context: Lowering, node: fx.Node, axis: int, outputs: int, windows: Windows
) -> tuple[NDArray[np.int8], NDArray[np.float64]] | None:
    """Return a weight's codes less their zero points, and the scale of each output."""
    how = Granularity.of(node, 3, tensor_of(node).dim())
    parts = [context.constant(node_argument(node, position)) for position in range(3)]
    if any(part is None for part in parts) or how.axis not in (None, axis) or how.group_size is not None:
        return None
    codes, scale, zero = (part.numpy() for part in parts if part is not None)
    if codes.dtype not in (np.int8, np.uint8):
        return None
    spread = [1] * codes.ndim
    spread[axis] = -1
    values = codes.astype(np.int16) - (zero.reshape(spread) if how.axis is not None else zero.reshape(()))
    if values.size and (values.min() < _INT8.min or values.max() > _INT8.max):
        return None
    # Of a transposed convolution a scale belongs to the same output of every group.
    repeats = outputs // scale.size if scale.size else 1
    return values.astype(np.int8), np.tile(scale.astype(np.float64).reshape(-1), repeats)


def _in_fours(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices of groups whose inputs are in fours: several groups become one with zeros between them."""
    groups, outputs, taps, inputs = matrices.shape
    if groups == 1 or inputs % 4 == 0 or outputs == inputs == 1:
        return matrices
    merged = 4 // math.gcd(inputs, 4)
    merged = merged if groups % merged == 0 else groups
    result = matrices.new_zeros(groups // merged, merged, outputs, taps, merged, inputs)
    for place in range(merged):
        result[:, place, :, :, place] = matrices[place::merged]
    return result.reshape(groups // merged, merged * outputs, taps, merged * inputs)


def _bias(
    context: Lowering, bias: object, steps: NDArray[np.float64], outputs: int
) -> tuple[Ints | None, Floats | None]:
    """Return a bias in whole steps of the products if it has such codes, else in floats."""
    if not isinstance(bias, fx.Node):
        return None, None
    if bias.target is sq.dequantize.default:
        parts = [context.constant(node_argument(bias, position)) for position in range(3)]
        if all(part is not None for part in parts):
            codes, scale, zero = (part.numpy() for part in parts if part is not None)
            same = np.allclose(np.broadcast_to(scale, (outputs,)), steps, rtol=1e-6, atol=0)
            if codes.dtype == np.int32 and same and not np.any(zero):
                return codes, None
    numbers = context.constant(bias)
    assert numbers is not None
    return None, numbers.detach().float().numpy()


def few_channels(context: Lowering, layer: IntegerLayer) -> tuple[IntegerLayer, CodesImage] | None:
    """Return a layer over what a model is given, quantized with the padding around, or None.

    With at most four channels a pixel is less than a vector, but a row of the kernel is one run of memory, if no
    window reaches over the border. The channels of a pixel are filled up to four; where that would be more than half
    of what the kernel reads, a pixel has all columns that a row of the kernel sees instead.
    """
    source, windows = layer.source, layer.windows
    if source.target is not sq.quantize.default or min(*windows.before, *windows.behind) < 0:
        return None
    x = node_argument(source, 0)
    if tensor_of(x).dtype is not torch.float32 or not is_image(x):
        return None
    channels = tensor_of(x).shape[1]
    assert isinstance(channels, int)
    if channels > 4 or windows.spread != (1, 1) or windows.groups != 1 or not context.is_defined(x):
        return None
    border = (windows.before, windows.behind)
    layer = replace(layer, windows=windows.without_padding())
    (_, columns), (_, step) = windows.kernel, windows.stride
    room = -(-columns * channels // 4) * 4
    if windows.dilation[1] > 1 or room > min(columns * 4 // 2, _MOST_TAP_BYTES) or step > _MOST_TAP_STEP:
        value = quantized_image(context, x, layer.data, 4, border)
        return layer, CodesImage(value, channels, layer.data.shift)
    height, _ = windows.kernel
    matrices = layer.matrices.reshape(1, -1, height, columns * channels)
    width = image_shape(context, layer.node)[2]
    value = quantized_image(context, x, layer.data, room, border, (columns, step, width))
    image = CodesImage(value, columns * channels, layer.data.shift)
    return replace(layer, matrices=matrices, windows=layer.windows.of_columns()), image


def quantized_image(
    context: Lowering,
    x: fx.Node,
    scale: Scale,
    room: int,
    border: tuple[Sequence[int], Sequence[int]] = ((0, 0), (0, 0)),
    columns: tuple[int, int, Size] | None = None,
) -> Value:
    """Quantize an image of floats, with a border of zeros around it.

    Args:
        context: The plan under construction.
        x: The image.
        scale: Of the codes.
        room: Bytes of a pixel.
        border: Zeros above and to the left, below and to the right.
        columns: Where a pixel of the result has several columns of the image: how many, how far the next pixel's
            are, and how many pixels that makes.
    """
    (top, left), (bottom, right) = border
    batch, height, width = image_shape(context, x)
    value = context.value(x, "f32")
    if value.rank == 3:
        value = context.reshape(value, [*value.shape[:2], 1, value.shape[2]])
    pixels = width + left + right if columns is None else columns[2]
    shape = (batch, height + top + bottom, pixels, room)
    taps = () if columns is None else columns[:2]
    ints = (scale.zero, scale.low, scale.high, top, bottom, left, right, *taps)
    return context.step("quantize_image", [value], "u8", shape, ints, (scale.scale,))
