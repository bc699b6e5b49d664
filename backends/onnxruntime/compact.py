"""Codes of four bits and less take half a byte in the file."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

_SMALLEST = 64
"""Elements below which the extra operator is not worth the bytes."""


# Operators and the position of their codes.
_WEIGHTS = frozenset(
    {("DequantizeLinear", 0), ("MatMulInteger", 1), ("Transpose", 0), ("Gather", 0), ("Cast", 0)}
)


def store_few_bits(model: ir.Model) -> int:
    """Store int8 tensors of codes -8..7 as INT4, followed by a Cast; return how many.

    The integer kernels take int8 only. ONNX Runtime folds the Cast when it loads the model, so that the
    kernels see the same weights as before.
    """
    count = 0
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.INT8 or tensor.size < _SMALLEST:
            continue
        codes = tensor.numpy()
        if not _holds_weights(value) or codes.min() < -8 or codes.max() > 7:
            continue
        _store(model.graph, value, codes)
        count += 1
    return count


def _holds_weights(value: ir.Value) -> bool:
    """Whether every user takes the tensor as codes, none as a zero point, which must be stored plainly."""
    uses = [(use.node.op_type, use.idx) for use in value.uses()]
    return bool(uses) and all(use in _WEIGHTS for use in uses)


def _store(graph: ir.Graph, value: ir.Value, codes: np.ndarray) -> None:
    name = str(value.name)
    packed = ir.tensor(codes.astype(ml_dtypes.int4), name=name)
    cast = ir.node("Cast", [value], {"to": ir.DataType.INT8}, name=f"{name}/Cast")
    cast.outputs[0].name = f"{name}/int8"
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(ir.DataType.INT8)
    users = [(use.node, use.idx) for use in value.uses() if use.node is not cast]
    for node, index in users:
        node.replace_input_with(index, cast.outputs[0])
    value.const_value = packed
    value.type = ir.TensorType(ir.DataType.INT4)
    graph.insert_before(graph[0], cast)
