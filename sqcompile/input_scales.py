"""Scaling the inputs of layers: by a factor a channel that whatever makes them absorbs, and the layers undo.

`linear(x, W)` is `linear(x / s, W · s)`: with the same result, other numbers are to be rounded. What makes x has
to be linear in a stored tensor, channel by channel: the weight of a norm, or a layer whose output is only
multiplied before it gets there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqcompile.layers import Layer, layer_of, layers_of
from sqcompile.matching import tensor_users
from sqcompile.operators.table import argument
from sqcompile.program import Program, value_of
from sqcompile.rewrite import Rewriter
from sqcompile.text import operator_name

aten = torch.ops.aten

_KINDS = ("linear", "matmul")
# Operators of a norm, and where they take what scales and shifts their result.
_NORMS = {aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2,)}
_MULTIPLIES = (aten.mul.Tensor,)


@dataclass(frozen=True)
class InputGroup:
    """Layers that read one value, and the stored tensors that scale it.

    Attributes:
        data: The value that they read, [..., K].
        layers: The layers; each has a weight [O, K].
        tensors: Nodes of the stored tensors whose first axis are the channels of the value: divided by s, they
            divide it.
        through: Values between these tensors and `data`, and `data` itself, all of which are scaled with it.
    """

    data: fx.Node
    layers: tuple[Layer, ...]
    tensors: tuple[fx.Node, ...]
    through: tuple[fx.Node, ...]

    @property
    def channels(self) -> int:
        """Number of channels, K."""
        return int(value_of(self.data).shape[-1])


def input_groups(
    program: Program, selected: Iterable[Layer], remark: Callable[[fx.Node, str], None]
) -> list[InputGroup]:
    """Return the selected layers whose inputs can be scaled, by the value that they read, in graph order.

    Args:
        program: The program.
        selected: Layers to choose from; those that share an input stay together, all or none.
        remark: Told about the first layer of those that cannot, and why.
    """
    chosen = {layer.node for layer in selected if layer.kind in _KINDS}
    readers: dict[fx.Node, list[Layer]] = {}
    for layer in layers_of(program):
        if layer.data is not None and layer.kind in _KINDS:
            readers.setdefault(layer.data, []).append(layer)
    groups = []
    for data, layers in readers.items():
        if not any(layer.node in chosen for layer in layers):
            continue
        source = _source(program, data)
        reason = source if isinstance(source, str) else _obstacle(program, data, layers, chosen)
        if reason is not None:
            remark(layers[0].node, f"its input is not scaled: {reason}")
            continue
        assert not isinstance(source, str)
        groups.append(InputGroup(data, tuple(layers), *source))
    return groups


def scale_inputs(edit: Rewriter, group: InputGroup, scale: Tensor) -> None:
    """Divide what a group of layers reads by s, and multiply their weights with it.

    Args:
        edit: The rewriter.
        group: The group.
        scale: s, positive, [K].
    """
    program = edit.program
    factor = scale.detach().double()
    for node in group.tensors:
        old = program.tensor(node)
        shape = [-1, *[1] * (old.dim() - 1)]
        edit.replace_tensor(node, (old.detach().double() / factor.reshape(shape)).to(old.dtype))
    for node in group.through:
        edit.rescale(node, 1 / factor)
    for layer in group.layers:
        old = program.tensor(layer.weight)
        edit.replace_tensor(layer.weight, (old.detach().double() * factor).to(old.dtype))


_Source = tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]


def _source(program: Program, data: fx.Node) -> _Source | str:
    """Return the stored tensors that scale a value and the values in between, or why there are none."""
    channels = value_of(data).shape[-1]
    if data.target in _NORMS:
        found = [argument(data, position) for position in _NORMS[data.target]]
        tensors = tuple(node for node in found if isinstance(node, fx.Node))
        if not tensors or tensors[0] is not found[0]:
            return "the norm before it has no weight"
        return _checked(program, tensors, (data,), channels)
    if data.target not in _MULTIPLIES:
        return f"it is made by {operator_name(data)}"
    operands = [argument(data, position) for position in (0, 1)]
    for node in operands:
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return _checked(program, (node,), (data,), channels)
    for node in operands:
        layer = layer_of(program, node) if isinstance(node, fx.Node) else None
        if layer is None or layer.kind != "linear" or len(layer.node.users) != 1:
            continue
        tensors = (layer.weight, *([layer.bias] if layer.bias is not None else []))
        if layer.weight_value is layer.weight:
            return _checked(program, tensors, (layer.node, data), channels)
    return "neither factor of it is a weight or comes from a layer"


def _checked(
    program: Program, tensors: tuple[fx.Node, ...], through: tuple[fx.Node, ...], channels: object
) -> _Source | str:
    for node in tensors:
        if node.op != "get_attr" or len(tensor_users(program, str(node.target))) != 1:
            return f"%{node.name} is computed, or used elsewhere too"
        if str(node.target) in program.shared:
            return f"%{node.name} is used in another part of the model"
        tensor = program.tensor(node)
        if tensor.dim() < 1 or tensor.shape[0] != channels or not tensor.is_floating_point():
            return f"%{node.name} does not hold a number a channel"
    return tensors, through


def _obstacle(program: Program, data: fx.Node, layers: list[Layer], chosen: set[fx.Node]) -> str | None:
    nodes = {layer.node for layer in layers}
    others = [user for user in data.users if user not in nodes]
    if others:
        return f"it goes to {operator_name(others[0])} too"
    for layer in layers:
        if layer.node not in chosen:
            return f"'{layer.name}' reads it too, and is not selected"
        if layer.operator.out_axis != 0 or program.tensor(layer.weight).dim() != 2:
            return "its weight is not a matrix [O, K]; canonicalize-layers makes it one"
        if layer.weight_value is not layer.weight or len(tensor_users(program, layer.weight_name)) != 1:
            return "its weight is masked, or used elsewhere too"
        if layer.weight_name in program.shared or not program.tensor(layer.weight).is_floating_point():
            return "its weight is used elsewhere too"
    return None
