"""Pooling and resampling: channels pass, places do not shrink."""

from __future__ import annotations

from typing import Any

from torch import fx

from sqcompile.channels.flow import Flow, Value
from sqcompile.channels.rules.registry import overloads, rule
from sqcompile.operators.table import argument
from sqcompile.text import operator_name

SPATIAL = "it is a place in an image or a sequence"


def places(flow: Flow, node: fx.Node, count: int, value: Value) -> Value:
    """Return all but the last `count` dimensions, and new fixed ones in the place of those."""
    kept = value[: len(value) - count]
    for dim in value[len(value) - count :]:
        flow.block(dim, node, SPATIAL)
    return (*kept, *(flow.fixed(size, node, SPATIAL) for size in flow.sizes(node)[len(kept) :]))


@rule(
    *overloads(
        *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg") for n in (1, 2, 3)),
        *(f"_adaptive_avg_pool{n}d" for n in (2, 3)),
        *(
            f"upsample_{kind}{n}d.{form}"
            for kind in ("nearest", "_nearest_exact")
            for n in (1, 2, 3)
            for form in ("vec", "default")
        ),
        *(
            f"upsample_{kind}.{form}"
            for kind in ("linear1d", "bilinear2d", "trilinear3d", "bicubic2d")
            for form in ("vec", "default")
        ),
        *(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)),
    )
)
def pool(flow: Flow, node: fx.Node) -> Value:
    """Channels pass."""
    name = operator_name(node).partition(".")[0]
    count = int(name[name.rindex("d") - 1])
    return places(flow, node, count, flow.value(argument(node, 0)))


@rule(
    *overloads(
        *(f"{kind}_pool{n}d" for kind in ("adaptive_max",) for n in (1, 2, 3)), "max_pool2d_with_indices"
    )
)
def pool_with_indices(flow: Flow, node: fx.Node) -> Any:
    """Channels pass, to the values as to their places."""
    value = flow.value(argument(node, 0))
    first = node.meta["val"][0]
    count = 2 if "2d" in operator_name(node) else int(operator_name(node)[-2])
    kept = value[: len(value) - count]
    for dim in value[len(value) - count :]:
        flow.block(dim, node, SPATIAL)
    result = (*kept, *(flow.fixed(size, node, SPATIAL) for size in first.shape[len(kept) :]))
    return [result, result]


@rule(*overloads("pixel_shuffle"))
def pixel_shuffle(flow: Flow, node: fx.Node) -> Value:
    """Channels [C · r · r] become [C] of images r times as large."""
    value = flow.value(argument(node, 0))
    factor = argument(node, 1)
    assert isinstance(factor, int)
    return _shuffled(flow, node, value, factor, -3)


def _shuffled(flow: Flow, node: fx.Node, value: Value, factor: int, axis: int) -> Value:
    channels = flow.sizes(node)[axis]
    text = "pixel_shuffle spreads it over places"
    dims = flow.split(value[axis], (channels, factor, factor), node, text)
    for dim in dims[1:]:
        flow.block(dim, node, text)
    fixed = [flow.fixed(size, node, SPATIAL) for size in flow.sizes(node)[-2:]]
    return (*value[:axis], dims[0], *fixed)


@rule(*overloads("pixel_unshuffle"))
def pixel_unshuffle(flow: Flow, node: fx.Node) -> Value:
    """Places become channels [C · r · r]."""
    value = flow.value(argument(node, 0))
    factor = argument(node, 1)
    assert isinstance(factor, int)
    inside = flow.fixed(factor * factor, node, "pixel_unshuffle gathers it from places")
    fixed = [flow.fixed(size, node, SPATIAL) for size in flow.sizes(node)[-2:]]
    return (*value[:-3], flow.merge([value[-3], inside]), *fixed)


@rule(*overloads("channel_shuffle", "native_channel_shuffle"))
def channel_shuffle(flow: Flow, node: fx.Node) -> Value:
    """Channels [groups · C] become [C · groups]."""
    value = flow.value(argument(node, 0))
    groups = argument(node, 1)
    size = flow.sizes(node)[1]
    assert isinstance(groups, int)
    outer, inner = flow.split(value[1], (groups, size // groups), node, "channel_shuffle interleaves it")
    flow.block(outer, node, "channel_shuffle has a fixed number of groups")
    return (value[0], flow.merge([inner, outer]), *value[2:])
