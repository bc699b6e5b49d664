"""Undoing torch.export's decompositions, so that passes know one form of each layer.

A program that went through `ExportedProgram.run_decompositions` says `_native_batch_norm_legit_no_training`
and takes its first result, where a fresh trace says `batch_norm`. The general functionalization (see
`functionalize`) decomposes too. Rewriting back is exact: it is the same computation by its first name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sqcompile.operators.table import argument
from sqcompile.tracing.functionalize import create_call

_aten = torch.ops.aten
_Call = tuple[torch._ops.OpOverload, tuple[Any, ...]]


def recompose(graph: fx.Graph) -> int:
    """Replace decomposed operators by the ones that a fresh trace has; return how many."""
    count = 0
    for node in list(graph.nodes):
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        call = rule(node) if rule is not None else None
        if call is None:
            continue
        # Of several results only the first survives; the rule made sure that no other is read.
        replaced = next(iter(node.users)) if isinstance(node.meta.get("val"), (tuple, list)) else node
        with graph.inserting_before(node):
            new = create_call(graph, *call)
        new.meta = {**node.meta, "val": replaced.meta.get("val")}
        replaced.replace_all_uses_with(new)
        for old in dict.fromkeys((replaced, node)):
            graph.erase_node(old)
        count += 1
    if count:
        graph.eliminate_dead_code()
    return count


def _only_first_result(node: fx.Node) -> bool:
    users = list(node.users)
    return len(users) == 1 and users[0].target is operator.getitem and argument(users[0], 1) == 0


def _batch_norm(node: fx.Node) -> _Call | None:
    if not _only_first_result(node):
        return None
    x, weight, bias, mean, variance, momentum, eps = (argument(node, index) for index in range(7))
    return _aten.batch_norm.default, (x, weight, bias, mean, variance, False, momentum, eps, False)


def _layer_norm(node: fx.Node) -> _Call | None:
    if not _only_first_result(node):
        return None
    return _aten.layer_norm.default, tuple(argument(node, index) for index in range(5))


def _max_pool(node: fx.Node) -> _Call | None:
    return (_aten.max_pool2d.default, tuple(node.args)) if _only_first_result(node) else None


def _convolution(node: fx.Node) -> _Call | None:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = (
        argument(node, index) for index in range(9)
    )
    assert isinstance(weight, fx.Node)
    spatial = weight.meta["val"].dim() - 2
    if transposed:
        overload = {
            1: _aten.conv_transpose1d.default,
            2: _aten.conv_transpose2d.input,
            3: _aten.conv_transpose3d.input,
        }
        return overload[spatial], (x, weight, bias, stride, padding, output_padding, groups, dilation)
    forward = {1: _aten.conv1d.default, 2: _aten.conv2d.default, 3: _aten.conv3d.default}
    return forward[spatial], (x, weight, bias, stride, padding, dilation, groups)


def _linear_with_bias(node: fx.Node) -> _Call | None:
    bias, x, weight = node.args[:3]
    stored = _transposed_weight(weight)
    if stored is None or node.kwargs or not isinstance(bias, fx.Node) or bias.meta["val"].dim() != 1:
        return None
    return _aten.linear.default, (x, stored, bias)


def _linear(node: fx.Node) -> _Call | None:
    x, weight = node.args
    stored = _transposed_weight(weight)
    return None if stored is None else (_aten.linear.default, (x, stored))


def _transposed_weight(value: object) -> fx.Node | None:
    """Return what is transposed if `value` is a 2-d transposition; only stored weights make a layer."""
    if not isinstance(value, fx.Node) or not value.args:
        return None
    source = value.args[0]
    if not isinstance(source, fx.Node) or source.op != "get_attr" or source.meta["val"].dim() != 2:
        return None
    return source if value.target is _aten.t.default or _swapped_axes(value) else None


def _swapped_axes(node: fx.Node) -> bool:
    """Whether a node is a permutation or transposition of axes 0 and 1."""
    if node.target is _aten.permute.default:
        axes: Any = node.args[1]
    elif node.target is _aten.transpose.int:
        axes = node.args[1:]
    else:
        return False
    swapped = [axis % 2 for axis in axes]
    return swapped == [1, 0] or (node.target is _aten.transpose.int and swapped == [0, 1])


def _softmax(node: fx.Node) -> _Call | None:
    half_to_float = argument(node, 2)
    return _aten.softmax.int, (*node.args[:2], torch.float32 if half_to_float else None)


_RULES: dict[Any, Callable[[fx.Node], _Call | None]] = {
    _aten._native_batch_norm_legit_no_training.default: _batch_norm,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.max_pool2d_with_indices.default: _max_pool,
    _aten.convolution.default: _convolution,
    _aten.addmm.default: _linear_with_bias,
    _aten.mm.default: _linear,
    _aten._softmax.default: _softmax,
}
