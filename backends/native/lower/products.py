"""Products: float layers, matrices of computed values, attention."""

from __future__ import annotations

import math

import torch
from torch import fx

from sqcompile.backends.native.lower.context import (
    Lowering,
    is_float,
    lowers,
    node_argument,
    tensor_of,
)
from sqcompile.backends.native.lower.linears import (
    float_linear,
    quantized_linear,
)
from sqcompile.backends.native.plan import Value
from sqcompile.operators.table import argument

aten = torch.ops.aten


def _no_floats(node: fx.Node) -> str | None:
    return None if is_float(node) else f"products of {tensor_of(node).dtype}"


@lowers(aten.linear.default, check=_no_floats)
def _linear(context: Lowering, node: fx.Node) -> Value:
    x, weight, bias = node_argument(node, 0), node_argument(node, 1), argument(node, 2)
    return _layer(context, node, x, weight, bias, outputs_axis=0)


def _layer(
    context: Lowering, node: fx.Node, x: fx.Node, weight: fx.Node, bias: object, *, outputs_axis: int
) -> Value:
    """Multiply x [.., K] by a weight, in integers where it has such codes, and add a bias."""
    quantized = quantized_linear(context, node, x, weight, bias, outputs_axis=outputs_axis)
    if quantized is not None:
        return quantized
    shape = context.shape(node)
    if context.is_constant(weight):
        return float_linear(context, node, context.value(x), weight, bias, outputs_axis=outputs_axis)
    matrix = context.value(weight)
    result = context.step(
        "matmul",
        [context.value(x), matrix if outputs_axis else context.permute(matrix, (1, 0))],
        "f32",
        shape,
    )
    return result if bias is None else context.step("add", [result, context.value(bias, "f32")], "f32", shape)


def _no_addmm(node: fx.Node) -> str | None:
    if (argument(node, 3, 1), argument(node, 4, 1)) != (1, 1):
        return "sums of products with factors"
    return _no_floats(node)


@lowers(aten.addmm.default, check=_no_addmm)
def _addmm(context: Lowering, node: fx.Node) -> Value:
    """Bias + x @ weight [K, N]."""
    bias, x, weight = (node_argument(node, position) for position in range(3))
    shape = context.shape(node)
    if tensor_of(bias).shape == tensor_of(weight).shape[1:]:
        return _layer(context, node, x, weight, bias, outputs_axis=1)
    result = context.step("matmul", [context.value(x), context.value(weight)], "f32", shape)
    return context.step("add", [result, context.value(bias)], "f32", shape)


def _no_matmul(node: fx.Node) -> str | None:
    if any(tensor_of(node_argument(node, position)).dim() < 2 for position in range(2)):
        return "products of vectors"
    return _no_floats(node)


@lowers(aten.matmul.default, aten.mm.default, aten.bmm.default, check=_no_matmul)
def _matmul(context: Lowering, node: fx.Node) -> Value:
    x, weight = node_argument(node, 0), node_argument(node, 1)
    if context.is_constant(weight) and tensor_of(weight).dim() == 2:
        return _layer(context, node, x, weight, None, outputs_axis=1)
    return context.step("matmul", [context.value(x), context.value(weight)], "f32", context.shape(node))


def _no_attention(node: fx.Node) -> str | None:
    if argument(node, 4, 0.0) != 0.0:
        return "attention with dropout"
    if any(tensor_of(node_argument(node, position)).dim() not in (3, 4) for position in range(3)):
        return "attention on other than three or four dimensions"
    key, value = (tensor_of(node_argument(node, position)) for position in (1, 2))
    if str(key.shape[-1]) != str(value.shape[-1]):
        return "attention with values of another size than keys"
    return _no_floats(node)


@lowers(aten.scaled_dot_product_attention.default, check=_no_attention)
def _attention(context: Lowering, node: fx.Node) -> Value:
    query, key, value = (
        _heads(context, node_argument(node, position), grouped=position > 0) for position in range(3)
    )
    scale = argument(node, 6)
    if scale is None:
        scale = 1 / math.sqrt(int(query.shape[-1]))
    assert isinstance(scale, (int, float))
    operands = [query, key, value]
    mask = argument(node, 3)
    if isinstance(mask, fx.Node) and not _hides_nothing(context.constant(mask)):
        operands.append(_mask(context, mask, key, heads=tensor_of(node_argument(node, 0)).dim() == 4))
    shape = (*query.shape[:3], value.shape[3])
    result = context.step(
        "attention", operands, "f32", shape, (int(bool(argument(node, 5))),), (float(scale),)
    )
    return context.reshape(result, context.shape(node))


def _hides_nothing(mask: torch.Tensor | None) -> bool:
    """Whether a mask changes no score in any call: models make one where they are given none."""
    if mask is None:
        return False
    return bool(mask.all() if mask.dtype == torch.bool else not mask.any())


def _mask(context: Lowering, node: fx.Node, key: Value, *, heads: bool) -> Value:
    """Return a mask with four dimensions, the last one whole and without gaps; without heads it has none either."""
    mask = context.value(node)
    shape = [1] * (4 - mask.rank) + list(mask.shape)
    if not heads and mask.rank == 3:
        shape = [mask.shape[0], 1, *mask.shape[1:]]
    mask = context.expand(context.reshape(mask, shape), [*shape[:3], key.shape[2]])
    return context.step("dense_rows", [mask], mask.dtype, mask.shape)


def _heads(context: Lowering, node: fx.Node, *, grouped: bool) -> Value:
    """Return [B, heads, L, D] with elements of a head beside each other; keys before they were repeated."""
    source = _unrepeated(node) if grouped else None
    value = context.value(source if source is not None else node)
    if value.rank == 3:
        value = context.reshape(value, [value.shape[0], 1, *value.shape[1:]])
    return context.step("dense_rows", [value], "f32", value.shape)


def _unrepeated(node: fx.Node) -> fx.Node | None:
    """Return x [B, G, S, D] where a node repeats each head of it, as grouped attention is written out."""
    if node.target not in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return None
    expanded = node.args[0]
    if not isinstance(expanded, fx.Node) or expanded.target is not aten.expand.default:
        return None
    inner = expanded.args[0]
    if not isinstance(inner, fx.Node) or inner.target is not aten.unsqueeze.default:
        return None
    source = inner.args[0]
    assert isinstance(source, fx.Node)
    before, spread, after = (tensor_of(item).shape for item in (source, expanded, node))
    if len(before) != 4 or len(spread) != 5 or len(after) != 4 or tensor_of(inner).shape[2] != 1:
        return None
    same = [(before[0], after[0]), (before[2], after[2]), (before[3], after[3]), (spread[1], before[1])]
    heads = all(isinstance(size, int) for size in (before[1], spread[2], after[1]))
    if not heads or before[1] * spread[2] != after[1]:
        return None
    return source if all(str(a) == str(b) for a, b in same) else None
