"""Convolutions with quantized activation and weight: as ONNX Runtime fuses them to QLinearConv."""

from __future__ import annotations

from torch import fx

from sqcompile.backends.onnxruntime.selection.context import Context
from sqcompile.backends.onnxruntime.selection.linears import integer_bias
from sqcompile.backends.onnxruntime.selection.values import as_dequantize
from sqcompile.operators.table import argument, operator_of

# Transposed convolutions have no integer kernel.
_INTEGER = frozenset({"conv1d", "conv2d", "conv3d"})


def select_convolutions(context: Context) -> None:
    """Give convolutions signed weights and int32 biases."""
    edit = context.edit
    for node in list(edit.graph.nodes):
        entry = operator_of(node)
        if entry is None or entry.kind not in _INTEGER or entry.weight is None or entry.bias is None:
            continue
        weight = as_dequantize(argument(node, entry.weight))
        data = as_dequantize(argument(node, 0))
        if weight is None or data is None or not (weight.stored and weight.fixed and data.fixed):
            continue
        if not data.per_tensor or max(weight.bits, data.bits) > 8 or weight.group_size is not None:
            continue
        axis = None if weight.axis is None else weight.axis % weight.source.meta["val"].dim()
        if axis not in (None, entry.out_axis):
            continue
        if (
            entry.out_axis == 1
            and isinstance(argument(node, entry.groups or 6), int)
            and argument(node, 6) != 1
        ):
            continue  # grouped transposed convolutions share scales between groups
        with edit.before(node):
            codes, zero_point = context.signed_codes(weight)
            arguments = list(node.args) + [None] * (entry.bias + 1 - len(node.args))
            # Unlike Gemm, Conv is fused without a zero point too: zeros need not be stored.
            shift = zero_point if bool(context.tensor(zero_point).any()) else None
            arguments[entry.weight] = context.dequantized(weight, codes, shift, axis)
            bias = argument(node, entry.bias)
            if isinstance(bias, fx.Node):
                arguments[entry.bias] = integer_bias(context, data, weight, bias)
            kwargs = {name: value for name, value in node.kwargs.items() if name not in ("weight", "bias")}
            result = edit.call(node.target, *arguments, like=node, **kwargs)
        edit.replace(node, result)
