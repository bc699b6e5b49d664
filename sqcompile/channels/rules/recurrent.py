"""Recurrent layers: the hidden size is one for all layers and directions of an operator."""

from __future__ import annotations

from typing import Any

from torch import fx

from sqcompile.channels.flow import Dim, Flow, Value, labels_of
from sqcompile.channels.rules.registry import overloads, rule
from sqcompile.operators.table import argument

STEPS = "it is a step of a sequence"


@rule(*overloads("lstm.input"))
def lstm(flow: Flow, node: fx.Node) -> Any:
    """Four gates a hidden unit; states (h, c) [layers · directions, N, H]."""
    states = argument(node, 1)
    assert isinstance(states, (list, tuple))
    return _recurrent(flow, node, 4, [flow.value(state) for state in states])


@rule(*overloads("gru.input"))
def gru(flow: Flow, node: fx.Node) -> Any:
    """Three gates a hidden unit; state h [layers · directions, N, H]."""
    return _recurrent(flow, node, 3, [flow.value(argument(node, 1))])


@rule(*overloads("rnn_tanh.input", "rnn_relu.input"))
def rnn(flow: Flow, node: fx.Node) -> Any:
    """One hidden unit a row; state h [layers · directions, N, H]."""
    return _recurrent(flow, node, 1, [flow.value(argument(node, 1))])


def _recurrent(flow: Flow, node: fx.Node, gates: int, states: list[Value]) -> Any:
    """Weights a layer and direction: ih [gates · H, I], hh [gates · H, H], two biases [gates · H].

    All hidden states lie in one tensor, so all layers and directions lose the same units.
    """
    value = flow.value(argument(node, 0))
    stored = argument(node, 2)
    has_biases, layers, both = argument(node, 3), argument(node, 4), argument(node, 7)
    assert isinstance(stored, (list, tuple)) and isinstance(layers, int)
    directions = 2 if both else 1
    count = 4 if has_biases else 2
    weights = [flow.value(item) for item in stored]
    hidden = states[0][2]
    if len(weights) != count * layers * directions:
        text = "recurrent layers with a projection are not understood"
        for dim in (dim for item in (value, *states, *weights) for dim in item):
            flow.block(dim, node, text)
        return flow.all_fixed(node.meta["val"], node, text)
    for state in states:
        flow.unify(hidden, state[2], node)
    rows = _repeat(flow, gates, hidden, node)
    made = _repeat(flow, directions, hidden, node)
    entering = value[2]
    for layer in range(layers):
        for direction in range(directions):
            first = count * (layer * directions + direction)
            flow.unify(weights[first][1], entering, node)
            flow.unify(weights[first + 1][1], hidden, node)
            for item in weights[first : first + count]:
                flow.unify(item[0], rows, node)
        entering = made
    for dim in value[:2]:
        flow.block(dim, node, STEPS)
    return [(*value[:2], made), *states]


def _repeat(flow: Flow, times: int, dim: Dim, node: fx.Node) -> Dim:
    assert labels_of(dim) is not None
    if times == 1:
        return dim
    return flow.merge([flow.fixed(times, node, "it is a gate or a direction"), dim])
