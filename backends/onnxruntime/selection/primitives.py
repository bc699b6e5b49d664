"""Last step of quantization: what is left of quantize, dequantize and dynamic_scale, one by one."""

from __future__ import annotations

import torch
from torch import fx

from sqcompile.backends.onnxruntime.selection.context import Context
from sqcompile.backends.onnxruntime.selection.values import (
    Mapping,
    as_dequantize,
    as_quantize,
    dynamic_arguments,
    rank_of,
)
from sqcompile.operators.table import argument
from sqcompile.quantization.affine import SMALLEST_SCALE
from sqcompile.quantization.format import middle_code, storage_dtype
from sqcompile.rewrite import Rewriter

aten = torch.ops.aten
ort = torch.ops.sqcompile_ort
sq = torch.ops.sqcompile

_LARGEST = float(torch.finfo(torch.float32).max)


def lower_primitives(context: Context) -> None:
    """Replace every remaining operator of `torch.ops.sqcompile`."""
    edit = context.edit
    for node in list(edit.graph.nodes):
        quantized, dequantized = as_quantize(node), as_dequantize(node)
        if quantized is None and dequantized is None:
            continue
        with edit.before(node):
            result = _quantize(context, quantized) if quantized else _dequantize(context, dequantized)
        edit.replace(node, result)
    edit.finish()
    for node in list(edit.graph.nodes):
        if node.target is sq.dynamic_scale.default:
            with edit.before(node):
                scale, zero_point = _dynamic_scale(edit, node)
            for user in list(node.users):
                edit.replace(user, scale if user.args[1] == 0 else zero_point)


def _quantize(context: Context, mapping: Mapping) -> fx.Node:
    edit = context.edit
    dtype = storage_dtype(mapping.qmin, mapping.qmax)
    limits = torch.iinfo(dtype)
    if mapping.group_size == -1 and mapping.axis in (-1, rank_of(mapping.source) - 1):
        codes = _quantize_rows(edit, mapping, dtype)
        return _clamped(edit, mapping, codes, limits)
    if _by_hand(mapping):
        return _quantize_by_hand(edit, mapping, dtype)
    if dynamic_arguments(mapping) == (mapping.source, None, None, 0, 255, False):
        return context.dynamic_codes(mapping)[0]
    codes = edit.call(
        ort.quantize_linear.default,
        mapping.source,
        mapping.scale,
        _typed_zero_point(context, mapping, dtype),
        mapping.axis,
        mapping.group_size,
        like=mapping.node,
    )
    return _clamped(edit, mapping, codes, limits)


def _clamped(edit: Rewriter, mapping: Mapping, codes: fx.Node, limits: torch.iinfo) -> fx.Node:
    """Bound codes that have less bits than their type: the operator saturates at the type's bounds only."""
    if (mapping.qmin, mapping.qmax) == (limits.min, limits.max):
        return codes
    return edit.call(aten.clamp.default, codes, mapping.qmin, mapping.qmax, like=mapping.node)


def _quantize_rows(edit: Rewriter, mapping: Mapping, dtype: torch.dtype) -> fx.Node:
    """One scale for each row: QuantizeLinear along the first axis of a matrix of all rows.

    One pass over the values, where division, rounding, shift, clamp and cast would take five.
    """
    like, x = mapping.node, mapping.source
    zero_point = edit.call(aten.to.dtype, mapping.zero_point, dtype, like=like)
    scale = edit.call(aten.reshape.default, mapping.scale, [-1], like=like)
    zero_point = edit.call(aten.reshape.default, zero_point, [-1], like=like)
    sizes: list[object] = list(x.meta["val"].shape)
    rows = x
    if len(sizes) != 2:
        rows = edit.call(aten.reshape.default, x, [-1, sizes[-1]], like=like)
    codes = edit.call(ort.quantize_linear.default, rows, scale, zero_point, 0, None, like=like)
    if len(sizes) == 2:
        return codes
    for axis in range(1, len(sizes) - 1):
        if not isinstance(sizes[axis], int):
            sizes[axis] = edit.call(aten.sym_size.int, x, axis, like=like)
    return edit.call(aten.reshape.default, codes, [-1, *sizes[1:]], like=like)


def _dequantize(context: Context, mapping: Mapping | None) -> fx.Node:
    assert mapping is not None
    edit, like = context.edit, mapping.node
    if _by_hand(mapping):
        scale, zero_point = (_spread(edit, mapping, item) for item in (mapping.scale, mapping.zero_point))
        values = edit.call(aten.to.dtype, mapping.source, torch.float32, like=like)
        shift = edit.call(aten.to.dtype, zero_point, torch.float32, like=like)
        values = edit.call(aten.sub.Tensor, values, shift, like=like)
        return edit.call(aten.mul.Tensor, values, scale, like=like)
    dtype = mapping.source.meta["val"].dtype
    return edit.call(
        ort.dequantize_linear.default,
        mapping.source,
        mapping.scale,
        None if dtype == torch.int32 else _typed_zero_point(context, mapping, dtype),
        mapping.axis,
        mapping.group_size,
        like=like,
    )


def _by_hand(mapping: Mapping) -> bool:
    """Whether QuantizeLinear does not know such scales: one for each token, or groups fitted at run time."""
    return mapping.group_size == -1 or (mapping.group_size is not None and not mapping.fixed)


def _quantize_by_hand(edit: Rewriter, mapping: Mapping, dtype: torch.dtype) -> fx.Node:
    like = mapping.node
    scale, zero_point = (_spread(edit, mapping, item) for item in (mapping.scale, mapping.zero_point))
    steps = edit.call(aten.div.Tensor, mapping.source, scale, like=like)
    steps = edit.call(aten.round.default, steps, like=like)
    shift = edit.call(aten.to.dtype, zero_point, torch.float32, like=like)
    steps = edit.call(aten.add.Tensor, steps, shift, like=like)
    steps = edit.call(aten.clamp.default, steps, mapping.qmin, mapping.qmax, like=like)
    return edit.call(aten.to.dtype, steps, dtype, like=like)


def _spread(edit: Rewriter, mapping: Mapping, parameter: fx.Node) -> fx.Node:
    """Return a scale or zero point that broadcasts against the values: each repeated for its group."""
    if mapping.group_size == -1:
        return parameter
    assert mapping.axis is not None and mapping.group_size is not None
    rank = rank_of(mapping.source)
    axis = mapping.axis % rank
    sizes = [-1] * (rank + 1)
    sizes[axis + 1] = mapping.group_size
    spread = edit.call(aten.unsqueeze.default, parameter, axis + 1, like=mapping.node)
    spread = edit.call(aten.expand.default, spread, sizes, like=mapping.node)
    spread = edit.call(aten.flatten.using_ints, spread, axis, axis + 1, like=mapping.node)
    length = mapping.source.meta["val"].shape[axis]
    if not isinstance(length, int) or length % mapping.group_size == 0:
        return spread
    return edit.call(aten.slice.Tensor, spread, axis, 0, length, like=mapping.node)


def _typed_zero_point(context: Context, mapping: Mapping, dtype: torch.dtype) -> fx.Node:
    if mapping.zero_point.op == "get_attr":
        return context.typed_zero_point(mapping, dtype)
    return context.edit.call(aten.to.dtype, mapping.zero_point, dtype, like=mapping.node)


def _dynamic_scale(edit: Rewriter, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Spell out the arithmetic of `sqcompile.quantization.affine.unchecked_scale`."""
    x, qmin, qmax, symmetric = (argument(node, index) for index in (0, 3, 4, 5))
    assert isinstance(x, fx.Node) and isinstance(qmin, int) and isinstance(qmax, int)
    middle = middle_code(qmin, qmax)

    def call(target: torch._ops.OpOverload, *args: object) -> fx.Node:
        return edit.call(target, *args, like=node)

    if symmetric:
        span = _reduce(edit, node, call(aten.abs.default, x), aten.amax.default)
        steps = qmax - middle
    else:
        low = call(aten.clamp_max.default, _reduce(edit, node, x, aten.amin.default), 0.0)
        high = call(aten.clamp_min.default, _reduce(edit, node, x, aten.amax.default), 0.0)
        span = call(aten.clamp_max.default, call(aten.sub.Tensor, high, low), _LARGEST)
        steps = qmax - qmin
    scale = call(aten.clamp_min.default, call(aten.div.Tensor, span, float(steps)), SMALLEST_SCALE)
    scale = call(aten.where.ScalarSelf, call(aten.eq.Scalar, span, 0.0), 1.0, scale)
    if symmetric:
        return scale, call(aten.full_like.default, call(aten.to.dtype, scale, torch.int32), middle)
    zero = call(aten.rsub.Scalar, call(aten.div.Tensor, low, scale), float(qmin))
    zero = call(aten.round.default, call(aten.clamp.default, zero, qmin, qmax))
    return scale, call(aten.to.dtype, zero, torch.int32)


def _reduce(edit: Rewriter, node: fx.Node, x: fx.Node, reduction: torch._ops.OpOverload) -> fx.Node:
    axis, group_size = argument(node, 1), argument(node, 2)
    rank = rank_of(x)
    if axis is None:
        return edit.call(reduction, x, list(range(rank)), like=node)
    assert isinstance(axis, int)
    axis %= rank
    if group_size is None:
        return edit.call(reduction, x, [dim for dim in range(rank) if dim != axis], like=node)
    if group_size == -1:
        return edit.call(reduction, x, [axis], True, like=node)
    assert isinstance(group_size, int)
    padding = -x.meta["val"].shape[axis] % group_size
    if not isinstance(padding, int) or padding:
        # Zeros change no range: every range holds zero.
        x = edit.call(aten.constant_pad_nd.default, x, [0, 0] * (rank - 1 - axis) + [0, padding], like=node)
    blocks = edit.call(aten.unflatten.int, x, axis, [-1, group_size], like=node)
    return edit.call(reduction, blocks, [axis + 1], like=node)
