"""Normalizations: dimensions that share statistics cannot lose a part without changing the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from sqcompile.channels.flow import Flow, Value, labels_of, size_of
from sqcompile.channels.rules.registry import overloads, resize, rule
from sqcompile.operators.table import argument
from sqcompile.text import operator_name

if TYPE_CHECKING:
    from sqcompile.channels.shrink import Shrink


def _tie(flow: Flow, node: fx.Node, positions: tuple[int, ...], dim: Any) -> None:
    for position in positions:
        stored = argument(node, position)
        if isinstance(stored, fx.Node):
            flow.unify(dim, flow.value(stored)[0], node)


@rule(*overloads("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training"))
def batch_norm(flow: Flow, node: fx.Node) -> Any:
    """Statistics of each channel by itself."""
    value = flow.value(argument(node, 0))
    _tie(flow, node, (1, 2, 3, 4), value[1])
    if isinstance(node.meta["val"], (tuple, list)):
        rest = flow.all_fixed(node.meta["val"][1:], node, "it is a statistic")
        return [value, *rest]
    return value


@rule(*overloads("layer_norm", "rms_norm", "native_layer_norm"))
def layer_norm(flow: Flow, node: fx.Node) -> Any:
    """Statistics over the last dimensions, which are tied to weight and bias."""
    value = flow.value(argument(node, 0))
    shape = argument(node, 1)
    assert isinstance(shape, (list, tuple))
    count = len(shape)
    for position in (2, 3):
        stored = argument(node, position)
        if not isinstance(stored, fx.Node) or not isinstance(flow.values.get(stored), tuple):
            continue
        for dim, other in zip(value[-count:], flow.value(stored), strict=True):
            flow.unify(dim, other, node)
    for dim in value[-count:]:
        flow.note("normalized", dim, node)
        flow.block(
            dim, node, f"{operator_name(node)} takes its statistics over it: those of the rest would change"
        )
    if isinstance(node.meta["val"], (tuple, list)):
        return [value, *flow.all_fixed(node.meta["val"][1:], node, "it is a statistic")]
    return value


@rule(*overloads("group_norm"))
def group_norm(flow: Flow, node: fx.Node) -> Value:
    """Statistics over the channels of a group: groups may go, parts of a group may not."""
    value = flow.value(argument(node, 0))
    _tie(flow, node, (2, 3), value[1])
    groups = argument(node, 1)
    size = size_of(value[1])
    if labels_of(value[1]) is None or not isinstance(groups, int):
        flow.block(value[1], node, "group_norm has groups of unknown size")
        return value
    _, inside = flow.split(value[1], (groups, size // groups), node, "group_norm divides it into groups")
    if size // groups > 1:
        flow.block(inside, node, "group_norm takes its statistics over it: those of the rest would change")
    return value


@resize(*overloads("group_norm"))
def resize_group_norm(shrink: Shrink, node: fx.Node) -> None:
    """As many groups as are left; all keep their size."""
    dim = shrink.flow.value(argument(node, 0))[1]
    groups = argument(node, 1)
    if shrink.shrinks(dim) and isinstance(groups, int):
        shrink.set_argument(node, 1, shrink.size(dim) * groups // size_of(dim))
