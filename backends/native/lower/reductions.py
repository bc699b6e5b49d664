"""Operators along dimensions: sums, extremes, softmax and norms."""

from __future__ import annotations

import torch
from torch import fx

from sqcompile.backends.native.lower.context import (
    DTYPES,
    Lowering,
    Results,
    axis_argument,
    dtype_of,
    is_float,
    lowers,
    node_argument,
    product,
    tensor_of,
)
from sqcompile.backends.native.plan import Value
from sqcompile.operators.table import argument

aten = torch.ops.aten


def _axes(node: fx.Node, position: int) -> list[int]:
    """Return the dimensions that an operator reduces; none given means all."""
    rank = tensor_of(node_argument(node, 0)).dim()
    given = argument(node, position)
    if given is None or given == []:
        return list(range(rank))
    items = given if isinstance(given, (list, tuple)) else [given]
    axes = [axis % max(rank, 1) for axis in items if isinstance(axis, int)]
    return sorted(axes) if rank else []


def _reduce(
    context: Lowering, node: fx.Node, operation: str, value: Value, axes: list[int], dtype: str
) -> Value:
    """Reduce dimensions: they are moved to the end first, and left or dropped as the recorded shape says."""
    kept = [axis for axis in range(value.rank) if axis not in axes]
    moved = context.permute(value, [*kept, *axes])
    result = context.step(operation, [moved], dtype, [value.shape[axis] for axis in kept], (len(axes),))
    return context.reshape(result, context.shape(node))


def _no_sum(node: fx.Node) -> str | None:
    dtype = DTYPES.get(tensor_of(node).dtype)
    return None if dtype in ("f32", "i64", "i32") else f"reductions of {tensor_of(node).dtype}"


@lowers(aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, check=_no_sum)
def _total(context: Lowering, node: fx.Node) -> Value:
    name = node.target._schema.name  # type: ignore[union-attr]
    whole = node.target in (aten.sum.default, aten.mean.default)
    axes = list(range(tensor_of(node_argument(node, 0)).dim())) if whole else _axes(node, 1)
    operation = "reduce_mean" if name == "aten::mean" else "reduce_sum"
    dtype = dtype_of(node)
    return _reduce(context, node, operation, context.value(node.args[0], dtype), axes, dtype)


@lowers(aten.amax.default, aten.amin.default, check=_no_sum)
def _extreme(context: Lowering, node: fx.Node) -> Value:
    operation = "reduce_max" if node.target is aten.amax.default else "reduce_min"
    return _reduce(context, node, operation, context.value(node.args[0]), _axes(node, 1), dtype_of(node))


@lowers(aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims)
def _truth(context: Lowering, node: fx.Node) -> Value:
    name = node.target._schema.name  # type: ignore[union-attr]
    whole = node.target in (aten.any.default, aten.all.default)
    axes = list(range(tensor_of(node_argument(node, 0)).dim())) if whole else _axes(node, 1)
    operation = "reduce_any" if name == "aten::any" else "reduce_all"
    return _reduce(context, node, operation, context.value(node.args[0], "boolean"), axes, "boolean")


@lowers(aten.argmax.default, aten.argmin.default, check=lambda node: _no_argument(node))
def _arg_extreme(context: Lowering, node: fx.Node) -> Value:
    operation = "argmax" if node.target is aten.argmax.default else "argmin"
    value = context.value(node.args[0])
    if argument(node, 1) is None:
        value = context.reshape(value, [product(value.shape)])
        return context.reshape(context.step(operation, [value], "i64", ()), context.shape(node))
    axis = axis_argument(node, 1, value.rank)
    value = _last(context, value, axis)
    return context.reshape(context.step(operation, [value], "i64", value.shape[:-1]), context.shape(node))


def _no_argument(node: fx.Node) -> str | None:
    source = tensor_of(node_argument(node, 0))
    if source.dim() == 0:
        return "a single number"
    return None if DTYPES.get(source.dtype) in ("f32", "i64", "i32") else f"the largest of {source.dtype}"


def _last(context: Lowering, value: Value, axis: int) -> Value:
    """Return a view with one dimension moved to the end."""
    return context.permute(value, [*(other for other in range(value.rank) if other != axis), axis])


def _back(context: Lowering, value: Value, axis: int) -> Value:
    """Undo `_last`."""
    order = list(range(value.rank - 1))
    order.insert(axis, value.rank - 1)
    return context.permute(value, order)


@lowers(
    aten.cumsum.default,
    check=lambda node: (
        None
        if DTYPES.get(tensor_of(node).dtype) in ("f32", "i64") and tensor_of(node).dim()
        else f"running sums of {tensor_of(node).dtype}"
    ),
)
def _cumsum(context: Lowering, node: fx.Node) -> Value:
    value = context.value(node.args[0], dtype_of(node))
    axis = axis_argument(node, 1, value.rank)
    moved = _last(context, value, axis)
    return _back(context, context.step("cumsum", [moved], value.dtype, moved.shape), axis)


@lowers(
    aten.diff.default,
    check=lambda node: "differences of differences" if argument(node, 1, 1) != 1 else None,
)
def _diff(context: Lowering, node: fx.Node) -> Value:
    dtype = dtype_of(node)
    value = context.value(node.args[0])
    axis = axis_argument(node, 2, value.rank, -1)
    parts = [argument(node, 3), node.args[0], argument(node, 4)]
    values = [context.value(part) for part in parts if part is not None]
    shape = list(context.shape(node))
    if len(values) > 1:
        shape[axis] = shape[axis] + 1
        value = context.step("cat", values, value.dtype, shape, (axis,))
    length = context.shape(node)[axis]
    later, earlier = context.slice(value, axis, 1, length), context.slice(value, axis, 0, length)
    if dtype == "boolean":
        return context.step("bit_xor", [later, earlier], dtype, context.shape(node))
    return context.step("sub", [later, earlier], dtype, context.shape(node))


@lowers(
    aten.topk.default,
    check=lambda node: (
        None
        if is_float(node_argument(node, 0)) and tensor_of(node_argument(node, 0)).dim()
        else "the largest of integers"
    ),
)
def _top_k(context: Lowering, node: fx.Node) -> Results:
    value = context.value(node.args[0])
    axis = axis_argument(node, 2, value.rank, -1)
    moved = _last(context, value, axis)
    shape = (*moved.shape[:-1], context.size(argument(node, 1)))
    largest = int(bool(argument(node, 3, True)))
    parts = context.steps("top_k", [moved], [("f32", shape), ("i64", shape)], (largest,))
    return [_back(context, part, axis) for part in parts]


@lowers(
    aten.softmax.int,
    aten._softmax.default,
    check=lambda node: None if is_float(node) else "softmax of other than floats",
)
def _softmax(context: Lowering, node: fx.Node) -> Value:
    value = context.value(node.args[0], "f32")
    if value.rank == 0:
        return context.number(1, "f32")
    axis = axis_argument(node, 1, value.rank)
    moved = context.contiguous(_last(context, value, axis))
    return _back(context, context.step("softmax", [moved], "f32", moved.shape), axis)


@lowers(
    aten.layer_norm.default,
    check=lambda node: None if is_float(node) else "norms of other than floats",
)
def _layer_norm(context: Lowering, node: fx.Node) -> Value:
    value = context.value(node.args[0])
    normalized = argument(node, 1)
    assert isinstance(normalized, (list, tuple))
    count = len(normalized)
    columns = product(context.size(size) for size in normalized)
    rows = context.contiguous(context.reshape(value, [*value.shape[: value.rank - count], columns]))
    parameters = [
        None if item is None else context.contiguous(context.reshape(context.value(item, "f32"), [columns]))
        for item in (argument(node, 2), argument(node, 3))
    ]
    epsilon = argument(node, 4, 1e-5)
    assert isinstance(epsilon, float)
    result = context.step("layer_norm", [rows, *parameters], "f32", rows.shape, (), (epsilon,))
    return context.reshape(result, value.shape)


@lowers(
    aten.rms_norm.default,
    check=lambda node: (
        None
        if argument(node, 2) is not None and argument(node, 3) is not None and len(argument(node, 1)) == 1  # type: ignore[arg-type]
        else "norms over several dimensions, or without a weight"
    ),
)
def _rms_norm(context: Lowering, node: fx.Node) -> Value:
    value = context.contiguous(context.value(node.args[0]))
    weight = context.contiguous(context.value(argument(node, 2)))
    return context.step("rms_norm", [value, weight], "f32", value.shape, (), (float(argument(node, 3)),))  # type: ignore[arg-type]
