"""The same answer on every CPU: int8 weights that choose their form when the model is loaded.

ONNX Runtime's x86 kernels multiply unsigned activations by signed weights. On CPUs without VNNI they add
two products in 16 bits, with saturation: 255 · 127 + 255 · 127 does not fit, and the result is silently wrong.
Unsigned weights (codes + 128, zero point 128) use other kernels, which are exact everywhere but 2.5 times
slower where VNNI exists. The session option `session.x64quantprecision` makes that choice for all weights of a
model, but a user must know of it, it slows VNNI machines down too, and no file can carry it.

So the file itself chooses. A product of constants at its beginning is exact only where the kernels are:

    exact = ReduceMin(MatMulInteger(255s, 127s)) == K · 255 · 127
    w     = If(exact, then: DequantizeLinear(codes int8, …), else: DequantizeLinear(codes + 128 as uint8, …))

ONNX Runtime folds the constants with the kernels of the machine that loads the model, replaces each If by
the branch taken, and only then fuses: what remains is the ordinary graph of one form or the other. The file
holds each weight once. Weights within ±64 need no choice: 2 · 255 · 64 fits into 16 bits.

Measured (ONNX Runtime 1.32, M=128, K=768, N=3072, one core with AVX-512 VNNI): int8 weights 1.46 ms, uint8 3.65 ms,
either by option or by type. Emulating a CPU with AVX2 only: int8 weights up to 48 % wrong, guarded ones exact.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sqcompile.backends.onnxruntime.weights import constant, integer_users, stored_root

SAFE = 64
"""Weights up to this size, times activations up to 255, in pairs, fit into 16 bits."""

_DEPTH = 64  # of the probe; enough for the kernels' inner loops
_SHIFT = 128


def guard(model: ir.Model) -> int:
    """Let every int8 weight that could saturate choose its form at load; return how many do."""
    maker = _Choices(model.graph)
    count = 0
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and not all(map(_depthwise, integer_users(node))):
            weight, zero_point, others = node.inputs[0], _input(node, 2), [_input(node, 1)]
        elif node.op_type == "MatMulInteger":
            weight, zero_point, others = node.inputs[1], _input(node, 3), [_input(node, 0), _input(node, 2)]
        else:
            continue
        if weight is not None and can_saturate(weight):
            maker.replace(node, weight, zero_point, others)
            count += 1
    return count


def can_saturate(weight: ir.Value) -> bool:
    """Whether a weight is stored as int8 with values beyond ±64."""
    stored = stored_root(weight)
    if stored is None or stored.dtype != ir.DataType.INT8:
        return False
    assert stored.const_value is not None
    codes = stored.const_value.numpy()
    return bool(codes.size) and (int(codes.min()) < -SAFE or int(codes.max()) > SAFE)


class _Choices:
    """Replaces operators by choices of two; makes the probe and the shared constants once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._exact: ir.Value | None = None

    def replace(
        self, node: ir.Node, weight: ir.Value, zero_point: ir.Value | None, others: list[ir.Value | None]
    ) -> None:
        """Replace DequantizeLinear or MatMulInteger by an If with one branch for each type of the weight."""
        exact = self._probe()
        output = node.outputs[0]
        branches = {}
        for name, signed in (("then_branch", True), ("else_branch", False)):
            before: list[ir.Node] = []
            form, zero = weight, zero_point
            if not signed:
                before = self._to_unsigned(weight)
                form, zero = before[-1].outputs[0], self._unsigned_zero_point(node, zero_point)
            if node.op_type == "DequantizeLinear":
                inputs = [form, others[0], zero]
            else:
                inputs = [others[0], form, others[1], zero]
            while inputs[-1] is None:
                inputs.pop()
            result = ir.Value(name="form", shape=output.shape, type=output.type)
            copy = ir.Node("", node.op_type, inputs, node.attributes.values(), outputs=[result], name="form")
            branches[name] = ir.Graph([], [result], nodes=[*before, copy], name=name[:4])
        choice = ir.node("If", [exact], branches, name=f"{node.name}/If")
        choice.outputs[0].name, choice.outputs[0].shape, choice.outputs[0].type = (
            output.name,
            output.shape,
            output.type,
        )
        self.graph.insert_before(node, choice)
        ir.convenience.replace_all_uses_with(output, choice.outputs[0], replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def _to_unsigned(self, weight: ir.Value) -> list[ir.Node]:
        shift = constant(self.graph, "sqcompile/shift", np.array(_SHIFT, np.int32))
        wide = ir.node("Cast", [weight], {"to": ir.DataType.INT32})
        moved = ir.node("Add", [wide.outputs[0], shift])
        unsigned = ir.node("Cast", [moved.outputs[0]], {"to": ir.DataType.UINT8})
        for step, node in (("wide", wide), ("moved", moved), ("unsigned", unsigned)):
            # Names repeat in every branch, and so take few bytes: a branch is a scope of its own.
            node.name = node.outputs[0].name = step
        return [wide, moved, unsigned]

    def _unsigned_zero_point(self, node: ir.Node, zero_point: ir.Value | None) -> ir.Value:
        if zero_point is not None and zero_point.const_value is not None:
            codes = zero_point.const_value.numpy().astype(np.int16) + _SHIFT
            return constant(self.graph, f"{zero_point.name}/unsigned", codes.astype(np.uint8))
        scale = _input(node, 1)
        shape = () if node.op_type == "MatMulInteger" or scale is None or scale.shape is None else scale.shape
        sizes = tuple(int(size) for size in shape)  # type: ignore[arg-type]
        return constant(self.graph, f"sqcompile/middle{list(sizes)}", np.full(sizes, _SHIFT, np.uint8))

    def _probe(self) -> ir.Value:
        """Return whether this machine's kernels add products exactly: a constant once the model is loaded."""
        if self._exact is None:
            a = constant(self.graph, "sqcompile/probe_a", np.full((4, _DEPTH), 255, np.uint8))
            b = constant(self.graph, "sqcompile/probe_b", np.full((_DEPTH, 16), 127, np.int8))
            wanted = constant(self.graph, "sqcompile/probe_sum", np.array(_DEPTH * 255 * 127, np.int32))
            product = ir.node("MatMulInteger", [a, b], name="sqcompile/probe_product")
            least = ir.node("ReduceMin", product.outputs, {"keepdims": 0}, name="sqcompile/probe_least")
            equal = ir.node("Equal", [least.outputs[0], wanted], name="sqcompile/probe_exact")
            nodes = [product, least, equal]
            for node in nodes:
                node.outputs[0].name = node.name
            self.graph.insert_before(self.graph[0], nodes)
            self._exact = equal.outputs[0]
            self._exact.type, self._exact.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
        return self._exact


def _depthwise(node: ir.Node) -> bool:
    """Whether a convolution has one channel a group: its kernel multiplies in 32 bits everywhere."""
    groups = node.attributes.get("group")
    weight = node.inputs[1]
    if node.op_type != "Conv" or groups is None or weight is None or weight.shape is None:
        return False
    return weight.shape[0] == groups.as_int() and weight.shape[1] == 1


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None
