"""Products with stored weights: integer kernels for quantized ones, whatever the activation is.

- 8-bit weights multiply 8-bit codes: the program's own where it quantizes the activation, else codes of
  each row with a scale of its own.
- 4-bit weights multiply 8-bit codes with a scale for each group of the weight. An activation that the
  program quantizes at run time is taken before that: rounding twice would only add an error.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from sqcompile.backends.native import _native
from sqcompile.backends.native.kernels import PANEL
from sqcompile.backends.native.lower.choice import Candidate
from sqcompile.backends.native.lower.context import Lowering, node_argument, product, tensor_of
from sqcompile.backends.native.lower.quantized import (
    SYMMETRIC,
    Granularity,
    Rows,
    node_argument_of,
    quantize_rows,
    rows_of,
)
from sqcompile.backends.native.lower.weights import PackedWeight, pack, stored_weight
from sqcompile.backends.native.plan import Shape, Size, Value
from sqcompile.operators.table import argument

aten = torch.ops.aten
sq = torch.ops.sqcompile

# Roundings to 8 bits that leave 24: the second is of at most half a step of the first, and so on.
_PARTS = 3
_MIDDLE = 128  # the code of zero of unsigned codes


def quantized_linear(
    context: Lowering, node: fx.Node, data: fx.Node, weight: fx.Node, bias: object, *, outputs_axis: int
) -> Value | None:
    """Multiply by a stored quantized weight, or return None where that has to be done in float.

    Args:
        context: The plan under construction.
        node: The operator.
        data: Its activation [.., K].
        weight: Its weight, as the operator takes it.
        bias: Its bias, a node or None.
        outputs_axis: Which axis of the weight holds outputs.
    """
    if tensor_of(data).dim() < 1:
        return None
    fixed_bias = bias is None or context.is_constant(bias)
    rows = product(context.shape(data)[:-1])
    packed = _packed(context, weight, bias if fixed_bias else None, outputs_axis, rows)
    if packed is None:
        return None
    n, k = packed.ints[:2]
    context.add_product(packed.form, packed.choice, n, k, rows, packed.remark)
    result = _multiply(context, node, _activation(context, data, packed), packed)
    if fixed_bias:
        return result
    return context.step("add", [result, context.value(bias, "f32")], "f32", result.shape)


def _packed(
    context: Lowering, weight: fx.Node, bias: object, outputs_axis: int, rows: Size
) -> PackedWeight | None:
    """Pack a weight once, however many layers use it."""
    key = ("packed", weight, bias, outputs_axis)
    if key not in context.shared:
        stored = stored_weight(context, weight, outputs_axis)
        packed = None
        if stored is not None:
            numbers = None
            if isinstance(bias, fx.Node):
                tensor = context.constant(bias)
                assert tensor is not None
                numbers = np.broadcast_to(tensor.float().numpy(), (stored.shape[0],))
            packed = pack(context, stored, numbers, rows)
            if packed is None:
                context.notes.append(
                    f"{stored.name} is multiplied in float32: no integer kernel has its format"
                )
        context.shared[key] = packed
    found: PackedWeight | None = context.shared[key]
    return found


def _activation(context: Lowering, data: fx.Node, packed: PackedWeight) -> list[Rows]:
    """Return codes whose products add up to that of the activation: as a rule one."""
    group = packed.group_size
    rows = _program_codes(context, data, group) if group else rows_of(context, data)
    if rows is not None:
        return [rows]
    if context.exact:
        return _parts(context, data, group)
    context.rounded += 1
    if not group:
        return [quantize_rows(context, context.value(data), SYMMETRIC, signed=False)]
    source = context.value(_before_quantization(context, data))
    return [quantize_rows(context, source, SYMMETRIC, signed=True, scale_group=group, sum_group=group)]


def _program_codes(context: Lowering, data: fx.Node, group: int) -> Rows | None:
    """Return the program's own codes as products with group scales take them: signed, a scale for each row.

    Otherwise those products round what the program rounds at run time themselves, from the float value before it,
    with a scale for each group: closer to that value, but not the program's codes, so not when they have to be.
    """
    source = _before_quantization(context, data)
    if not context.exact or source is data:
        return None
    rank = tensor_of(data).dim()
    how = Granularity.of(data, 3, rank)
    scale = node_argument(node_argument(data, 0), 1)
    maker = node_argument_of(scale) if scale.target is operator.getitem else None
    if (
        maker is None
        or maker.target is not sq.dynamic_scale.default
        or maker.args[0] is not source
        or not argument(maker, 5)
        or (how.qmin, how.qmax) not in ((-128, 127), (-127, 127))
        or how.axis != rank - 1
        or how.group_size != -1
    ):
        return None
    return quantize_rows(context, context.value(source), SYMMETRIC, signed=True, sum_group=group)


def _parts(context: Lowering, data: fx.Node, group: int) -> list[Rows]:
    """Return codes of an activation, of what they leave over, and of what those leave over: 24 bits together."""
    key = ("parts", data, group)
    if key not in context.shared:
        rest = context.value(data)
        parts: list[Rows] = []
        for number in range(_PARTS):
            rows = quantize_rows(
                context, rest, SYMMETRIC, signed=bool(group), scale_group=group, sum_group=group
            )
            parts.append(rows)
            if number + 1 < _PARTS:
                rest = context.binary("sub", rest, _values(context, rows, rest.shape, group))
        context.shared[key] = parts
    found: list[Rows] = context.shared[key]
    return found


def _values(context: Lowering, rows: Rows, shape: Shape, group: int) -> Value:
    """Return what codes of one scale a row, or one a group, stand for."""
    m = rows.codes.shape[0]
    groups = -(-rows.columns // group) if group else 1
    width = groups * group if group else rows.columns
    codes = context.cast(context.slice(rows.codes, 1, 0, width), "f32")
    if not group:
        codes = context.binary("sub", codes, context.number(_MIDDLE, "f32"))
    codes = context.reshape(codes, (m, groups, width // groups))
    values = context.binary("mul", codes, context.reshape(rows.scale, (m, groups, 1)))
    return context.reshape(context.slice(context.reshape(values, (m, width)), 1, 0, rows.columns), shape)


def _before_quantization(context: Lowering, data: fx.Node) -> fx.Node:
    """Return the float activation behind one that is quantized by a scale from the data, or itself."""
    if data.target is not sq.dequantize.default:
        return data
    quantized = node_argument(data, 0)
    if quantized.target is not sq.quantize.default or context.is_constant(node_argument(data, 1)):
        return data
    return node_argument(quantized, 0)


def _multiply(context: Lowering, node: fx.Node, parts: list[Rows], packed: PackedWeight) -> Value:
    low, followers = _clamp_after(node) if len(parts) == 1 else (-math.inf, [])
    # The least part first, so that the sum is rounded where it is small.
    result = None
    for number, rows in reversed(list(enumerate(parts))):
        third = rows.sums if packed.group_size else rows.zero_point
        inputs = [rows.codes, rows.scale, third, *packed.arrays]
        if packed.bias is not None and number == 0:
            inputs.append(packed.bias)
        limits = (low, math.inf)
        part = context.step(packed.operator, inputs, "f32", context.shape(node), packed.ints, limits)
        result = part if result is None else context.binary("add", part, result)
    assert result is not None
    for follower in followers:
        context.define(follower, result)
    return result


def float_linear(
    context: Lowering, node: fx.Node, x: Value, weight: fx.Node, bias: object, *, outputs_axis: int
) -> Value:
    """Multiply x [.., K] by a stored float weight, packed once however many layers use it."""
    fixed_bias = bias is None or context.is_constant(bias)
    key = ("float", weight, bias if fixed_bias else None, outputs_axis)
    if key not in context.shared:
        matrix = context.constant(weight)
        assert matrix is not None
        context.shared[key] = pack_float(
            context,
            matrix if outputs_axis == 0 else matrix.t(),
            context.constant(bias) if fixed_bias else None,
        )
    float_weight: FloatWeight = context.shared[key]
    rows, size_bytes = product(x.shape[:-1]), 4.0 * float_weight.n * float_weight.k
    choice = Candidate("float32", 1.0, size_bytes)
    context.add_product("float32", choice, float_weight.n, float_weight.k, rows)
    low, followers = _clamp_after(node) if fixed_bias else (-math.inf, [])
    result = multiply_floats(context, x, float_weight, low)
    for follower in followers:
        context.define(follower, result)
    return result if fixed_bias else context.binary("add", result, context.value(bias, "f32"))


@dataclass(frozen=True)
class FloatWeight:
    """A float weight [N, K] in the order of fgemm.h, and its bias."""

    n: int
    k: int
    panels: Value
    bias: Value | None


def pack_float(context: Lowering, weight: torch.Tensor, bias: torch.Tensor | None) -> FloatWeight:
    """Pack a weight [N, K] and a bias of N numbers, or of one for all; bfloat16 stays as it is."""
    n, k = weight.shape
    halves = weight.dtype is torch.bfloat16
    packed = np.zeros(_native.fgemm_packed_bytes(n, k, halves), np.uint8)
    _native.fgemm_pack(np.ascontiguousarray(weight.detach().float().numpy()), halves, packed)
    padded = None
    if bias is not None:
        padded = np.zeros(-(-n // PANEL) * PANEL, np.float32)
        padded[:n] = bias.detach().float().numpy()
    return FloatWeight(
        n,
        k,
        context.plan.add_constant(packed.view(np.uint16 if halves else np.float32), "fgemm"),
        None if padded is None else context.plan.add_constant(padded, "panels"),
    )


def multiply_floats(context: Lowering, x: Value, weight: FloatWeight, low: float = -math.inf) -> Value:
    """Multiply x [.., K] by a packed weight; no result is less than `low`."""
    inputs = [context.contiguous(x), weight.panels]
    if weight.bias is not None:
        inputs.append(weight.bias)
    return context.step(
        "linear", inputs, "f32", (*x.shape[:-1], weight.n), (weight.n, weight.k), (low, math.inf)
    )


def _clamp_after(node: fx.Node) -> tuple[float, list[fx.Node]]:
    """Return the lowest result, and the operator that would have clamped it, which is done then."""
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.relu.default:
        return 0.0, users
    return -math.inf, []
