"""Rewrites that have nothing to do with quantization, but with how the exporter and ONNX Runtime see a graph."""

from __future__ import annotations

import torch
from torch import fx

from sqcompile.backends.onnxruntime.selection.context import Context
from sqcompile.backends.onnxruntime.selection.values import as_dequantize, rank_of
from sqcompile.operators.table import argument, operator_of

aten = torch.ops.aten
ort = torch.ops.sqcompile_ort
sq = torch.ops.sqcompile

# Operators that pad with a constant, and the position of that constant.
_PADS = {aten.constant_pad_nd.default: 2, aten.pad.default: 3}


def make_views_safe(context: Context) -> None:
    """Let every view follow a copy.

    The exporter decomposes attention to a form whose results lie in memory in another order, where a view
    that was legal when the model was traced is an error (T5, Swin). ONNX has no strides: the copy becomes an
    Identity, which is removed.
    """
    edit = context.edit
    for node in list(edit.graph.nodes):
        if node.target not in (aten.view.default, aten._unsafe_view.default):
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        with edit.before(node):
            copy = edit.call(aten.clone.default, source, memory_format=torch.contiguous_format, like=node)
        edit.set_argument(node, 0, copy)


def pad_values(context: Context) -> None:
    """Pad values instead of codes where a convolution follows: ONNX Runtime makes the padding its own.

    dequantize(pad(codes, zero_point)) = pad(dequantize(codes), 0).
    """
    edit = context.edit
    for node in list(edit.graph.nodes):
        mapping = as_dequantize(node)
        if mapping is None or not mapping.per_tensor or not mapping.fixed:
            continue
        pad = mapping.source
        if pad.target not in _PADS or len(pad.users) > 1 or not isinstance(pad.args[0], fx.Node):
            continue
        entries = [operator_of(user) for user in node.users]
        if not all(entry is not None and entry.kind.startswith("conv") for entry in entries):
            continue
        fill = argument(pad, _PADS[pad.target])
        if fill != int(context.tensor(mapping.zero_point)) or argument(pad, 1) is None:
            continue
        with edit.before(node):
            values = edit.call(sq.dequantize.default, pad.args[0], *node.args[1:], like=node)
            padded = edit.call(aten.constant_pad_nd.default, values, pad.args[1], 0.0, like=pad)
        edit.replace(node, padded)


def select_pooling(context: Context) -> None:
    """Replace means over all spatial dimensions by GlobalAveragePool, which has an integer kernel."""
    edit = context.edit
    for node in list(edit.graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not _averages_space(node, source):
            continue
        with edit.before(node):
            result = edit.call(ort.global_average_pool.default, source, like=node)
            if node.target is aten.mean.dim and not argument(node, 2):
                result = edit.call(aten.flatten.using_ints, result, 1, -1, like=node)
        edit.replace(node, result)


def _averages_space(node: fx.Node, source: fx.Node) -> bool:
    if node.target is aten.adaptive_avg_pool2d.default:
        return rank_of(source) == 4 and _is_one(argument(node, 1))
    if node.target is not aten.mean.dim or argument(node, 3) is not None:
        return False
    axes, rank = argument(node, 1), rank_of(source)
    if not isinstance(axes, (list, tuple)) or rank < 4:
        return False
    return sorted(axis % rank for axis in axes) == list(range(2, rank))


def _is_one(size: object) -> bool:
    return isinstance(size, (list, tuple)) and all(item == 1 for item in size)
