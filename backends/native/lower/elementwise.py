"""Operators that compute each element from those at the same place."""

from __future__ import annotations

import torch
from torch import fx

from sqcompile.backends.native.lower.context import (
    DTYPES,
    Lowering,
    dtype_of,
    is_float,
    lowers,
    tensor_of,
)
from sqcompile.backends.native.plan import Value
from sqcompile.operators.table import argument

aten = torch.ops.aten

_UNARY = {
    aten.neg.default: "neg",
    aten.abs.default: "abs",
    aten.exp.default: "exp",
    aten.log.default: "log",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.sin.default: "sin",
    aten.cos.default: "cos",
    aten.tanh.default: "tanh",
    aten.sigmoid.default: "sigmoid",
    aten.silu.default: "silu",
    aten.erf.default: "erf",
    aten.floor.default: "floor",
    aten.ceil.default: "ceil",
    aten.round.default: "round",
}
_ARITHMETIC = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.minimum.default: "minimum",
    aten.maximum.default: "maximum",
    aten.min.other: "minimum",
    aten.max.other: "maximum",
    aten.add.Scalar: "add",
    aten.sub.Scalar: "sub",
    aten.mul.Scalar: "mul",
}
# (operation, whether the operands change places)
_COMPARISONS = {
    "eq": ("eq", False),
    "ne": ("ne", False),
    "lt": ("lt", False),
    "le": ("le", False),
    "gt": ("lt", True),
    "ge": ("le", True),
}
_BITWISE = {
    "__and__": "bit_and",
    "__or__": "bit_or",
    "__xor__": "bit_xor",
    "bitwise_and": "bit_and",
    "bitwise_or": "bit_or",
    "bitwise_xor": "bit_xor",
    "logical_and": "bit_and",
    "logical_or": "bit_or",
    "logical_xor": "bit_xor",
}
_NUMBERS = ("f32", "i64", "i32")


def _overloads(names: dict[str, object]) -> list[object]:
    return [
        getattr(getattr(aten, name), overload)
        for name in names
        for overload in getattr(aten, name).overloads()
        if overload in ("Tensor", "Scalar", "default")
    ]


def _name(node: fx.Node) -> str:
    return node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr,no-any-return]


def _no_numbers(node: fx.Node) -> str | None:
    dtype = DTYPES.get(tensor_of(node).dtype)
    return None if dtype in _NUMBERS else f"arithmetic on {tensor_of(node).dtype}"


@lowers(*_UNARY, check=_no_numbers)
def _unary(context: Lowering, node: fx.Node) -> Value:
    operation = _UNARY[node.target]  # type: ignore[index]
    dtype = dtype_of(node)
    value = context.value(node.args[0], dtype)
    if dtype != "f32" and operation in ("floor", "ceil", "round"):
        return value
    return context.step(operation, [value], dtype, value.shape)


@lowers(
    *_ARITHMETIC,
    check=lambda node: (
        None if tensor_of(node).dtype is torch.bool and node.target is aten.mul.Tensor else _no_numbers(node)
    ),
)
def _arithmetic(context: Lowering, node: fx.Node) -> Value:
    operation = _ARITHMETIC[node.target]  # type: ignore[index]
    dtype = dtype_of(node)
    a, b = context.value(node.args[0], dtype), context.value(argument(node, 1), dtype)
    if operation in ("add", "sub") and argument(node, 2, 1) != 1:
        b = context.binary("mul", b, context.value(argument(node, 2), dtype))
    if dtype == "boolean":
        operation = "bit_and"
    shape = context.shape(node)
    neutral = 1 if operation == "mul" else 0 if operation in ("add", "sub") else None
    if neutral is not None and _is_number(context, b, neutral) and a.shape == shape:
        return a
    return context.step(operation, [a, b], dtype, shape)


def _is_number(context: Lowering, value: Value, number: float) -> bool:
    """Whether a value is a constant that holds this number once."""
    return value.kind == "constant" and value.shape == () and context.plan.tensors[value.source] == number


@lowers(aten.rsub.Scalar, aten.rsub.Tensor, check=_no_numbers)
def _reversed_difference(context: Lowering, node: fx.Node) -> Value:
    dtype = dtype_of(node)
    a, b = context.value(node.args[0], dtype), context.value(node.args[1], dtype)
    if argument(node, 2, 1) != 1:
        a = context.binary("mul", a, context.value(argument(node, 2), dtype))
    return context.step("sub", [b, a], dtype, context.shape(node))


@lowers(aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor)
def _divide(context: Lowering, node: fx.Node) -> Value:
    a, b = context.value(node.args[0], "f32"), context.value(argument(node, 1), "f32")
    return context.step("div", [a, b], "f32", context.shape(node))


@lowers(aten.reciprocal.default)
def _reciprocal(context: Lowering, node: fx.Node) -> Value:
    return context.step(
        "div", [context.number(1, "f32"), context.value(node.args[0], "f32")], "f32", context.shape(node)
    )


@lowers(aten.square.default, check=_no_numbers)
def _square(context: Lowering, node: fx.Node) -> Value:
    value = context.value(node.args[0])
    return context.step("mul", [value, value], value.dtype, value.shape)


@lowers(
    aten.pow.Tensor_Scalar,
    aten.pow.Tensor_Tensor,
    aten.pow.Scalar,
    check=lambda node: None if is_float(node) else "powers of integers",
)
def _power(context: Lowering, node: fx.Node) -> Value:
    """Small powers as products and roots, as PyTorch computes them too."""
    exponent = node.args[1]
    value = context.value(node.args[0], "f32")
    shape = context.shape(node)
    if exponent == 1:
        return value
    if exponent in (2, 3):
        square = context.step("mul", [value, value], "f32", shape)
        return square if exponent == 2 else context.step("mul", [square, value], "f32", shape)
    if exponent in (0.5, -0.5):
        return context.step("sqrt" if exponent == 0.5 else "rsqrt", [value], "f32", shape)
    return context.step("pow", [value, context.value(exponent, "f32")], "f32", shape)


@lowers(
    *_overloads(_COMPARISONS)  # type: ignore[arg-type]
)
def _compare(context: Lowering, node: fx.Node) -> Value:
    operation, swapped = _COMPARISONS[_name(node)]
    a, b = node.args[0], argument(node, 1)
    common = torch.result_type(_sample(a), _sample(b))
    dtype = DTYPES.get(common, "i64")
    if dtype == "i8":
        dtype = "i32"
    operands = [context.value(a, dtype), context.value(b, dtype)]
    return context.step(operation, operands[::-1] if swapped else operands, "boolean", context.shape(node))


def _sample(item: object) -> torch.Tensor | float:
    """Return something that has the type of an argument, for PyTorch's rules of promotion."""
    if isinstance(item, fx.Node):
        value = item.meta["val"]
        if isinstance(value, torch.Tensor):
            return torch.empty((1,) * value.dim(), dtype=value.dtype)
        return 0
    assert isinstance(item, (bool, int, float))
    return item


def _no_bits(node: fx.Node) -> str | None:
    if _name(node).startswith("logical") or tensor_of(node).dtype in (torch.bool, torch.int64):
        return None
    return f"bits of {tensor_of(node).dtype}"


@lowers(
    *_overloads(_BITWISE),  # type: ignore[arg-type]
    check=_no_bits,
)
def _bitwise(context: Lowering, node: fx.Node) -> Value:
    operation, dtype, shape = _BITWISE[_name(node)], dtype_of(node), context.shape(node)
    a, b = context.value(node.args[0], dtype), context.value(argument(node, 1), dtype)
    if operation == "bit_and" and dtype == "boolean":
        # Masks are built from "everything, and …".
        for one, other in ((a, b), (b, a)):
            if other.shape == shape and _is_number(context, one, 1):
                return other
    return context.step(operation, [a, b], dtype, shape)


@lowers(
    aten.logical_not.default,
    aten.bitwise_not.default,
    check=lambda node: None if tensor_of(node).dtype is torch.bool else "bits of integers",
)
def _negate(context: Lowering, node: fx.Node) -> Value:
    value = context.value(node.args[0], "boolean")
    return context.step("logical_not", [value], "boolean", value.shape)


@lowers(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(context: Lowering, node: fx.Node) -> Value:
    dtype = dtype_of(node)
    chosen = [
        context.value(node.args[0], "boolean"),
        *(context.value(item, dtype) for item in node.args[1:3]),
    ]
    return context.step("where", chosen, dtype, context.shape(node))


@lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(context: Lowering, node: fx.Node) -> Value:
    dtype = dtype_of(node)
    chosen = [
        context.value(node.args[1], "boolean"),
        context.value(node.args[2], dtype),
        context.value(node.args[0], dtype),
    ]
    return context.step("where", chosen, dtype, context.shape(node))


@lowers(aten.gelu.default)
def _gelu(context: Lowering, node: fx.Node) -> Value:
    operation = "gelu_tanh" if argument(node, 1, "none") == "tanh" else "gelu"
    value = context.value(node.args[0])
    return context.step(operation, [value], "f32", value.shape)


def _bounds(node: fx.Node) -> tuple[object, object]:
    match node.target:
        case aten.relu.default:
            return 0, None
        case aten.relu6.default:
            return 0, 6
        case aten.hardtanh.default:
            return argument(node, 1), argument(node, 2)
        case aten.clamp_max.default:
            return None, argument(node, 1)
        case _:
            return argument(node, 1), argument(node, 2) if node.target is aten.clamp.default else None


@lowers(
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    check=_no_numbers,
)
def _clamp(context: Lowering, node: fx.Node) -> Value:
    low, high = _bounds(node)
    dtype = dtype_of(node)
    value = context.value(node.args[0], dtype)
    if low is not None:
        value = context.binary("maximum", value, context.value(low, dtype))
    if high is not None:
        value = context.binary("minimum", value, context.value(high, dtype))
    return value


@lowers(aten.hardsigmoid.default, aten.hardswish.default)
def _hard_sigmoid(context: Lowering, node: fx.Node) -> Value:
    """clamp(x + 3, 0, 6) / 6, times x for the other."""
    value = context.value(node.args[0])
    gate = context.binary("add", value, context.number(3, "f32"))
    gate = context.binary(
        "minimum", context.binary("maximum", gate, context.number(0, "f32")), context.number(6, "f32")
    )
    if node.target is aten.hardswish.default:
        gate = context.binary("mul", value, gate)
    return context.binary("div", gate, context.number(6, "f32"))


@lowers(aten.leaky_relu.default)
def _leaky_relu(context: Lowering, node: fx.Node) -> Value:
    value = context.value(node.args[0])
    scaled = context.binary("mul", value, context.value(argument(node, 1, 0.01), "f32"))
    positive = context.step("lt", [context.number(0, "f32"), value], "boolean", value.shape)
    return context.step("where", [positive, value, scaled], "f32", value.shape)
