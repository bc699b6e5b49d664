"""Recognising quantized values in a graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sqcompile.operators.table import argument

sq = torch.ops.sqcompile


@dataclass(frozen=True)
class Mapping:
    """A quantize or dequantize node and its arguments.

    Attributes:
        node: The node.
        source: What it takes: values to quantize, or codes to dequantize.
        scale: Node of the scale.
        zero_point: Node of the zero point.
        axis: Axis of the granularity, or None.
        group_size: Group size of the granularity, or None.
        qmin: Least code.
        qmax: Greatest code.
    """

    node: fx.Node
    source: fx.Node
    scale: fx.Node
    zero_point: fx.Node
    axis: int | None
    group_size: int | None
    qmin: int
    qmax: int

    @property
    def stored(self) -> bool:
        """Whether what it takes is a stored tensor: a weight or a bias."""
        return self.source.op == "get_attr"

    @property
    def fixed(self) -> bool:
        """Whether scale and zero point are stored, not made at run time."""
        return self.scale.op == "get_attr" and self.zero_point.op == "get_attr"

    @property
    def per_tensor(self) -> bool:
        """Whether one scale serves the whole tensor."""
        return self.axis is None

    @property
    def bits(self) -> int:
        """Bits that hold the codes."""
        return (self.qmax - self.qmin).bit_length()


def as_dequantize(value: object) -> Mapping | None:
    """Return the parts of a dequantize node, or None."""
    return _mapping(value, sq.dequantize.default)


def as_quantize(value: object) -> Mapping | None:
    """Return the parts of a quantize node, or None."""
    return _mapping(value, sq.quantize.default)


def dynamic_scale_of(mapping: Mapping) -> fx.Node | None:
    """Return the `dynamic_scale` node that scale and zero point of `mapping` come from, or None."""
    owner = _item_of(mapping.scale, 0)
    if owner is None or owner is not _item_of(mapping.zero_point, 1):
        return None
    return owner if owner.target is sq.dynamic_scale.default else None


def dynamic_arguments(mapping: Mapping) -> tuple[object, ...] | None:
    """Return x, axis, group_size, qmin, qmax and symmetric of the scale's origin, or None if it is stored."""
    node = dynamic_scale_of(mapping)
    return None if node is None else tuple(argument(node, index) for index in range(6))


def rank_of(node: fx.Node) -> int:
    """Return the number of dimensions of a node's value."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value.dim()


def _mapping(value: object, target: torch._ops.OpOverload) -> Mapping | None:
    if not isinstance(value, fx.Node) or value.target is not target:
        return None
    source, scale, zero_point, axis, group_size, qmin, qmax = (argument(value, index) for index in range(7))
    assert isinstance(source, fx.Node) and isinstance(scale, fx.Node) and isinstance(zero_point, fx.Node)
    assert axis is None or isinstance(axis, int)
    assert group_size is None or isinstance(group_size, int)
    assert isinstance(qmin, int) and isinstance(qmax, int)
    return Mapping(value, source, scale, zero_point, axis, group_size, qmin, qmax)


def _item_of(node: fx.Node, index: int) -> fx.Node | None:
    """Return the node whose result number `index` this is, or None."""
    if getattr(node.target, "__name__", "") != "getitem" or node.args[1] != index:
        return None
    owner = node.args[0]
    return owner if isinstance(owner, fx.Node) else None
