"""Quantize, dequantize and scales from the data: as kernels on rows where they fit, else spelled out.

Spelled out they are float32 steps in the order of `sqcompile/quantization/affine.py`, so that codes are
the reference's, bit for bit.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np
import sympy
import torch
from torch import fx

from sqcompile.backends.native.lower.context import (
    Lowering,
    Results,
    dtype_of,
    lowers,
    node_argument,
    product,
    tensor_of,
)
from sqcompile.backends.native.plan import Size, Value
from sqcompile.operators.table import argument
from sqcompile.quantization.affine import SMALLEST_SCALE
from sqcompile.quantization.format import middle_code

sq = torch.ops.sqcompile

GIVEN, SYMMETRIC, AFFINE, AFFINE_TENSOR = range(4)
"""Where `quantize_rows` takes its scale from."""

_CACHE_LINE = 64


@dataclass(frozen=True)
class Granularity:
    """The last arguments of a quantizing operator."""

    axis: int | None
    group_size: int | None
    qmin: int
    qmax: int

    @classmethod
    def of(cls, node: fx.Node, first: int, rank: int) -> Granularity:
        """Read them from a call, the axis counted from the front."""
        axis, group_size, qmin, qmax = (argument(node, first + index) for index in range(4))
        assert isinstance(qmin, int) and isinstance(qmax, int)
        assert axis is None or isinstance(axis, int)
        assert group_size is None or isinstance(group_size, int)
        return cls(None if axis is None else axis % rank, group_size, qmin, qmax)

    def rows_mode(self, rank: int, *, symmetric: bool) -> tuple[int, bool] | None:
        """Return how `quantize_rows` takes such scales from the data, and whether codes are signed."""
        per_tensor = self.axis is None
        per_row = self.axis == rank - 1 and self.group_size == -1
        unsigned = (self.qmin, self.qmax) == (0, 255)
        if not symmetric:
            return (
                ((AFFINE_TENSOR if per_tensor else AFFINE), False)
                if unsigned and (per_tensor or per_row)
                else None
            )
        if not per_row:
            return None
        if unsigned:
            return SYMMETRIC, False
        return (SYMMETRIC, True) if self.qmin in (-128, -127) and self.qmax == 127 else None


@dataclass(frozen=True)
class Rows:
    """Codes as products take them.

    Attributes:
        codes: [M, stride] u8 or i8, from column k on the code of zero.
        scale: [M], [M, groups] or [1].
        zero_point: [M] or [1].
        sums: [M, groups] sums of codes.
        columns: The columns that hold data.
    """

    codes: Value
    scale: Value
    zero_point: Value
    sums: Value | None
    columns: int

    def shown(self, context: Lowering, shape: tuple[Size, ...]) -> Value:
        """Return the codes in the shape of what was quantized."""
        return context.reshape(context.slice(self.codes, 1, 0, self.columns), shape)


def quantize_rows(
    context: Lowering,
    x: Value,
    mode: int,
    *,
    signed: bool,
    scale_group: int = 0,
    sum_group: int = 0,
    given: tuple[Value, Value] | None = None,
) -> Rows:
    """Quantize x [.., K] by rows; the same for the same x, whoever asks."""
    key = ("rows", x, mode, signed, scale_group, sum_group, given)
    if key in context.shared:
        rows: Rows = context.shared[key]
        return rows
    columns = x.shape[-1]
    assert isinstance(columns, int)
    m = product(x.shape[:-1])
    groups = -(-columns // sum_group) if sum_group else 1
    padded = groups * sum_group if sum_group else -(-columns // 4) * 4
    # A row starts on a cache line, and rows do not share their L1 sets.
    stride = -(-padded // _CACHE_LINE) * _CACHE_LINE + _CACHE_LINE
    one = mode in (GIVEN, AFFINE_TENSOR)
    outputs: list[tuple[str, tuple[Size, ...]]] = [
        ("i8" if signed else "u8", (m, stride)),
        ("f32", (1,) if one else (m, groups) if scale_group else (m,)),
        ("i32", (m,) if mode == AFFINE else (1,)),
        ("i32", (m, groups)),
    ]
    inputs = [context.contiguous(x), *(given or ())]
    codes, scale, zero_point, sums = context.steps(
        "quantize_rows", inputs, outputs, (mode, int(signed), scale_group, sum_group)
    )
    rows = Rows(codes, scale, zero_point, sums, columns)
    context.shared[key] = rows
    return rows


def rows_of(context: Lowering, data: fx.Node) -> Rows | None:
    """Return the codes behind a dequantized activation as an 8-bit product takes them, or None.

    Args:
        context: The plan under construction.
        data: The activation, [.., K].
    """
    if data.target is not sq.dequantize.default:
        return None
    rank = tensor_of(data).dim()
    source, scale, zero_point = (node_argument(data, position) for position in range(3))
    how = Granularity.of(data, 3, rank)
    per_tensor, per_row = how.axis is None, how.axis == rank - 1 and how.group_size == -1
    columns = tensor_of(data).shape[-1]
    if rank < 1 or not (per_tensor or per_row) or not isinstance(columns, int) or how.qmax - how.qmin > 255:
        return None
    if ("quantized", source) in context.shared and how.qmin >= 0:
        rows: Rows = context.shared["quantized", source]
        return rows
    codes = context.value(source)
    m = product(codes.shape[:-1])
    length: Size = 1 if per_tensor else m
    zero = context.reshape(context.value(zero_point), [length])
    if codes.dtype == "i8":
        shift = context.number(128, "i32")
        codes = context.cast(context.binary("add", context.cast(codes, "i32"), shift), "u8")
        zero = context.binary("add", zero, shift)
    codes = context.reshape(codes, [m, columns])
    if columns % 4:
        room = context.expand(context.number(0, "u8"), [m, -columns % 4])
        codes = context.step("cat", [codes, room], "u8", [m, columns - columns % -4], (1,))
    scales = context.contiguous(context.reshape(context.value(scale), [length]))
    return Rows(context.contiguous(codes), scales, context.contiguous(zero), None, columns)


def _ungrouped(node: fx.Node, position: int) -> str | None:
    """Say why a granularity cannot be spelled out: groups that do not divide the dimension."""
    shape = tensor_of(node_argument(node, 0)).shape
    how = Granularity.of(node, position, max(len(shape), 1))
    if how.axis is None or how.group_size in (None, -1):
        return None
    size = shape[how.axis]
    assert how.group_size is not None
    return (
        None
        if isinstance(size, int) and size % how.group_size == 0
        else "groups that do not fill the dimension"
    )


def _grouped(context: Lowering, x: Value, how: Granularity) -> Value:
    """Return x with groups as a dimension of their own, where there are any."""
    if how.axis is None or how.group_size in (None, -1):
        return x
    assert how.group_size is not None
    groups = sympy.Integer(x.shape[how.axis]) // how.group_size
    return context.reshape(x, [*x.shape[: how.axis], int(groups), how.group_size, *x.shape[how.axis + 1 :]])


def _spread(context: Lowering, scale: Value, rank: int, how: Granularity) -> Value:
    """Return a scale or zero point with a shape that is broadcast to `_grouped`."""
    if how.axis is None or how.group_size == -1:
        return scale
    if how.group_size is None:
        shape: list[Size] = [1] * rank
        shape[how.axis] = scale.shape[0]
        return context.reshape(scale, shape)
    return context.reshape(scale, [*scale.shape[: how.axis + 1], 1, *scale.shape[how.axis + 1 :]])


@lowers(sq.quantize.default, check=lambda node: _ungrouped(node, 3))
def _quantize(context: Lowering, node: fx.Node) -> Value:
    x, scale, zero_point = (node_argument(node, position) for position in range(3))
    rank = tensor_of(x).dim()
    how = Granularity.of(node, 3, max(rank, 1))
    rows = _rows(context, node, x, how)
    if rows is not None:
        context.shared["quantized", node] = rows
        return rows.shown(context, context.shape(node))
    value = _grouped(context, context.value(x), how)
    scales = _spread(context, context.value(scale), rank, how)
    zeros = _spread(context, context.value(zero_point, "f32"), rank, how)
    codes = context.binary("div", value, scales)
    codes = context.step("round", [codes], "f32", codes.shape)
    codes = context.binary("add", codes, zeros)
    codes = context.binary("maximum", codes, context.number(how.qmin, "f32"))
    codes = context.binary("minimum", codes, context.number(how.qmax, "f32"))
    return context.reshape(context.cast(codes, dtype_of(node)), context.shape(node))


def _rows(context: Lowering, node: fx.Node, x: fx.Node, how: Granularity) -> Rows | None:
    """Quantize by the kernel where it computes just this; a scale from the data brings its codes along."""
    scale = node_argument(node, 1)
    if scale.target is operator.getitem:
        source = node_argument_of(scale)
        if source.args[0] is not x or source.target is not sq.dynamic_scale.default:
            return None
        found: Rows | None = context.shared.get(("scaled", source))
        same = Granularity.of(source, 1, max(tensor_of(x).dim(), 1)) == how
        return found if same else None
    columns = tensor_of(x).shape[-1] if tensor_of(x).dim() else None
    fixed = context.is_constant(scale) and context.is_constant(node_argument(node, 2))
    if how.axis is not None or not fixed or not isinstance(columns, int) or (how.qmin, how.qmax) != (0, 255):
        return None
    given = (context.value(scale), context.value(node_argument(node, 2)))
    return quantize_rows(context, context.value(x), GIVEN, signed=False, given=given)


def node_argument_of(node: fx.Node) -> fx.Node:
    """Return the node that a `getitem` takes a result of."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


@lowers(sq.lookup.default)
def _lookup(context: Lowering, node: fx.Node) -> Value:
    """Codes of values that a table has the entries of."""
    codes, table = context.value(node_argument(node, 0), "i64"), context.value(node_argument(node, 1))
    return context.step("index", [table, codes], dtype_of(node), context.shape(node), (0,))


@lowers(sq.dequantize.default, check=lambda node: _ungrouped(node, 3))
def _dequantize(context: Lowering, node: fx.Node) -> Value:
    codes, scale, zero_point = (node_argument(node, position) for position in range(3))
    rank = tensor_of(codes).dim()
    how = Granularity.of(node, 3, max(rank, 1))
    value = _grouped(context, context.value(codes, "f32"), how)
    zeros = _spread(context, context.value(zero_point, "f32"), rank, how)
    scales = _spread(context, context.value(scale), rank, how)
    value = context.binary("mul", context.binary("sub", value, zeros), scales)
    return context.reshape(value, context.shape(node))


@lowers(sq.dynamic_scale.default, check=lambda node: _ungrouped(node, 1))
def _dynamic_scale(context: Lowering, node: fx.Node) -> Results:
    x = node_argument(node, 0)
    rank = tensor_of(x).dim()
    how = Granularity.of(node, 1, max(rank, 1))
    symmetric = bool(argument(node, 5))
    shapes = [tuple(context.size(size) for size in part.shape) for part in node.meta["val"]]
    mode = how.rows_mode(rank, symmetric=symmetric) if rank else None
    if mode is not None and isinstance(tensor_of(x).shape[-1], int):
        rows = quantize_rows(context, context.value(x), mode[0], signed=mode[1])
        context.shared["scaled", node] = rows
        zero = rows.zero_point
        if mode[0] == SYMMETRIC:
            zero = context.expand(context.number(middle_code(how.qmin, how.qmax), "i32"), shapes[1])
        return [context.reshape(rows.scale, shapes[0]), context.reshape(zero, shapes[1])]
    scale, zero = _scale_of(context, _range(context, context.value(x), how), how, symmetric)
    return [context.reshape(scale, shapes[0]), context.reshape(zero, shapes[1])]


def _range(context: Lowering, x: Value, how: Granularity) -> tuple[Value, Value]:
    """Return the least and the greatest value for each scale, zero included."""
    x = _grouped(context, x, how)
    if how.axis is None:
        axes = list(range(x.rank))
    elif how.group_size is None:
        axes = [axis for axis in range(x.rank) if axis != how.axis]
    else:
        axes = [how.axis if how.group_size == -1 else how.axis + 1]
    kept = [axis for axis in range(x.rank) if axis not in axes]
    moved = context.permute(x, [*kept, *axes])
    zero = context.number(0, "f32")
    shape = [x.shape[axis] for axis in kept]
    low, high = (
        context.step(operation, [moved], "f32", shape, (len(axes),))
        for operation in ("reduce_min", "reduce_max")
    )
    return context.binary("minimum", low, zero), context.binary("maximum", high, zero)


def _scale_of(
    context: Lowering, bounds: tuple[Value, Value], how: Granularity, symmetric: bool
) -> tuple[Value, Value]:
    """Return scale and zero point for a range, by the formula of `affine.unchecked_scale`."""
    low, high = bounds
    middle = middle_code(how.qmin, how.qmax)
    if symmetric:
        span, steps = (
            context.binary("maximum", context.step("neg", [low], "f32", low.shape), high),
            how.qmax - middle,
        )
    else:
        largest = context.number(float(np.finfo(np.float32).max), "f32")
        span, steps = (
            context.binary("minimum", context.binary("sub", high, low), largest),
            how.qmax - how.qmin,
        )
    scale = context.binary("div", span, context.number(steps, "f32"))
    scale = context.binary("maximum", scale, context.number(SMALLEST_SCALE, "f32"))
    empty = context.binary("eq", span, context.number(0, "f32"), "boolean")
    scale = context.step("where", [empty, context.number(1, "f32"), scale], "f32", scale.shape)
    if symmetric:
        return scale, context.expand(context.number(middle, "i32"), scale.shape)
    zero = context.binary("sub", context.number(how.qmin, "f32"), context.binary("div", low, scale))
    zero = context.binary("maximum", zero, context.number(how.qmin, "f32"))
    zero = context.binary("minimum", zero, context.number(how.qmax, "f32"))
    return scale, context.cast(context.step("round", [zero], "f32", zero.shape), "i32")


def embedding_of_codes(context: Lowering, node: fx.Node, indices: Value) -> Value | None:
    """Look rows of codes up and dequantize only those, or return None if the table holds no codes.

    Args:
        context: The plan under construction.
        node: The embedding.
        indices: Its indices.
    """
    table = node_argument(node, 0)
    if table.target is not sq.dequantize.default or _ungrouped(table, 3) or not context.is_constant(table):
        return None
    codes, scale, zero_point = (node_argument(table, position) for position in range(3))
    how = Granularity.of(table, 3, 2)
    by_column = how.axis == 0 and how.group_size is not None  # groups of rows: scales do not follow the rows
    if by_column or (how.axis == 1 and how.group_size is None):
        return None
    shape = context.shape(node)
    rows, lowest = _rows_of_codes(context, codes, how, indices, shape)
    parts = []
    for item in (scale, zero_point):
        value = context.value(item)
        if how.axis is not None:
            trailing = value.shape[1:]
            value = context.step("index", [value, indices], value.dtype, [*indices.shape, *trailing], (0,))
        parts.append(value)
    last = len(shape) - 1
    if how.axis == 0:
        parts = [context.reshape(value, [*value.shape, 1]) for value in parts]
        how = Granularity(None, None, how.qmin, how.qmax)
    elif how.axis == 1:
        how = Granularity(last, how.group_size, how.qmin, how.qmax)
    scales, zeros = (_spread(context, value, len(shape), how) for value in parts)
    value = _grouped(context, context.cast(rows, "f32"), how)
    if lowest:
        zeros = context.binary("sub", zeros, context.number(lowest, "i32"))
    value = context.binary("sub", value, context.cast(zeros, "f32"))
    return context.reshape(context.binary("mul", value, scales), shape)


def _rows_of_codes(
    context: Lowering, codes: fx.Node, how: Granularity, indices: Value, shape: tuple[Size, ...]
) -> tuple[Value, int]:
    """Look rows of codes up, which are stored two a byte if they fit; also return what code 0 then is."""
    columns = shape[-1]
    if how.qmax - how.qmin > 15 or not isinstance(columns, int):
        return context.step("index", [context.value(codes), indices], dtype_of(codes), shape, (0,)), 0
    tensor = context.constant(codes)
    assert tensor is not None
    nibbles = (tensor.to(torch.int16) - how.qmin).to(torch.uint8)
    nibbles = torch.nn.functional.pad(nibbles, (0, columns % 2))
    packed = context.stored(nibbles[:, ::2] | nibbles[:, 1::2] << 4)
    bytes_shape = (*shape[:-1], -(-columns // 2))
    rows = context.step("index", [packed, indices], "u8", bytes_shape, (0,))
    return context.step("unpack_nibbles", [rows], "u8", shape), how.qmin
