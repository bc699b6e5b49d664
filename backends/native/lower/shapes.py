"""Operators that move elements: views, pieces, and tensors made from sizes."""

from __future__ import annotations

import operator

import sympy
import torch
from torch import fx

from sqcompile.backends.native.lower.context import (
    Lowering,
    Results,
    axis_argument,
    dtype_of,
    int_argument,
    lowers,
    node_argument,
    tensor_of,
)
from sqcompile.backends.native.plan import Size, Value
from sqcompile.operators.fills import FILLS, fill_value
from sqcompile.operators.table import argument

aten = torch.ops.aten


@lowers(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view_as.default,
    aten.reshape_as.default,
)
def _reshape(context: Lowering, node: fx.Node) -> Value:
    """The recorded shape says it all."""
    return context.reshape(context.value(node.args[0]), context.shape(node))


@lowers(
    aten.alias.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.detach.default,
    aten.dropout.default,
    aten.lift_fresh_copy.default,
    torch.ops.sqcompile.mask.default,
    check=lambda node: (
        "dropout that is switched on"
        if node.target is aten.dropout.default and argument(node, 2)
        else "a mask that depends on the call"
        if node.target is torch.ops.sqcompile.mask.default
        else None
    ),
)
def _same(context: Lowering, node: fx.Node) -> Value:
    """Memory order and identity mean nothing in a plan."""
    return context.value(node.args[0])


@lowers(
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
)
def _cast(context: Lowering, node: fx.Node) -> Value:
    """Devices and layouts mean nothing here; the recorded type says what is left."""
    return context.value(node.args[0], dtype_of(node))


@lowers(aten.transpose.int)
def _transpose(context: Lowering, node: fx.Node) -> Value:
    value = context.value(node.args[0])
    order = list(range(value.rank))
    if value.rank:
        a, b = (axis_argument(node, position, value.rank) for position in (1, 2))
        order[a], order[b] = order[b], order[a]
    return context.permute(value, order)


@lowers(aten.t.default, aten.mT.default)
def _matrix_transpose(context: Lowering, node: fx.Node) -> Value:
    value = context.value(node.args[0])
    if value.rank < 2:
        return value
    return context.permute(value, [*range(value.rank - 2), value.rank - 1, value.rank - 2])


@lowers(aten.permute.default)
def _permute(context: Lowering, node: fx.Node) -> Value:
    value = context.value(node.args[0])
    dims = argument(node, 1)
    assert isinstance(dims, (list, tuple))
    return context.permute(value, [int(axis) % value.rank for axis in dims])


@lowers(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(context: Lowering, node: fx.Node) -> Value:
    return context.expand(context.value(node.args[0]), context.shape(node))


@lowers(aten.slice.Tensor)
def _slice(context: Lowering, node: fx.Node) -> Value:
    value = context.value(node.args[0])
    axis = axis_argument(node, 1, value.rank, 0)
    start = argument(node, 2)
    first = _first(0 if start is None else context.size(start), value.shape[axis])
    return context.slice(value, axis, first, context.shape(node)[axis], int_argument(node, 4, 1))


def _first(start: Size, size: Size) -> Size:
    """Return where a slice begins: negative starts count from the end, and none lies outside."""
    if start == 0:
        return 0
    if isinstance(start, int) and isinstance(size, int):
        return min(start, size) if start > 0 else max(0, size + start)
    if isinstance(start, int) and start < 0:
        return sympy.Max(0, size + start)
    return sympy.Min(start, size)


@lowers(aten.select.int)
def _select(context: Lowering, node: fx.Node) -> Value:
    value = context.value(node.args[0])
    axis = axis_argument(node, 1, value.rank)
    index = context.size(argument(node, 2))
    if isinstance(index, int) and index < 0:
        index = index + value.shape[axis]
    return context.reshape(context.slice(value, axis, index, 1), context.shape(node))


@lowers(
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.tensor_split.sections,
)
def _split(context: Lowering, node: fx.Node) -> Results:
    """The recorded parts say where each begins."""
    value = context.value(node.args[0])
    one = node.target is aten.unbind.int
    axis = axis_argument(node, 1 if one else 2, value.rank, 0)
    parts: Results = []
    first: Size = 0
    for part in node.meta["val"]:
        length = 1 if one else context.size(part.shape[axis])
        piece = context.slice(value, axis, first, length)
        shape = [context.size(size) for size in part.shape]
        parts.append(context.reshape(piece, shape))
        first = first + length
    return parts


@lowers(operator.getitem)
def _getitem(context: Lowering, node: fx.Node) -> Value:
    return context.values(node_argument_of_getitem(node))[int(node.args[1])]  # type: ignore[arg-type]


def node_argument_of_getitem(node: fx.Node) -> fx.Node:
    """Return the node whose result this takes."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


@lowers(aten.cat.default)
def _cat(context: Lowering, node: fx.Node) -> Value:
    items = node.args[0]
    assert isinstance(items, (list, tuple))
    rank = tensor_of(node).dim()
    # An empty tensor of one dimension goes with everything, for reasons of history.
    kept = [item for item in items if isinstance(item, fx.Node) and tensor_of(item).dim() == rank]
    values = [context.value(item, dtype_of(node)) for item in kept]
    if len(values) == 1:
        return values[0]
    axis = axis_argument(node, 1, rank, 0)
    return context.step("cat", values, dtype_of(node), context.shape(node), (axis,))


@lowers(aten.stack.default)
def _stack(context: Lowering, node: fx.Node) -> Value:
    items = node.args[0]
    assert isinstance(items, (list, tuple))
    shape = context.shape(node)
    axis = axis_argument(node, 1, len(shape), 0)
    one = [*shape[:axis], 1, *shape[axis + 1 :]]
    values = [context.reshape(context.value(item, dtype_of(node)), one) for item in items]
    return context.step("cat", values, dtype_of(node), shape, (axis,))


@lowers(aten.arange.default, aten.arange.start, aten.arange.start_step, check=lambda node: _no_iota(node))
def _arange(context: Lowering, node: fx.Node) -> Value:
    first: Size = 0 if node.target is aten.arange.default else context.size(argument(node, 0))
    step = context.size(argument(node, 2)) if node.target is aten.arange.start_step else 1
    value = context.step("iota", (), "i64", context.shape(node), (first, step))
    return context.cast(value, dtype_of(node))


def _no_iota(node: fx.Node) -> str | None:
    if any(isinstance(item, float) for item in (*node.args, *node.kwargs.values())):
        return "a range with steps that are no whole numbers"
    return None


@lowers(*FILLS)
def _fill(context: Lowering, node: fx.Node) -> Value:
    """One number, shown everywhere."""
    return context.expand(context.value(fill_value(node), dtype_of(node)), context.shape(node))


@lowers(
    aten.embedding.default,
    check=lambda node: None if tensor_of(node_argument(node, 0)).dim() == 2 else "a table of other than rows",
)
def _embedding(context: Lowering, node: fx.Node) -> Value:
    from sqcompile.backends.native.lower.quantized import embedding_of_codes

    indices = context.value(node.args[1], "i64")
    rows = embedding_of_codes(context, node, indices)
    if rows is not None:
        return rows
    table = context.constant(node.args[0])
    if table is not None and table.dtype is torch.bfloat16:
        halves = context.plan.add_constant(table.detach().contiguous().view(torch.uint16).numpy())
        rows = context.step("index", [halves, indices], "bf16", context.shape(node), (0,))
        return context.cast(rows, "f32")
    return context.step(
        "index", [context.value(node.args[0]), indices], dtype_of(node), context.shape(node), (0,)
    )


def _no_index(node: fx.Node) -> str | None:
    indices = node.args[1]
    assert isinstance(indices, (list, tuple))
    present = [place for place, item in enumerate(indices) if item is not None]
    if present != list(range(present[0], present[-1] + 1)):
        return "indices that do not lie beside each other"
    for place in present:
        item = indices[place]
        if not isinstance(item, fx.Node) or tensor_of(item).dtype not in (torch.int64, torch.int32):
            return "an index that is no tensor of integers"
    return None


@lowers(aten.index.Tensor, check=_no_index)
def _index(context: Lowering, node: fx.Node) -> Value:
    indices = node.args[1]
    assert isinstance(indices, (list, tuple))
    first = next(place for place, item in enumerate(indices) if item is not None)
    values = [context.value(item, "i64") for item in indices if item is not None]
    return context.step(
        "index", [context.value(node.args[0]), *values], dtype_of(node), context.shape(node), (first,)
    )


@lowers(aten.index_select.default)
def _index_select(context: Lowering, node: fx.Node) -> Value:
    value = context.value(node.args[0])
    axis = axis_argument(node, 1, value.rank)
    indices = context.reshape(context.value(node.args[2], "i64"), [context.shape(node)[axis]])
    return context.step("index", [value, indices], value.dtype, context.shape(node), (axis,))


@lowers(aten.gather.default)
def _gather(context: Lowering, node: fx.Node) -> Value:
    value, indices = context.value(node.args[0]), context.value(node.args[2])
    axis = axis_argument(node, 1, value.rank)
    order = [*(other for other in range(value.rank) if other != axis), axis]
    value, indices = context.permute(value, order), context.permute(indices, order)
    result = context.step("gather", [value, indices], value.dtype, indices.shape)
    return context.permute(result, [order.index(axis) for axis in range(value.rank)])
