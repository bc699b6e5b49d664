"""Products of two computed values: attention and what it is written with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import fx

from sqcompile.channels.flow import Dim, Flow, Value, size_of
from sqcompile.channels.rules.pointwise import broadcast
from sqcompile.channels.rules.registry import overloads, resize, rule
from sqcompile.operators.table import argument

if TYPE_CHECKING:
    from sqcompile.channels.shrink import Shrink

aten = torch.ops.aten

HEADS = "heads"
HEAD_WIDTH = "head_width"


@rule(*overloads("matmul", "mm", "bmm"))
def matmul(flow: Flow, node: fx.Node) -> Value:
    """Data x [..., M, K] @ y [..., K, N]: leading dimensions are those of heads."""
    left, right = flow.value(argument(node, 0)), flow.value(argument(node, 1))
    if len(right) == 1:
        flow.unify(left[-1], right[0], node)
        return left[:-1]
    flow.unify(left[-1], right[-2], node)
    if len(left) == 1:
        return (*right[:-2], right[-1])
    if min(len(left), len(right)) > 2:
        flow.note(HEAD_WIDTH, left[-1], node)
        flow.note(HEAD_WIDTH, right[-1], node)
        for value in (left, right):
            flow.note(HEADS, value[-3], node)
    batch = broadcast(flow, node, [left[:-2], right[:-2]])
    return (*batch, left[-2], right[-1])


@rule(*overloads("baddbmm"))
def baddbmm(flow: Flow, node: fx.Node) -> Value:
    """A matrix product for each of a batch, added to a value."""
    added, left, right = (flow.value(argument(node, position)) for position in range(3))
    flow.unify(left[-1], right[-2], node)
    batch = broadcast(flow, node, [left[:-2], right[:-2]])
    flow.note(HEADS, batch[-1], node)
    flow.note(HEAD_WIDTH, left[-1], node)
    return broadcast(flow, node, [(*batch, left[-2], right[-1]), added])


@rule(*overloads("scaled_dot_product_attention"))
def attention(flow: Flow, node: fx.Node) -> Value:
    """Data: query [..., H, T, D], key [..., G, S, D], value [..., G, S, E], mask [..., T, S].

    Sums over D inside the scores and over S outside; G < H heads of keys serve H / G queries each.
    """
    query, key, value = (flow.value(argument(node, position)) for position in range(3))
    flow.unify(query[-1], key[-1], node)
    flow.unify(key[-2], value[-2], node)
    flow.block(key[-2], node, "attention takes a softmax over it")
    batch = broadcast(flow, node, [key[:-2], value[:-2]])
    heads, served = (size_of(dims[-1]) if dims else 1 for dims in (query[:-2], batch))
    if argument(node, 7) and heads != served:
        repeated = flow.fresh(heads // served, node)
        flow.unify(query[-3], flow.merge([batch[-1], repeated]), node)
        batch = (*batch[:-1], query[-3])
    batch = broadcast(flow, node, [query[:-2], batch])
    if batch:
        flow.note(HEADS, batch[-1], node)
    flow.note(HEAD_WIDTH, query[-1], node)
    flow.note(HEAD_WIDTH, value[-1], node)
    mask = argument(node, 3)
    if isinstance(mask, fx.Node):
        broadcast(flow, node, [(*batch, query[-2], key[-2]), flow.value(mask)])
    return (*batch, query[-2], value[-1])


@resize(*overloads("scaled_dot_product_attention"))
def keep_scale(shrink: Shrink, node: fx.Node) -> None:
    """The scale that follows from the width stays what it was before."""
    dim = shrink.flow.value(argument(node, 0))[-1]
    if shrink.shrinks(dim) and argument(node, 6) is None:
        shrink.set_keyword(node, "scale", 1.0 / math.sqrt(size_of(dim)))


@rule(*overloads("einsum"))
def einsum(flow: Flow, node: fx.Node) -> Value | None:
    """Dimensions of one letter are one."""
    equation, operands = argument(node, 0), argument(node, 1)
    assert isinstance(equation, str) and isinstance(operands, (list, tuple))
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    values = [flow.value(operand) for operand in operands]
    if not arrow or "." in equation:
        text = "einsum with an ellipsis is not understood"
        for dim in (dim for value in values for dim in value):
            flow.block(dim, node, text)
        result: Value = flow.all_fixed(node.meta["val"], node, text)
        return result
    letters: dict[str, Dim] = {}
    for term, value in zip(inputs.split(","), values, strict=True):
        for letter, dim in zip(term, value, strict=True):
            if letter in letters and size_of(letters[letter]) != 1:
                if size_of(dim) != 1:
                    flow.unify(letters[letter], dim, node)
            else:
                letters[letter] = dim
    return tuple(letters[letter] for letter in output)
