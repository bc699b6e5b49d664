"""Embeddings fetch codes, and dequantize only what they fetched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from sqcompile.backends.onnxruntime.selection.context import Context
from sqcompile.backends.onnxruntime.selection.values import Mapping, as_dequantize
from sqcompile.operators.table import argument
from sqcompile.rewrite import Rewriter

aten = torch.ops.aten
ort = torch.ops.sqcompile_ort


def select_embeddings(context: Context) -> None:
    """Rewrite embedding(dequantize(codes), indices) for every granularity of the codes."""
    edit = context.edit
    for node in list(edit.graph.nodes):
        if node.target is not aten.embedding.default:
            continue
        table = as_dequantize(argument(node, 0))
        indices = argument(node, 1)
        if table is None or not table.stored or not table.fixed or not isinstance(indices, fx.Node):
            continue
        with edit.before(node):
            result = _packed(context, node, table, indices) or _plain(edit, node, table, indices)
        edit.replace(node, result)


def _packed(context: Context, node: fx.Node, table: Mapping, indices: fx.Node) -> fx.Node | None:
    """Rows of packed codes with a scale for each block: GatherBlockQuantized."""
    along_row = table.group_size is not None
    # With one scale a row, plain 8-bit codes need neither padding nor repeated scales; but a tied output
    # layer may have packed them already.
    if table.bits > 4 and not along_row and not context.is_packed(table):
        return None
    packed = context.packed(table, outputs_axis=0)
    if packed is None or packed.bits == 2 or packed.columns % packed.block_size:
        return None
    row_bytes = packed.columns * packed.bits // 8
    edit = context.edit
    rows = edit.call(aten.reshape.default, packed.codes, [packed.outputs, row_bytes], like=node)
    return edit.call(
        ort.gather_block_quantized.default,
        rows,
        indices,
        packed.scales,
        packed.zero_points,
        packed.bits,
        packed.block_size,
        like=node,
    )


def _plain(edit: Rewriter, node: fx.Node, table: Mapping, indices: fx.Node) -> fx.Node:
    """Rows of codes, one code a byte, and the scales that belong to them."""

    def fetch(source: fx.Node) -> fx.Node:
        return edit.call(aten.embedding.default, source, indices, like=node)

    values = edit.call(aten.to.dtype, fetch(table.source), torch.float32, like=node)
    if bool((edit.program.tensor(table.zero_point) != 0).any()):
        values = edit.call(
            aten.sub.Tensor, values, _rows(edit, node, table, table.zero_point, fetch), like=node
        )
    return edit.call(aten.mul.Tensor, values, _rows(edit, node, table, table.scale, fetch), like=node)


def _rows(
    edit: Rewriter, node: fx.Node, table: Mapping, parameter: fx.Node, fetch: Callable[[fx.Node], fx.Node]
) -> fx.Node:
    """Return the scales (or zero points) of the fetched rows, so that they broadcast against the codes."""
    stored = edit.program.tensor(parameter).detach().float()
    rows, columns = edit.program.tensor(table.source).shape
    by_row = table.axis is not None and table.axis % 2 == 0
    if table.axis is None or (not by_row and table.group_size is None):
        return edit.constant(f"{parameter.target}_values", stored, like=node)
    if by_row and table.group_size is None:
        stored = stored.unsqueeze(1)
    elif by_row and table.group_size not in (None, -1):
        stored = stored.repeat_interleave(table.group_size, 0)[:rows]
    elif by_row:
        return edit.constant(f"{parameter.target}_values", stored, like=node)
    found = fetch(edit.constant(f"{parameter.target}_rows", stored.contiguous(), like=node))
    groups = stored.shape[1]
    if by_row or groups == 1:
        return found
    assert table.group_size is not None
    leading = list(found.meta["val"].shape[:-1])
    spread = edit.call(aten.unsqueeze.default, found, -1, like=node)
    spread = edit.call(aten.expand.default, spread, [-1] * (len(leading) + 1) + [table.group_size], like=node)
    spread = edit.call(aten.flatten.using_ints, spread, -2, -1, like=node)
    return edit.call(aten.slice.Tensor, spread, -1, 0, columns, like=node)
