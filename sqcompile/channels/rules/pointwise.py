"""Operators that compute each element by itself, with broadcasting."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from sqcompile.channels.flow import Dim, Flow, Value, size_of
from sqcompile.channels.rules.registry import overloads, rule
from sqcompile.operators.table import argument

aten = torch.ops.aten


def broadcast(flow: Flow, node: fx.Node, values: list[Value]) -> Value:
    """Return the dimensions of values that are broadcast against each other; those that meet are one."""
    rank = max((len(value) for value in values), default=0)
    result: list[Dim] = []
    for offset in range(rank, 0, -1):
        dims = [value[-offset] for value in values if len(value) >= offset]
        wide = [dim for dim in dims if size_of(dim) != 1]
        meeting = wide or dims[:1]
        for dim in meeting[1:]:
            flow.unify(meeting[0], dim, node)
        result.append(meeting[0])
    return tuple(result)


@rule(
    "pointwise",
    torch.ops.sqcompile.mask.default,
    *overloads(
        *(f"__{name}__.{form}" for name in ("and", "or", "xor") for form in ("Tensor", "Scalar")),
        *(f"where.{form}" for form in ("Scalar", "ScalarOther", "ScalarSelf")),
    ),
)
def pointwise(flow: Flow, node: fx.Node) -> Any:
    """Each element of the result comes from the elements at its place."""
    values = [flow.values.get(source) for source in node.all_input_nodes]
    return broadcast(flow, node, [value for value in values if isinstance(value, tuple)])


@rule(
    *overloads(
        "to.dtype",
        "to.device",
        "to.dtype_layout",
        "to.other",
        "_to_copy",
        "type_as",
        "dropout",
        "dropout_",
        "feature_dropout",
        "clone",
        "contiguous",
        "alias",
        "detach",
        "detach_",
        "lift_fresh_copy",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "rand_like",
        "randn_like",
        "bernoulli",
        "bernoulli.p",
        "fill.Scalar",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "relu6",
        "silu",
        "mish",
        "selu",
        "celu",
        "softplus",
        "_assert_tensor_metadata",
    )
)
def same(flow: Flow, node: fx.Node) -> Any:
    """The result has the dimensions of the first argument, whatever the others are."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    return flow.values[node.args[0]]  # type: ignore[index]


@rule(*overloads("arange", "arange.start", "arange.start_step", "linspace", "eye", "scalar_tensor"))
def counted(flow: Flow, node: fx.Node) -> Any:
    """Numbers of positions."""
    return flow.all_fixed(node.meta["val"], node, "it counts positions")


@rule(operator.getitem)
def getitem(flow: Flow, node: fx.Node) -> Any:
    """One of the values that an operator returns."""
    values = flow.values[node.args[0]]  # type: ignore[index]
    return None if values is None else values[node.args[1]]


@rule(*overloads("prelu", "_prelu_kernel"))
def prelu(flow: Flow, node: fx.Node) -> Value:
    """A slope for all, or one a channel."""
    value, slope = flow.value(argument(node, 0)), flow.value(argument(node, 1))
    if size_of(slope[0]) != 1 and len(value) > 1:
        flow.unify(value[1], slope[0], node)
    return value
