"""The operator table: everything that passes and backends need to know about an operator.

One home for operator knowledge. An entry says which argument is the weight and along which axis its
channels lie, which arguments are data, and how the operator behaves under quantization. Operators
without an entry are left alone: they stay float, and nothing moves through them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import fx

aten = torch.ops.aten


class Scales(Enum):
    """What an operator does to the scale of a quantized value.

    - `OWN`: its output needs a scale of its own.
    - `PRESERVES`: it only moves or drops elements, so codes pass through unchanged.
    - `SHARES`: all its data inputs and its output need one common scale.
    - `FIXED`: its output has a known range, whatever the input.
    """

    OWN = "own"
    PRESERVES = "preserves"
    SHARES = "shares"
    FIXED = "fixed"


@dataclass(frozen=True)
class Operator:
    """What is known about an operator.

    Attributes:
        kind: Name by which users select layers: `linear`, `conv2d`, `embedding`, `add`, …
        data: Positions of the data arguments (a position may hold a list of values, as in `cat`).
        weight: Position of the weight argument, or None.
        bias: Position of the bias argument, or None.
        out_axis: Axis of the weight that holds output channels.
        in_axis: Axis of the weight that holds input channels (per group).
        groups: Position of the groups argument, or None.
        scales: What it does to scales.
        integer: Whether integer kernels exist for it, so that static quantization observes its
            inputs and its output.
        output_range: The range of the output where `scales` is `FIXED`.
        activation: Whether it is an activation function that fuses into the operator before it.
    """

    kind: str
    data: tuple[int, ...] = (0,)
    weight: int | None = None
    bias: int | None = None
    out_axis: int = 0
    in_axis: int = 1
    groups: int | None = None
    scales: Scales = Scales.OWN
    integer: bool = False
    output_range: tuple[float, float] | None = None
    activation: bool = False


TABLE: dict[torch._ops.OpOverload, Operator] = {}


def _add(entry: Operator, *operators: torch._ops.OpOverload) -> None:
    for operator in operators:
        TABLE[operator] = entry


def _convolution(kind: str, groups: int) -> Operator:
    return Operator(kind, weight=1, bias=2, groups=groups, integer=True)


# Layers: operators with a weight.
_add(_convolution("conv1d", 6), aten.conv1d.default)
_add(_convolution("conv2d", 6), aten.conv2d.default)
_add(_convolution("conv3d", 6), aten.conv3d.default)
for _kind, _operator in (
    ("conv_transpose1d", aten.conv_transpose1d.default),
    ("conv_transpose2d", aten.conv_transpose2d.input),
    ("conv_transpose3d", aten.conv_transpose3d.input),
):
    # Weights of transposed convolutions are [in, out / groups, …].
    _add(
        Operator(_kind, weight=1, bias=2, groups=6, out_axis=1, in_axis=0, integer=True),
        _operator,
    )
_add(Operator("linear", weight=1, bias=2, integer=True), aten.linear.default)
_add(
    Operator("linear", data=(1,), weight=2, bias=0, out_axis=1, in_axis=0, integer=True),
    aten.addmm.default,  # x @ weight [in, out] + bias, as GPT-2 writes its layers
)
_add(Operator("embedding", data=(), weight=0, out_axis=0, in_axis=1), aten.embedding.default)
_add(
    Operator("matmul", data=(0, 1), weight=1, out_axis=-1, in_axis=-2, integer=True),
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
)

# Arithmetic with integer kernels.
_add(Operator("add", data=(0, 1), integer=True), aten.add.Tensor, aten.add_.Tensor)
_add(Operator("mul", data=(0, 1), integer=True), aten.mul.Tensor, aten.mul_.Tensor)
_add(Operator("sub", data=(0, 1)), aten.sub.Tensor)
_add(Operator("div", data=(0, 1)), aten.div.Tensor)
_add(Operator("mean", integer=True), aten.mean.dim, aten.mean.default)
_add(
    Operator("avg_pool", integer=True),
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
)

# Activation functions.
_add(
    Operator("relu", integer=True, activation=True),
    aten.relu.default,
    aten.relu_.default,
)
_add(
    Operator("clamp", integer=True, activation=True),
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.relu6.default,
    aten.clamp.default,
    aten.clamp_min.default,
)
_add(
    Operator("sigmoid", integer=True, scales=Scales.FIXED, output_range=(0.0, 1.0)),
    aten.sigmoid.default,
)
_add(Operator("tanh", scales=Scales.FIXED, output_range=(-1.0, 1.0)), aten.tanh.default)
_add(Operator("softmax", scales=Scales.FIXED, output_range=(0.0, 1.0)), aten.softmax.int)
_add(
    Operator("activation"),
    aten.silu.default,
    aten.silu_.default,
    aten.gelu.default,
    aten.hardswish.default,
    aten.hardswish_.default,
    aten.hardsigmoid.default,
    aten.leaky_relu.default,
    aten.elu.default,
)

# Operators that pass codes through.
_add(
    Operator("move", scales=Scales.PRESERVES),
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.pixel_shuffle.default,
    aten.channel_shuffle.default,
    aten.dropout.default,
    aten.feature_dropout.default,
)
_add(
    Operator("max_pool", scales=Scales.PRESERVES),
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.adaptive_max_pool2d.default,
)
# Padding moves codes as long as the padded value has a code of its own: zero always has, see `preserves_scale`.
_add(Operator("pad", scales=Scales.PRESERVES), aten.pad.default, aten.constant_pad_nd.default)
_add(
    Operator("resize", scales=Scales.PRESERVES),
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest2d.default,
)
_add(
    Operator("chunk", scales=Scales.PRESERVES),
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
)
_add(Operator("cat", scales=Scales.SHARES, integer=True), aten.cat.default)


def operator_of(node: fx.Node) -> Operator | None:
    """Return the entry of a node's operator, or None if the table has none."""
    if node.op != "call_function":
        return None
    if node.target is aten.addmm.default and (argument(node, 3), argument(node, 4)) != (1, 1):
        return None  # beta · bias + alpha · (x @ weight): no layer, but a combination of two values
    return TABLE.get(node.target)  # type: ignore[call-overload,no-any-return]


def preserves_scale(node: fx.Node) -> bool:
    """Whether a call only moves or drops values (or adds zeros), so that codes pass through it unchanged."""
    entry = operator_of(node)
    if entry is None or entry.scales is not Scales.PRESERVES:
        return False
    return entry.kind != "pad" or pad_value(node) == 0


def pad_value(node: fx.Node) -> object:
    """Return the constant that a padding operator writes; 0 for modes that repeat values."""
    if node.target is aten.constant_pad_nd.default:
        return argument(node, 2, 0)
    constant = argument(node, 2, "constant") == "constant"
    return (argument(node, 3) or 0) if constant else 0


def data_arguments(node: fx.Node) -> list[fx.Node]:
    """Return the nodes in the data positions of a call, lists flattened."""
    entry = operator_of(node)
    found: list[fx.Node] = []
    for position in entry.data if entry else ():
        value = argument(node, position)
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, fx.Node):
                found.append(item)
    return found


def argument(node: fx.Node, position: int, default: object = None) -> object:
    """Return an argument by its position in the operator's schema, given by position or by name."""
    if position < len(node.args):
        return node.args[position]
    if isinstance(node.target, torch._ops.OpOverload):
        parameters = node.target._schema.arguments
        if position < len(parameters):
            parameter = parameters[position]
            if parameter.name in node.kwargs:
                return node.kwargs[parameter.name]
            if parameter.has_default_value():
                return parameter.default_value
    return default
