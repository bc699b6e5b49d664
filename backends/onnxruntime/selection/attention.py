"""Scaled dot-product attention, spelled out once for all layers that share a mask.

The exporter's own form differs from PyTorch where a mask leaves a row nothing to attend to (left-padded
batches): PyTorch returns zeros, it the average of all values. It also adds a test for NaN over all scores.
Here a boolean mask becomes, once, numbers to add and the rows to zero.

    softmax(q · scale @ kᵀ + (mask ? 0 : lowest)) @ v, zero where a row of the mask is all false
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from sqcompile.backends.onnxruntime.selection.context import Context
from sqcompile.operators.table import argument
from sqcompile.rewrite import Rewriter

aten = torch.ops.aten


@dataclass(frozen=True)
class _Mask:
    """What a mask becomes: numbers to add to the scores, and which rows attend to anything (None: all)."""

    added: fx.Node
    rows: fx.Node | None


def select_attention(context: Context) -> None:
    """Rewrite every scaled_dot_product_attention without dropout."""
    edit = context.edit
    masks: dict[tuple[fx.Node, torch.dtype], _Mask] = {}
    for node in list(edit.graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default or argument(node, 4) != 0.0:
            continue
        query, key, value = node.args[:3]
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
        if argument(node, 7):
            continue  # grouped heads
        with edit.before(node):
            mask = _mask(edit, node, query, key, masks)
            edit.replace(node, _attention(edit, node, (query, key, value), mask))


def _attention(
    edit: Rewriter, node: fx.Node, operands: tuple[fx.Node, fx.Node, fx.Node], mask: _Mask | None
) -> fx.Node:
    query, key, value = operands
    scale = argument(node, 6)
    if scale is None:
        scale = 1 / math.sqrt(query.meta["val"].shape[-1])
    keys = edit.call(aten.transpose.int, key, -2, -1, like=node)
    scores = edit.call(
        aten.matmul.default, edit.call(aten.mul.Tensor, query, scale, like=node), keys, like=node
    )
    if mask is not None:
        scores = edit.call(aten.add.Tensor, scores, mask.added, like=node)
    weights = edit.call(aten.softmax.int, scores, -1, like=node)
    result = edit.call(aten.matmul.default, weights, value, like=node)
    if mask is None or mask.rows is None:
        return result
    return edit.call(aten.where.ScalarOther, mask.rows, result, 0.0, like=node)


def _mask(
    edit: Rewriter,
    node: fx.Node,
    query: fx.Node,
    key: fx.Node,
    known: dict[tuple[fx.Node, torch.dtype], _Mask],
) -> _Mask | None:
    given = argument(node, 3)
    dtype = query.meta["val"].dtype
    if argument(node, 5):
        return _Mask(_causal(edit, node, query, key, dtype), None)
    if not isinstance(given, fx.Node):
        return None
    if given.meta["val"].dtype != torch.bool:
        return _Mask(given, None)
    if (given, dtype) not in known:
        with edit.after(given):
            lowest = torch.finfo(dtype).min
            added = edit.call(aten.where.Scalar, given, 0.0, lowest, like=node)
            if added.meta["val"].dtype != dtype:
                added = edit.call(aten.to.dtype, added, dtype, like=node)
            rows = edit.call(aten.any.dim, given, -1, True, like=node)
        known[given, dtype] = _Mask(added, rows)
    return known[given, dtype]


def _causal(edit: Rewriter, node: fx.Node, query: fx.Node, key: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Return what forbids every position to attend to later ones."""
    sizes = [edit.call(aten.sym_size.int, item, -2, like=node) for item in (query, key)]
    lowest = edit.call(aten.full.default, sizes, torch.finfo(dtype).min, dtype=dtype, like=node)
    return edit.call(aten.triu.default, lowest, 1, like=node)
