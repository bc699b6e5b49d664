"""Codes of four bits and less take half a byte in the file."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

_SMALLEST = 64
"""Elements below which the extra operator is not worth the bytes."""

# What holds a code at run time, and what does in the file.
_FOUR_BITS = {ir.DataType.INT8: ir.DataType.INT4, ir.DataType.UINT8: ir.DataType.UINT4}
_NUMPY = {ir.DataType.INT4: ml_dtypes.int4, ir.DataType.UINT4: ml_dtypes.uint4}

# Operators and the position of their codes.
_WEIGHTS = frozenset(
    {("DequantizeLinear", 0), ("MatMulInteger", 1), ("Transpose", 0), ("Gather", 0), ("Cast", 0)}
)


def store_few_bits(model: ir.Model) -> int:
    """Store int8 codes -8..7 as INT4 and uint8 codes 0..15 as UINT4, followed by a Cast; return how many.

    The integer kernels take int8 only. ONNX Runtime folds the Cast when it loads the model, so that the
    kernels see the same weights as before.
    """
    count = 0
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype not in _FOUR_BITS or tensor.size < _SMALLEST:
            continue
        codes = tensor.numpy()
        least, most = (-8, 7) if tensor.dtype == ir.DataType.INT8 else (0, 15)
        if not _holds_weights(value) or codes.min() < least or codes.max() > most:
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
    assert value.dtype is not None
    wide, narrow = value.dtype, _FOUR_BITS[value.dtype]
    packed = ir.tensor(codes.astype(_NUMPY[narrow]), name=name)
    cast = ir.node("Cast", [value], {"to": wide}, name=f"{name}/Cast")
    cast.outputs[0].name = f"{name}/{wide.name.lower()}"
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(wide)
    users = [(use.node, use.idx) for use in value.uses() if use.node is not cast]
    for node, index in users:
        node.replace_input_with(index, cast.outputs[0])
    value.const_value = packed
    value.type = ir.TensorType(narrow)
    graph.insert_before(graph[0], cast)
