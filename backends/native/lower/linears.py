"""Products with stored weights: integer kernels for quantized ones, whatever the activation is.

- 8-bit weights multiply 8-bit codes: the program's own where it quantizes the activation, else codes of
  each row with a scale of its own.
- 4-bit weights multiply 8-bit codes with a scale for each group of the weight. An activation that the
  program quantizes at run time is taken before that: rounding twice would only add an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from sqcompile.backends.native import _native
from sqcompile.backends.native.kernels import PANEL
from sqcompile.backends.native.lower.context import Lowering, node_argument, tensor_of
from sqcompile.backends.native.lower.quantized import SYMMETRIC, Rows, quantize_rows, rows_of
from sqcompile.backends.native.lower.weights import PackedWeight, pack, stored_weight
from sqcompile.backends.native.plan import Value

aten = torch.ops.aten
sq = torch.ops.sqcompile


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
    packed = _packed(context, weight, bias if fixed_bias else None, outputs_axis)
    if packed is None:
        return None
    result = _multiply(context, node, _activation(context, data, packed), packed)
    if fixed_bias:
        return result
    return context.step("add", [result, context.value(bias, "f32")], "f32", result.shape)


def _packed(context: Lowering, weight: fx.Node, bias: object, outputs_axis: int) -> PackedWeight | None:
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
            packed = pack(context, stored, numbers)
            if packed is None:
                context.notes.append(
                    f"{stored.name} is multiplied in float32: no integer kernel has its format"
                )
            elif packed.operator in ("linear_q8_sparse", "linear_q8_block", "linear_q4_sparse"):
                context.notes.append(f"{stored.name}: {packed.form}")
        context.shared[key] = packed
    found: PackedWeight | None = context.shared[key]
    return found


def _activation(context: Lowering, data: fx.Node, packed: PackedWeight) -> Rows:
    if packed.group_size:
        source = _before_quantization(context, data)
        context.rounded += 1
        group = packed.group_size
        return quantize_rows(
            context, context.value(source), SYMMETRIC, signed=True, scale_group=group, sum_group=group
        )
    rows = rows_of(context, data)
    if rows is not None:
        return rows
    context.rounded += 1
    return quantize_rows(context, context.value(data), SYMMETRIC, signed=False)


def _before_quantization(context: Lowering, data: fx.Node) -> fx.Node:
    """Return the float activation behind one that is quantized by a scale from the data, or itself."""
    if data.target is not sq.dequantize.default:
        return data
    quantized = node_argument(data, 0)
    if quantized.target is not sq.quantize.default or context.is_constant(node_argument(data, 1)):
        return data
    return node_argument(quantized, 0)


def _multiply(context: Lowering, node: fx.Node, rows: Rows, packed: PackedWeight) -> Value:
    shape = context.shape(node)
    third = rows.sums if packed.group_size else rows.zero_point
    inputs = [rows.codes, rows.scale, third, *packed.arrays]
    if packed.bias is not None:
        inputs.append(packed.bias)
    low, followers = _clamp_after(node)
    result = context.step(packed.operator, inputs, "f32", shape, packed.ints, (low, math.inf))
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
    low, followers = _clamp_after(node) if fixed_bias else (-math.inf, [])
    result = multiply_floats(context, x, context.shared[key], low)
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
    """Pack a weight [N, K] and a bias of N numbers, or of one for all."""
    n, k = weight.shape
    packed = np.zeros(_native.fgemm_packed_bytes(n, k, False), np.uint8)
    _native.fgemm_pack(np.ascontiguousarray(weight.detach().float().numpy()), False, packed)
    padded = None
    if bias is not None:
        padded = np.zeros(-(-n // PANEL) * PANEL, np.float32)
        padded[:n] = bias.detach().float().numpy()
    return FloatWeight(
        n,
        k,
        context.plan.add_constant(packed.view(np.float32), "fgemm"),
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
