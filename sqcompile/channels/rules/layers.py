"""Layers: operators with a stored weight that sum over one dimension and make another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from sqcompile.channels.flow import Dim, Flow, Value, labels_of, size_of
from sqcompile.channels.rules.registry import overloads, resize, rule
from sqcompile.channels.rules.spatial import SPATIAL
from sqcompile.operators.table import argument

if TYPE_CHECKING:
    from sqcompile.channels.shrink import Shrink

aten = torch.ops.aten

_CONVOLUTIONS = overloads(*(f"conv{n}d.{form}" for n in (1, 2, 3) for form in ("default", "padding")))
_TRANSPOSED = overloads("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input")


@rule(aten.linear.default)
def linear(flow: Flow, node: fx.Node) -> Value:
    """Data x [..., I], weight [O, I], bias [O]: sums over I, makes O."""
    value, weight = flow.value(argument(node, 0)), flow.value(argument(node, 1))
    flow.unify(value[-1], weight[-1], node)
    if len(weight) == 1:
        return value[:-1]
    _bias(flow, node, argument(node, 2), weight[0])
    return (*value[:-1], weight[0])


@rule(*overloads("addmm"))
def addmm(flow: Flow, node: fx.Node) -> Value:
    """Data x [N, I], bias [O], weight [I, O]."""
    value, weight = flow.value(argument(node, 1)), flow.value(argument(node, 2))
    flow.unify(value[1], weight[0], node)
    bias = flow.value(argument(node, 0))
    if bias and size_of(bias[-1]) != 1:
        flow.unify(weight[1], bias[-1], node)
    if len(bias) > 1 and size_of(bias[0]) != 1:
        flow.unify(value[0], bias[0], node)
    return (value[0], weight[1])


@rule(*overloads("embedding"))
def embedding(flow: Flow, node: fx.Node) -> Value:
    """Table of weights [V, E], indices [...]: makes E at each index."""
    weight, indices = flow.value(argument(node, 0)), flow.value(argument(node, 1))
    flow.block(weight[0], node, "its rows are looked up by index")
    flow.note("embedded", weight[1], node)
    return (*indices, weight[1])


@rule(*_CONVOLUTIONS)
def convolution(flow: Flow, node: fx.Node) -> Value:
    """Data x [N, I, …], weight [O, I / groups, …]: each group of inputs makes its group of outputs."""
    value, weight = flow.value(argument(node, 0)), flow.value(argument(node, 1))
    groups = argument(node, 6)
    assert isinstance(groups, int)
    channels = len(value) - len(weight) + 1  # without a batch there is no dimension before the channels
    if groups == 1:
        flow.unify(value[channels], weight[1], node)
    else:
        outer, inner = _groups(flow, node, value[channels], groups)
        flow.unify(inner, weight[1], node)
        flow.unify(outer, _groups(flow, node, weight[0], groups)[0], node)
        flow.hidden[node] = outer
    _bias(flow, node, argument(node, 2), weight[0])
    return _places(flow, node, value[:channels], weight[0], value[channels + 1 :], weight[2:])


@rule(*_TRANSPOSED)
def transposed_convolution(flow: Flow, node: fx.Node) -> Value:
    """Data x [N, I, …], weight [I, O / groups, …]."""
    value, weight = flow.value(argument(node, 0)), flow.value(argument(node, 1))
    groups = argument(node, 6)
    assert isinstance(groups, int)
    channels = len(value) - len(weight) + 1
    flow.unify(value[channels], weight[0], node)
    made = weight[1]
    if groups > 1:
        outer, _ = _groups(flow, node, weight[0], groups)
        flow.hidden[node] = outer
        made = flow.merge([outer, weight[1]])
    _bias(flow, node, argument(node, 2), made)
    return _places(flow, node, value[:channels], made, value[channels + 1 :], weight[2:])


@resize(*_CONVOLUTIONS, *_TRANSPOSED)
def resize_groups(shrink: Shrink, node: fx.Node) -> None:
    """As many groups as are left."""
    outer = shrink.flow.hidden.get(node)
    if outer is not None and shrink.shrinks(outer):
        shrink.set_argument(node, 6, shrink.size(outer))


def _groups(flow: Flow, node: fx.Node, dim: Dim, groups: int) -> tuple[Dim, Dim]:
    assert labels_of(dim) is not None
    outer, inner = flow.split(
        dim, (groups, size_of(dim) // groups), node, "a grouped convolution divides it into groups"
    )
    return outer, inner


def _bias(flow: Flow, node: fx.Node, bias: Any, dim: Dim) -> None:
    if isinstance(bias, fx.Node):
        flow.unify(dim, flow.value(bias)[-1], node)


def _places(flow: Flow, node: fx.Node, batch: Value, made: Dim, places: Value, kernel: Value) -> Value:
    for dim in (*places, *kernel):
        flow.block(dim, node, SPATIAL)
    sizes = flow.sizes(node)[len(batch) + 1 :]
    return (*batch, made, *(flow.fixed(size, node, SPATIAL) for size in sizes))
