"""Matrix products with a stored, quantized weight: the form that runs fastest for each kind of activation.

- quantized, scale from calibration: DequantizeLinear around Gemm or MatMul, which ONNX Runtime fuses to
  QGemm, QLinearMatMul or MatMulIntegerToFloat;
- quantized, scale from the data: MatMulInteger, which it fuses with its scaling to DynamicQuantizeMatMul;
- float: MatMulNBits, which reads the weight in its own few bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from sqcompile.backends.onnxruntime.selection.context import Context
from sqcompile.backends.onnxruntime.selection.values import (
    Mapping,
    as_dequantize,
    as_quantize,
    dynamic_arguments,
    rank_of,
)
from sqcompile.errors import InputError
from sqcompile.operators.table import argument, operator_of
from sqcompile.quantization import affine
from sqcompile.rewrite import Rewriter

aten = torch.ops.aten
ort = torch.ops.sqcompile_ort
sq = torch.ops.sqcompile

ACCURACY_LEVEL = 4
"""MatMulNBits: round activations to int8 block by block, and run the integer kernels."""


@dataclass(frozen=True)
class Linear:
    """A product x @ weight + bias.

    Attributes:
        node: The operator.
        data: Its activation.
        weight: Dequantization of its stored weight, a matrix.
        bias: The bias, or None.
        outputs_axis: 0 for weights [N, K], 1 for weights [K, N].
    """

    node: fx.Node
    data: fx.Node
    weight: Mapping
    bias: fx.Node | None
    outputs_axis: int

    @property
    def per_output(self) -> bool:
        """Whether the weight has one scale, or one for each output."""
        weight = self.weight
        return weight.axis is None or (weight.group_size is None and weight.axis % 2 == self.outputs_axis)


def select_linears(context: Context) -> None:
    """Rewrite every linear layer with quantized context."""
    edit = context.edit
    for node in list(edit.graph.nodes):
        linear = _linear(node)
        if linear is None:
            continue
        with edit.before(node):
            result = _select(context, linear)
        if result is not None:
            edit.replace(node, result)


def _linear(node: fx.Node) -> Linear | None:
    entry = operator_of(node)
    if entry is None or entry.kind not in ("linear", "matmul") or entry.weight is None:
        return None
    if node.target is aten.addmm.default and (node.kwargs or len(node.args) > 3):
        return None  # scaled by alpha and beta
    weight = as_dequantize(argument(node, entry.weight))
    data = argument(node, entry.data[0])
    bias = None if entry.bias is None else argument(node, entry.bias)
    if weight is None or not weight.stored or not weight.fixed or not isinstance(data, fx.Node):
        return None
    if rank_of(weight.source) != 2 or rank_of(data) < 2:
        return None
    assert bias is None or isinstance(bias, fx.Node)
    return Linear(node, data, weight, bias, 0 if node.target is aten.linear.default else 1)


def _select(context: Context, linear: Linear) -> fx.Node | None:
    data = as_dequantize(linear.data)
    if data is None:
        return _few_bits(context, linear, linear.data)
    if data.bits > 8 or linear.weight.bits > 8:
        return None  # no kernel keeps more than 8 bits of an activation
    if not linear.per_output:
        return _few_bits(context, linear, _before_quantization(context, linear, data))
    if data.per_tensor and data.fixed:
        return _calibrated(context, linear, data)
    quantized = as_quantize(data.source)
    if quantized is None or data.qmin < 0:
        return None
    if data.per_tensor:
        return _dynamic(context, linear, quantized)
    if data.group_size == -1 and data.axis in (-1, rank_of(linear.data) - 1):
        return _per_token(context, linear, data)
    return None


def _calibrated(context: Context, linear: Linear, data: Mapping) -> fx.Node:
    """Quantize and dequantize nodes placed as ONNX Runtime fuses them."""
    node, edit = linear.node, context.edit
    codes, zero_point = context.signed_codes(linear.weight)
    bias = None if linear.bias is None else integer_bias(context, data, linear.weight, linear.bias)
    per_channel = linear.weight.axis is not None
    if linear.outputs_axis == 0 and rank_of(linear.data) == 2:
        weight = context.dequantized(linear.weight, codes, zero_point, 0 if per_channel else None)
        return edit.call(aten.linear.default, linear.data, weight, bias, like=node)
    if linear.outputs_axis == 0:
        codes = context.transposed(codes, linear.weight)
    weight = context.dequantized(linear.weight, codes, zero_point, 1 if per_channel else None)
    if bias is not None and rank_of(linear.data) == 2:
        return edit.call(aten.addmm.default, bias, linear.data, weight, like=node)
    product = edit.call(aten.matmul.default, linear.data, weight, like=node)
    return product if bias is None else edit.call(aten.add.Tensor, product, bias, like=node)


def integer_bias(context: Context, data: Mapping, weight: Mapping, bias: fx.Node) -> fx.Node:
    """Return a bias as dequantized int32 codes of scale s_x · s_w, or as it is where it cannot be.

    A float bias would keep ONNX Runtime from fusing a Gemm whose output stays float.
    """
    if bias.op != "get_attr":
        return bias

    def parts() -> tuple[torch.Tensor, torch.Tensor]:
        return affine.quantize_bias(
            context.tensor(bias), context.tensor(data.scale), context.tensor(weight.scale)
        )

    try:
        parts()
    except InputError as error:
        context.notes.append(f"{bias.target} stays float: {error.what} ({error.seen})")
        return bias
    sources = (bias, data.scale, weight.scale)
    codes = context.constant("int32", sources, lambda: parts()[0])
    scale = context.constant("scale", sources, lambda: parts()[1])
    axis = None if weight.axis is None else 0
    return context.edit.call(ort.dequantize_linear.default, codes, scale, None, axis, None, like=bias)


def _dynamic(context: Context, linear: Linear, quantized: Mapping) -> fx.Node:
    """One scale for the whole activation, taken from it: DynamicQuantizeMatMul after fusion."""
    edit = context.edit
    codes, scale, zero_point = context.dynamic_codes(quantized)
    product = _integer_product(context, linear, codes, zero_point)
    values = edit.call(aten.to.dtype, product, torch.float32, like=linear.node)
    factor = edit.call(aten.mul.Tensor, scale, linear.weight.scale, like=linear.node)
    return _biased(edit, linear, edit.call(aten.mul.Tensor, values, factor, like=linear.node))


def _per_token(context: Context, linear: Linear, data: Mapping) -> fx.Node:
    """One scale for each row of the activation: integer product, rows scaled after it.

    x = (codes - z) · s for each row, so x @ w = s · (codes @ w - z · sum of w over K), in exact integers.
    """
    node, edit = linear.node, context.edit
    origin = dynamic_arguments(data)
    symmetric = origin is not None and origin[5] is True
    middle = (data.qmin + data.qmax + 1) // 2 if symmetric else 0
    offset = context.constant(
        f"offset{middle}", (linear.weight.source,), lambda: torch.tensor(middle, dtype=torch.uint8)
    )
    product = _integer_product(context, linear, data.source, offset)
    if not symmetric:
        sums = context.constant(
            "sums", (linear.weight.source, linear.weight.zero_point), lambda: _column_sums(context, linear)
        )
        shift = edit.call(aten.mul.Tensor, data.zero_point, sums, like=node)
        product = edit.call(aten.sub.Tensor, product, shift, like=node)
    values = edit.call(aten.to.dtype, product, torch.float32, like=node)
    values = edit.call(aten.mul.Tensor, values, data.scale, like=node)
    return _biased(edit, linear, edit.call(aten.mul.Tensor, values, linear.weight.scale, like=node))


def _column_sums(context: Context, linear: Linear) -> torch.Tensor:
    """Return the sum over K of (codes - zero_point), one for each output, in int32."""
    codes = context.tensor(linear.weight.source).int()
    columns = codes.shape[1 - linear.outputs_axis]
    return (codes.sum(1 - linear.outputs_axis) - context.tensor(linear.weight.zero_point) * columns).int()


def _integer_product(context: Context, linear: Linear, codes: fx.Node, zero_point: fx.Node) -> fx.Node:
    weight, weight_zero = context.signed_codes(linear.weight)
    plain = not bool(context.tensor(weight_zero).any())
    if linear.outputs_axis == 0:
        weight = context.transposed(weight, linear.weight)
    return context.edit.call(
        ort.matmul_integer.default,
        codes,
        weight,
        zero_point,
        None if plain else weight_zero,
        like=linear.node,
    )


def _before_quantization(context: Context, linear: Linear, data: Mapping) -> fx.Node:
    """Return the activation that MatMulNBits should take where weights have scales for groups of inputs.

    It rounds activations itself, to 8 bits with a scale for each block: finer than one scale for each
    token or tensor. Rounding twice would only add an error.
    """
    quantized = as_quantize(data.source)
    if quantized is None or data.fixed:
        return linear.data
    context.notes.append(f"{linear.weight.source.target}: activations are quantized block by block")
    return quantized.source


def _few_bits(context: Context, linear: Linear, data: fx.Node) -> fx.Node | None:
    """A float activation: MatMulNBits, unless the weight's groups or bits are none of its own."""
    packed = context.packed(linear.weight, outputs_axis=linear.outputs_axis)
    if packed is None:
        return None
    return context.edit.call(
        ort.matmul_nbits.default,
        data,
        packed.codes,
        packed.scales,
        packed.zero_points,
        linear.bias,
        packed.columns,
        packed.outputs,
        packed.bits,
        packed.block_size,
        ACCURACY_LEVEL,
        like=linear.node,
    )


def _biased(edit: Rewriter, linear: Linear, product: fx.Node) -> fx.Node:
    if linear.bias is None:
        return product
    return edit.call(aten.add.Tensor, product, linear.bias, like=linear.node)
