"""Third step: activation functions that only bound a value move behind its quantization.

ONNX Runtime fuses a convolution with the quantize node right behind it, and drops a ReLU in between where
the zero point is the least code. Any other ReLU, and most clips, would leave the convolution in float32. Since
quantization is monotone, quantize(clamp(x, low, high)) = clamp(quantize(x), quantize(low), quantize(high)),
exactly; and where the codes cannot leave those bounds, nothing remains to be done.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from sqcompile.backends.onnxruntime.selection.context import Context
from sqcompile.backends.onnxruntime.selection.values import Mapping, as_quantize
from sqcompile.operators.table import argument
from sqcompile.quantization import affine
from sqcompile.rewrite import Rewriter

aten = torch.ops.aten
sq = torch.ops.sqcompile

_IN_PLACE = frozenset({aten.relu_.default, aten.hardtanh_.default})


def fold_clamps(context: Context) -> None:
    """Replace quantize(clamp(x)) by clamp(quantize(x)), with the bounds in codes."""
    edit = context.edit
    for node in list(edit.graph.nodes):
        bounds = _bounds(node)
        if bounds is None:
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if node.target in _IN_PLACE and len(source.users) > 1:
            continue  # the others see the clamped value
        quantizers = [as_quantize(user) for user in node.users]
        found = [
            item for item in quantizers if item and item.per_tensor and item.fixed and item.source is node
        ]
        if not found or len(found) != len(quantizers):
            continue
        for mapping in found:
            _swap(edit, source, mapping, bounds)


def _bounds(node: fx.Node) -> tuple[float, float] | None:
    """Return the bounds that a node clamps its input to, or None if it does something else."""
    if node.target in (aten.relu.default, aten.relu_.default):
        return 0.0, math.inf
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    if node.target in (aten.hardtanh.default, aten.hardtanh_.default):
        low, high = argument(node, 1), argument(node, 2)
    elif node.target is aten.clamp.default:
        low, high = argument(node, 1), argument(node, 2)
    elif node.target is aten.clamp_min.default:
        low, high = argument(node, 1), None
    else:
        return None
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return None
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)  # type: ignore[arg-type]


def _swap(edit: Rewriter, source: fx.Node, mapping: Mapping, bounds: tuple[float, float]) -> None:
    low, high = (_code_of(edit, mapping, bound) for bound in bounds)
    with edit.before(mapping.node):
        codes = edit.call(sq.quantize.default, source, *mapping.node.args[1:], like=mapping.node)
        if low > mapping.qmin or high < mapping.qmax:
            codes = edit.call(aten.clamp.default, codes, low, high, like=mapping.node)
    edit.replace(mapping.node, codes)


def _code_of(edit: Rewriter, mapping: Mapping, value: float) -> int:
    scale = edit.program.tensor(mapping.scale)
    zero_point = edit.program.tensor(mapping.zero_point)
    if math.isinf(value):
        return mapping.qmin if value < 0 else mapping.qmax
    code = affine.quantize(
        torch.tensor(value), scale, zero_point, None, None, mapping.qmin, mapping.qmax, torch.int32
    )
    return int(code)
