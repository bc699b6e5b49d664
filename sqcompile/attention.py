"""Scaled dot-product attention in a program: its queries, and the keys and values that a cache would keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sqcompile.positions import Size
from sqcompile.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        node: The operator.
        query: Queries [batch, heads, sequence, width].
        key: Keys [batch, heads of keys, sequence, width], before each is repeated for several heads of queries.
        value: Values, alike.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node


def attentions(program: Program) -> list[Attention]:
    """Return every scaled dot-product attention, in graph order."""
    found = []
    for node in program.graph.nodes:
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        query, key, value = node.args[:3]
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
        found.append(Attention(node, query, before_repeating(key), before_repeating(value)))
    return found


def before_repeating(node: fx.Node) -> fx.Node:
    """Return keys or values [B, heads, S, D] before each head is repeated for several heads of queries."""
    shape = shape_of(node)
    chain: list[tuple[Size, ...]] = []
    found, item = node, node
    while item.target in _VIEWS and isinstance(item.args[0], fx.Node):
        item = item.args[0]
        before = shape_of(item)
        chain.append(before)
        if len(before) != 4 or (before[0], *before[2:]) != (shape[0], *shape[2:]):
            continue
        batch, heads, *rest = before
        # The order of elements is that of the sizes: heads, then the repetitions of each.
        order = [shape, (batch, heads, shape[1] // heads, *rest), (batch, heads, 1, *rest), before]
        steps = list(dict.fromkeys(chain))
        if all(step in order for step in steps) and steps == sorted(steps, key=order.index):
            found = item
    return found


def shape_of(node: fx.Node) -> tuple[Size, ...]:
    """Return the sizes of a node's value: numbers, and expressions of symbols."""
    return tuple(size_of(size) for size in node.meta["val"].shape)


def size_of(size: object) -> Size:
    """Return a size as a number or an expression."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_Integer else expression
    return size


_VIEWS = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default),
    *(aten.unsqueeze.default, aten.clone.default, aten.contiguous.default, aten.alias.default),
    aten.slice.Tensor,
)
