"""Reductions over dimensions.

A sum can lose a part: what is removed counts as zero. A mean can as well, with its result scaled to the
number of elements that it was taken over before. A maximum or a softmax cannot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sqcompile.channels.flow import Dim, Flow, Value, size_of
from sqcompile.channels.rules.registry import overloads, resize, rule
from sqcompile.operators.table import argument
from sqcompile.text import operator_name

if TYPE_CHECKING:
    from sqcompile.channels.shrink import Shrink

aten = torch.ops.aten
AVERAGED = "averaged"


def reduced_axes(node: fx.Node, rank: int, position: int = 1) -> list[int]:
    """Return the dimensions that a reduction is over, all of them if it names none."""
    dims = argument(node, position)
    if dims is None or dims == []:
        return list(range(rank))
    chosen = dims if isinstance(dims, (list, tuple)) else [dims]
    return [dim % max(rank, 1) for dim in chosen if isinstance(dim, int)]


def _without(flow: Flow, node: fx.Node, value: Value, axes: list[int]) -> Value:
    """Return the dimensions that stay; where the reduced ones are kept, they have one element."""
    result = node.meta["val"]
    first = result[0] if isinstance(result, (list, tuple)) else result
    if first.dim() == len(value):
        return tuple(
            flow.fixed(1, node, "it has one element") if axis in axes else dim
            for axis, dim in enumerate(value)
        )
    return tuple(dim for axis, dim in enumerate(value) if axis not in axes)


@rule(*overloads("mean.dim", "sum.dim_IntList"))
def average(flow: Flow, node: fx.Node) -> Value:
    """Sums over dimensions, or means."""
    value = flow.value(argument(node, 0))
    axes = reduced_axes(node, len(value))
    for axis in axes:
        flow.note(AVERAGED, value[axis], node)
    return _without(flow, node, value, axes)


@resize(*overloads("mean.dim"))
def scale_mean(shrink: Shrink, node: fx.Node) -> None:
    """A mean over n of what were m elements is scaled by n / m, as if the others were zero."""
    value = shrink.flow.value(argument(node, 0))
    factor = 1.0
    for axis in reduced_axes(node, len(value)):
        if shrink.shrinks(value[axis]):
            factor *= shrink.size(value[axis]) / size_of(value[axis])
    if factor != 1.0:
        shrink.scale_result(node, factor)


@rule(*overloads("linalg_vector_norm", "norm.ScalarOpt_dim"))
def norm(flow: Flow, node: fx.Node) -> Value:
    """Roots of sums of powers, which zeros do not change."""
    value = flow.value(argument(node, 0))
    axes = reduced_axes(node, len(value), 2)
    order = argument(node, 1)
    if not isinstance(order, (int, float)) or order <= 0:
        for axis in axes:
            flow.block(value[axis], node, f"a norm of order {order} is taken over it")
    return _without(flow, node, value, axes)


@rule(
    *overloads(
        *(
            f"{name}.{form}"
            for name in ("max", "min", "median", "mode", "kthvalue")
            for form in ("dim", "default")
        ),
        *(f"{name}.default" for name in ("amax", "amin", "argmax", "argmin", "sum", "mean", "logsumexp")),
        "prod.dim_int",
        "any.dim",
        "all.dim",
        "var.correction",
        "std.correction",
        "var_mean.correction",
        "var.dim",
        "std.dim",
    )
)
def extreme(flow: Flow, node: fx.Node) -> Any:
    """Reductions that depend on which elements there are."""
    value = flow.value(argument(node, 0))
    whole = len(node.args) < 2 and "dim" not in node.kwargs
    position = 2 if operator_name(node) == "kthvalue" else 1
    axes = list(range(len(value))) if whole else reduced_axes(node, len(value), position)
    _block(flow, node, [value[axis] for axis in axes])
    result = _without(flow, node, value, axes)
    recorded = node.meta["val"]
    return [result for _ in recorded] if isinstance(recorded, (list, tuple)) else result


@rule(
    *overloads(
        "softmax.int", "log_softmax.int", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp"
    )
)
def softmax(flow: Flow, node: fx.Node) -> Value:
    """Every element along the dimension depends on all others."""
    value = flow.value(argument(node, 0))
    _block(flow, node, [value[axis] for axis in reduced_axes(node, len(value))])
    return value


@rule(*overloads("sort", "sort.stable", "topk"))
def order(flow: Flow, node: fx.Node) -> Any:
    """Elements are moved along a dimension by their values."""
    value = flow.value(argument(node, 0))
    name = operator_name(node)
    position = {"sort": 1, "topk": 2}.get(name, 2)
    axis = argument(node, position, -1)
    assert isinstance(axis, int)
    _block(flow, node, [value[axis]])
    result = list(value)
    size = node.meta["val"][0].shape[axis]
    if size != size_of(value[axis]):
        result[axis] = flow.fixed(int(size), node, f"{name} selects from it by value")
    return [tuple(result), tuple(result)]


def _block(flow: Flow, node: fx.Node, dims: list[Dim]) -> None:
    for dim in dims:
        flow.block(dim, node, f"{operator_name(node).partition('.')[0]} over it depends on every part")
