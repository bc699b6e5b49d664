"""Stored weights in an ONNX model: who multiplies them, and in which form.

ONNX Runtime fuses a dequantized weight with its operator only where the activation is quantized too, and for
convolutions only where the result is. Any other DequantizeLinear it runs again at every call.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sqcompile.backends.onnxruntime.contrib import OUR_DOMAIN

_MOVES = frozenset({"Transpose", "Reshape"})
_EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)


def stored_root(value: ir.Value | None) -> ir.Value | None:
    """Return the stored tensor that a value only casts, moves or looks up, or None."""
    while value is not None and value.const_value is None:
        producer = value.producer()
        if producer is None:
            return None
        if producer.op_type == "Gather" and _is_stored(producer.inputs[0]):
            value = producer.inputs[1]  # codes that are looked up in a table
        elif producer.op_type in (*_MOVES, "Cast"):
            value = producer.inputs[0]
        else:
            return None
    return value


def _is_stored(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def takes_integers(node: ir.Node) -> bool:
    """Whether ONNX Runtime runs a product on the codes of its operands, so that their dequantization vanishes."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or not _dequantized_activation(node.inputs[0]):
        return False
    return node.op_type != "Conv" or _is_quantized(node.outputs[0])


def integer_users(node: ir.Node) -> list[ir.Node]:
    """Return the integer products that take a dequantized weight, directly or transposed."""
    found = []
    for use in node.outputs[0].uses():
        if use.node.op_type == "Transpose":
            found += integer_users(use.node)
        elif use.idx == 1 and takes_integers(use.node):
            found.append(use.node)
    return found


def look_up_at_load(model: ir.Model) -> int:
    """Spell lookups in tables out as operators of ONNX; return how many.

    ONNX Runtime evaluates those of weights, which are constants, when it loads the model. The file keeps the codes.
    """
    count = 0
    for node in list(model.graph):
        if (node.domain, node.op_type) != (OUR_DOMAIN, "Lookup"):
            continue
        codes, table = node.inputs
        assert table is not None and table.dtype is not None
        cast = ir.node("Cast", [codes], {"to": ir.DataType.INT32}, name=f"{node.name}/Cast")
        cast.outputs[0].name = f"{node.outputs[0].name}/codes"
        gather = ir.node("Gather", [table, cast.outputs[0]], name=f"{node.name}/Gather")
        gather.outputs[0].name = f"{node.outputs[0].name}/entries"
        for made, dtype in ((cast, ir.DataType.INT32), (gather, table.dtype)):
            made.outputs[0].shape, made.outputs[0].type = node.outputs[0].shape, ir.TensorType(dtype)
        model.graph.insert_before(node, [cast, gather])
        ir.convenience.replace_all_uses_with(node.outputs[0], gather.outputs[0], replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        count += 1
    model.opset_imports.pop(OUR_DOMAIN, None)
    return count


def dequantize_at_load(model: ir.Model) -> int:
    """Let weights of floating-point kernels be dequantized once, when the model is loaded; return how many.

    DequantizeLinear of a stored tensor becomes Cast, Sub and Mul, with the same results: ONNX Runtime
    evaluates those on constants at load, as it never does with DequantizeLinear. The file keeps the codes.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear" or integer_users(node):
            continue
        codes = stored_root(node.inputs[0])
        if codes is None or codes.dtype == ir.DataType.INT32:
            continue
        _spell_out(model.graph, node)
        count += 1
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]  # scales and zero points that were stored in another shape
    return count


def _spell_out(graph: ir.Graph, node: ir.Node) -> None:
    codes, scale = node.inputs[:2]
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    assert codes is not None and scale is not None and codes.shape is not None
    rank = len(codes.shape)
    cast = ir.node("Cast", [codes], {"to": ir.DataType.FLOAT})
    nodes = [cast]
    if zero_point is not None and zero_point.const_value is not None and zero_point.const_value.numpy().any():
        shift = _beside(graph, node, zero_point, rank, "shift")
        nodes.append(ir.node("Sub", [nodes[-1].outputs[0], shift]))
    nodes.append(ir.node("Mul", [nodes[-1].outputs[0], _beside(graph, node, scale, rank, "factor")]))
    for index, made in enumerate(nodes):
        made.name = f"{node.name}/{made.op_type}"
        made.outputs[0].name = f"{node.outputs[0].name}/{index}"
        made.outputs[0].shape, made.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(node.outputs[0], nodes[-1].outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _beside(graph: ir.Graph, node: ir.Node, parameter: ir.Value, rank: int, kind: str) -> ir.Value:
    """Return scales or zero points as float32 that broadcast against the codes."""
    assert parameter.const_value is not None
    array = parameter.const_value.numpy().astype(np.float32)
    axis = node.attributes["axis"].as_int() % rank if "axis" in node.attributes else 1
    if array.ndim == 1 and array.ndim != rank:
        array = array.reshape([-1 if dim == axis else 1 for dim in range(rank)])
    stored = constant(graph, f"{node.outputs[0].name}/{kind}", array)
    block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
    if not block:
        return stored
    codes = node.inputs[0]
    assert codes is not None and codes.shape is not None
    length = codes.shape[axis]
    assert isinstance(length, int)
    index = constant(graph, f"{node.outputs[0].name}/blocks", np.arange(length, dtype=np.int64) // block)
    spread = ir.node("Gather", [stored, index], {"axis": axis}, name=f"{node.name}/{kind}")
    spread.outputs[0].name = f"{stored.name}/spread"
    spread.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(node, spread)
    return spread.outputs[0]


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Return the stored tensor of a name, made of `array` if there is none yet."""
    if name not in graph.initializers:
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(value)
    return graph.initializers[name]


def _dequantized_activation(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return False
    codes = producer.inputs[0]
    return codes is not None and codes.dtype in _EIGHT_BITS and stored_root(codes) is None


def _is_quantized(value: ir.Value) -> bool:
    users = {use.node.op_type for use in value.uses()}
    return users == {"QuantizeLinear"}
