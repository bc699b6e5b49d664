"""Pieces: dimensions are concatenated, cut, padded, reversed and looked up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from sqcompile.channels.atoms import Labels
from sqcompile.channels.flow import Dim, Flow, Part, Reason, Value, labels_of, size_of, sizes_of
from sqcompile.channels.rules.pointwise import broadcast
from sqcompile.channels.rules.registry import overloads, resize, rule
from sqcompile.operators.table import argument
from sqcompile.text import operator_name

if TYPE_CHECKING:
    from sqcompile.channels.shrink import Shrink

aten = torch.ops.aten


def _axis(node: fx.Node, position: int, rank: int, default: int = 0) -> int:
    axis = argument(node, position, default)
    assert isinstance(axis, int)
    return axis % rank


@rule(*overloads("cat", "concat", "concatenate"))
def cat(flow: Flow, node: fx.Node) -> Value:
    """One dimension holds those of all, one behind the other; the others are one."""
    operands = argument(node, 0)
    assert isinstance(operands, (list, tuple))
    sizes = flow.sizes(node)
    values = [value for item in operands if len(value := flow.value(item)) == len(sizes)]
    axis = _axis(node, 1, len(sizes))
    result = list(values[0])
    for other in values[1:]:
        for index, dim in enumerate(other):
            if index != axis:
                result[index] = flow.unify(result[index], dim, node)
    result[axis] = _concatenated(flow, node, [value[axis] for value in values], sizes[axis])
    return tuple(result)


def _concatenated(flow: Flow, node: fx.Node, dims: Sequence[Dim], size: Any) -> Dim:
    labels = [labels_of(dim) for dim in dims]
    known = [item for item in labels if item is not None]
    if len(known) != len(labels):
        for dim in dims:
            flow.block(dim, node, "it is concatenated with a dynamic dimension")
        return flow.fixed(size, node, "it is concatenated with a dynamic dimension")
    width = max(item.shape[1] for item in known)
    padded = [np.pad(item, ((0, 0), (0, width - item.shape[1])), constant_values=-1) for item in known]
    return (Part(size, np.concatenate(padded)),)


@rule(*overloads("stack"))
def stack(flow: Flow, node: fx.Node) -> Value:
    """A new dimension counts the values."""
    operands = argument(node, 0)
    assert isinstance(operands, (list, tuple))
    values = [flow.value(item) for item in operands]
    axis = _axis(node, 1, len(values[0]) + 1)
    result = list(values[0])
    for other in values[1:]:
        for index, dim in enumerate(other):
            result[index] = flow.unify(result[index], dim, node)
    return (*result[:axis], flow.fixed(len(values), node, "it counts what is stacked"), *result[axis:])


@rule(*overloads("chunk", "split.Tensor", "split_with_sizes", "tensor_split.sections", "split.sizes"))
def split(flow: Flow, node: fx.Node) -> list[Value]:
    """Consecutive pieces of a dimension."""
    value = flow.value(argument(node, 0))
    axis = _axis(node, 2, len(value))
    labels = labels_of(value[axis])
    pieces: list[Value] = []
    start = 0
    for piece in node.meta["val"]:
        size = sizes_of(piece)[axis]
        dim = (Part(size),) if labels is None else _piece(flow, labels[start : start + size])
        if labels is not None:
            start += size
        pieces.append((*value[:axis], dim, *value[axis + 1 :]))
    return pieces


@resize(*overloads("chunk", "split.Tensor", "split_with_sizes", "tensor_split.sections", "split.sizes"))
def resize_split(shrink: Shrink, node: fx.Node) -> None:
    """The sizes of the pieces; where they are no longer alike, each is named."""
    value = shrink.flow.value(argument(node, 0))
    axis = _axis(node, 2, len(value))
    if not shrink.shrinks(value[axis]):
        return
    sizes = [shrink.size(piece[axis]) for piece in shrink.flow.values[node]]
    name = operator_name(node)
    alike = len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0] and sizes[0] > 0
    if name in ("chunk", "split") and alike and sizes[0] == sizes[-1]:
        if name == "split":
            shrink.set_argument(node, 1, sizes[0])
        return
    node.target = aten.split_with_sizes.default
    node.args = (node.args[0], sizes, axis)
    node.kwargs = {}
    shrink.changed(node)


def _piece(flow: Flow, labels: Labels) -> Dim:
    """Return a piece of a dimension; a group never loses a whole piece."""
    flow.pieces.append(labels)
    return (Part(len(labels), labels),)


@rule(*overloads("unbind.int"))
def unbind(flow: Flow, node: fx.Node) -> list[Value]:
    """Every position of a dimension becomes a value."""
    value = flow.value(argument(node, 0))
    axis = _axis(node, 1, len(value))
    flow.block(value[axis], node, "unbind makes a value of each position")
    return [(*value[:axis], *value[axis + 1 :]) for _ in node.meta["val"]]


@rule(*overloads("select.int"))
def select(flow: Flow, node: fx.Node) -> Value:
    """One position of a dimension, which therefore has to stay."""
    value = flow.value(argument(node, 0))
    axis = _axis(node, 1, len(value))
    index, labels = argument(node, 2), labels_of(value[axis])
    if labels is not None:
        chosen = labels[index : index + 1 or None] if isinstance(index, int) else labels
        flow.atoms.block(chosen, Reason("select takes one position of it by number", node))
    return (*value[:axis], *value[axis + 1 :])


@resize(*overloads("select.int"))
def resize_select(shrink: Shrink, node: fx.Node) -> None:
    """The place where the position is now."""
    value = shrink.flow.value(argument(node, 0))
    dim, index = value[_axis(node, 1, len(value))], argument(node, 2)
    if shrink.shrinks(dim) and isinstance(index, int) and index >= 0:
        shrink.set_argument(node, 2, int(shrink.keep(dim)[:index].sum()))
    elif shrink.shrinks(dim) and isinstance(index, int):
        shrink.set_argument(node, 2, -1 - int(shrink.keep(dim)[index:][1:].sum()))


@rule(*overloads("slice.Tensor"))
def cut(flow: Flow, node: fx.Node) -> Value:
    """A range of a dimension."""
    value = flow.value(argument(node, 0))
    axis = _axis(node, 1, len(value))
    labels = labels_of(value[axis])
    start, end, step = (argument(node, position) for position in (2, 3, 4))
    size = flow.sizes(node)[axis]
    plain = all(item is None or isinstance(item, int) for item in (start, end, step))
    if labels is None or not plain:
        if size == size_of(value[axis]):
            return value
        flow.block(value[axis], node, "slice takes a range of it that is computed")
        dim = flow.fixed(size, node, "slice takes a range of a dynamic dimension")
    else:
        dim = _piece(flow, labels[start:end:step])
    return (*value[:axis], dim, *value[axis + 1 :])


@resize(*overloads("slice.Tensor"))
def resize_slice(shrink: Shrink, node: fx.Node) -> None:
    """The range where the kept positions lie now; a table of them where they are no range."""
    value = shrink.flow.value(argument(node, 0))
    axis = _axis(node, 1, len(value))
    if not shrink.shrinks(value[axis]):
        return
    keep = shrink.keep(value[axis])
    start, end, step = (argument(node, position) for position in (2, 3, 4))
    positions = np.arange(len(keep))[start:end:step]
    wanted = (np.cumsum(keep) - 1)[positions[keep[positions]]]
    gaps = np.diff(wanted)
    if not len(wanted):
        shrink.set_argument(node, 2, 0)
        shrink.set_argument(node, 3, 0)
    elif not len(gaps) or (gaps == gaps[0]).all():
        stride = int(gaps[0]) if len(gaps) else 1
        to_the_end = end is None or (isinstance(end, int) and end >= len(keep))
        shrink.set_argument(node, 2, int(wanted[0]) if start is not None else None)
        shrink.set_argument(node, 3, end if to_the_end and stride == 1 else int(wanted[-1]) + 1)
        shrink.set_argument(node, 4, stride)
    else:
        table = shrink.constant(f"{node.name}_index", torch.from_numpy(wanted), node)
        node.target = aten.index_select.default
        node.args, node.kwargs = (node.args[0], axis, table), {}
        shrink.changed(node)


@rule(*overloads("pad", "constant_pad_nd"))
def pad(flow: Flow, node: fx.Node) -> Value:
    """Positions are added before and behind, or taken away; what is added may go again."""
    value, amounts = flow.value(argument(node, 0)), argument(node, 1)
    assert isinstance(amounts, (list, tuple))
    is_constant = operator_name(node) != "pad" or argument(node, 2, "constant") == "constant"
    result = list(value)
    for index in range(len(amounts) // 2):
        axis = len(value) - 1 - index
        before, behind = amounts[2 * index], amounts[2 * index + 1]
        if before == behind == 0:
            continue
        labels, size = labels_of(value[axis]), flow.sizes(node)[axis]
        plain = isinstance(before, int) and isinstance(behind, int)
        if labels is None or not plain or not is_constant:
            flow.block(value[axis], node, "padding repeats parts of it")
            result[axis] = flow.fixed(size, node, "it is padded")
            continue
        inside = (Part(len(labels), labels[max(0, -before) : len(labels) - max(0, -behind)]),)
        ends = [flow.fresh(max(0, count), node) for count in (before, behind)]
        result[axis] = _concatenated(flow, node, [ends[0], inside, ends[1]], size)
    return tuple(result)


@resize(*overloads("pad", "constant_pad_nd"))
def resize_pad(shrink: Shrink, node: fx.Node) -> None:
    """As many positions as are wanted now."""
    value, amounts = shrink.flow.value(argument(node, 0)), argument(node, 1)
    result = shrink.flow.value(node)
    assert isinstance(amounts, (list, tuple))
    new = list(amounts)
    for index in range(len(amounts) // 2):
        axis = len(value) - 1 - index
        if labels_of(result[axis]) is None or not (
            shrink.shrinks(result[axis]) or shrink.shrinks(value[axis])
        ):
            continue
        before, behind = amounts[2 * index], amounts[2 * index + 1]
        if not isinstance(before, int) or not isinstance(behind, int):
            continue
        outside, inside = shrink.keep(result[axis]), shrink.keep(value[axis])
        new[2 * index] = int(outside[:before].sum()) if before > 0 else -int(inside[:-before].sum())
        behind_kept = outside[len(outside) - behind :] if behind > 0 else inside[len(inside) + behind :]
        new[2 * index + 1] = int(behind_kept.sum()) * (1 if behind > 0 else -1)
    shrink.set_argument(node, 1, new)


@rule(*overloads("flip"))
def flip(flow: Flow, node: fx.Node) -> Value:
    """The order of positions is reversed."""
    value, axes = list(flow.value(argument(node, 0))), argument(node, 1)
    assert isinstance(axes, (list, tuple))
    for axis in axes:
        labels = labels_of(value[int(axis)])
        if labels is not None:
            value[int(axis)] = (Part(len(labels), labels[::-1]),)
    return tuple(value)


@rule(*overloads("roll"))
def roll(flow: Flow, node: fx.Node) -> Value:
    """Positions move around by a number of places."""
    value, axes = flow.value(argument(node, 0)), argument(node, 2)
    assert isinstance(axes, (list, tuple))
    for axis in axes or range(len(value)):
        flow.block(value[int(axis)], node, "roll moves its positions by a number")
    return value


@rule(*overloads("glu"))
def glu(flow: Flow, node: fx.Node) -> Value:
    """The first half of a dimension times the sigmoid of the second."""
    value = flow.value(argument(node, 0))
    axis = _axis(node, 1, len(value), -1)
    labels = labels_of(value[axis])
    assert labels is not None
    half = len(labels) // 2
    first, second = (Part(half, labels[:half]),), (Part(half, labels[half:]),)
    return (*value[:axis], flow.unify(first, second, node), *value[axis + 1 :])


@rule(*overloads("index_select"))
def index_select(flow: Flow, node: fx.Node) -> Value:
    """Positions by number."""
    value = flow.value(argument(node, 0))
    axis = _axis(node, 1, len(value))
    flow.block(value[axis], node, "its positions are looked up by number")
    return (*value[:axis], flow.value(argument(node, 2))[0], *value[axis + 1 :])


@rule(*overloads("index.Tensor"))
def index(flow: Flow, node: fx.Node) -> Value:
    """Positions by number in some dimensions; those without an index pass."""
    value, indices = flow.value(argument(node, 0)), argument(node, 1)
    assert isinstance(indices, (list, tuple))
    chosen = [axis for axis, item in enumerate(indices) if item is not None]
    for axis in chosen:
        flow.block(value[axis], node, "its positions are looked up by number")
    tables = [flow.value(indices[axis]) for axis in chosen]
    is_mask = any(indices[axis].meta["val"].dtype is torch.bool for axis in chosen)
    adjacent = chosen == list(range(chosen[0], chosen[-1] + 1))
    if is_mask or not adjacent:
        for dim in value:
            flow.block(dim, node, "it is looked up by a mask")
        result: Value = flow.all_fixed(node.meta["val"], node, "it is looked up by a mask")
        return result
    found = broadcast(flow, node, tables)
    return (*value[: chosen[0]], *found, *value[chosen[-1] + 1 :])
