"""First step: replace what only passes need by what it means."""

from __future__ import annotations

import torch
from torch import fx

from sqcompile.backends.onnxruntime.selection.context import Context
from sqcompile.rewrite import Rewriter

aten = torch.ops.aten
sq = torch.ops.sqcompile


def spell_out(context: Context) -> None:
    """Bake masks of stored weights in, and split fake_quantize into quantize and dequantize."""
    edit = context.edit
    for node in list(edit.graph.nodes):
        if node.target is sq.mask.default:
            _bake_mask(edit, node)
        elif node.target is sq.fake_quantize.default:
            with edit.before(node):
                codes = edit.call(sq.quantize.default, *node.args, like=node)
                values = edit.call(sq.dequantize.default, codes, *node.args[1:], like=node)
            edit.replace(node, values)


def _bake_mask(edit: Rewriter, node: fx.Node) -> None:
    weight, mask = node.args
    assert isinstance(weight, fx.Node) and isinstance(mask, fx.Node)
    with edit.before(node):
        if weight.op == "get_attr" and mask.op == "get_attr":
            values = edit.program.tensor(weight).detach() * edit.program.tensor(mask)
            product = edit.constant(f"{weight.target}_masked", values, like=node)
        else:
            product = edit.call(aten.mul.Tensor, weight, mask, like=node)
    edit.replace(node, product)
