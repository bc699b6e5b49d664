"""Operators that make a tensor of one number."""

from __future__ import annotations

import torch
from torch import fx

from sqcompile.operators.table import argument

aten = torch.ops.aten

FILLS = (
    aten.zeros.default,
    aten.ones.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.full.default,
    aten.full_like.default,
    aten.new_full.default,
    aten.scalar_tensor.default,
)
"""The operators."""


def fill_value(node: fx.Node) -> object:
    """Return the number that a call of one of `FILLS` shows everywhere: a number, or the node that computes it."""
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target._schema.name.removeprefix("aten::")
    if "zeros" in name:
        return 0
    if "ones" in name:
        return 1
    return argument(node, {"scalar_tensor": 0, "new_full": 2}.get(name, 1))
