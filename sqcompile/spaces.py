"""Spaces: values between layers whose channels may be given any other orthogonal basis.

Linear layers and embeddings write into a space, linear layers read it, and whatever lies between treats all
directions alike: sums, copies, the norms of a transformer without their weights. Rotating what writes and what
reads leaves the function as it is. The residual stream of a model is such a space, and so are the values
of attention, head by head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sqcompile.layers import Layer, layer_of
from sqcompile.matching import tensor_users
from sqcompile.operators.table import argument
from sqcompile.program import Program, value_of
from sqcompile.text import operator_name

aten = torch.ops.aten

_ROTATED_TYPES = (torch.float32, torch.float64)
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)
# Norms over the last axis: where they take what scales and what shifts their result.
_NORMS: dict[Any, tuple[int, int | None]] = {
    aten.rms_norm.default: (2, None),
    aten.layer_norm.default: (2, 3),
}
# The same elements in the same order: blocks of channels stay together as long as they fit the last axis.
_VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
_COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)
# Operators that move along axes other than the last one, if their argument says so: the position of that argument.
_MOVES: dict[Any, int] = {
    aten.slice.Tensor: 1,
    aten.select.int: 1,
    aten.index_select.default: 1,
    aten.unsqueeze.default: 1,
    aten.squeeze.dim: 1,
    aten.repeat_interleave.self_int: 2,
}
_MEANS = (aten.mean.dim, aten.sum.dim_IntList)
_DEVIATIONS = (aten.var.correction, aten.std.correction, aten.var.dim, aten.std.dim)


@dataclass(frozen=True)
class NormScale:
    """The weight of a norm, and what reads the values that it scales.

    Attributes:
        node: The operator that scales.
        weight: The stored weight, [K].
        bias: What is stored to be added, [K], or None.
        values: The values that are scaled, `node` first.
        layers: Linear layers that read them.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    values: tuple[fx.Node, ...]
    layers: tuple[Layer, ...]


@dataclass
class Space:
    """Values that rotate together.

    Attributes:
        start: The value that it was found from.
        width: Channels that rotate together; a last axis of several times as many holds blocks (heads).
        values: All its values.
        tensors: Stored tensors to rotate, by name, and the axes along which.
        scales: Weights of norms that scale or shift: to be folded into the layers behind them first.
        keeps_mean: Whether something subtracts or adds along (1, …, 1), so that rotations have to keep that direction.
        obstacle: A node at which it cannot be rotated, and why, or None.
    """

    start: fx.Node
    width: int
    values: dict[fx.Node, None] = field(default_factory=dict)
    tensors: dict[str, set[int]] = field(default_factory=dict)
    scales: list[NormScale] = field(default_factory=list)
    keeps_mean: bool = False
    obstacle: tuple[fx.Node, str] | None = None


def residual_spaces(program: Program) -> list[Space]:
    """Return the residual streams: the spaces around embeddings, and around sums that a norm reads."""
    spaces: list[Space] = []
    for node in program.compute_nodes():
        starts = _is_embedding(program, node) or (
            node.target in _SUMS and any(_is_norm(user, node) for user in node.users)
        )
        if starts and not any(node in space.values for space in spaces):
            spaces.append(_Walk(program, node, int(value_of(node).shape[-1])).space)
    return spaces


def value_spaces(program: Program) -> list[Space]:
    """Return the spaces of attention's values, head by head."""
    spaces: list[Space] = []
    for node in program.compute_nodes():
        value = _attended(node)
        if value is not None and not any(value in space.values for space in spaces):
            spaces.append(_Walk(program, value, int(value_of(value).shape[-1])).space)
    return spaces


def _attended(node: fx.Node) -> fx.Node | None:
    """Return the values that attention weighs, or None if a node is no attention."""
    if node.target is aten.scaled_dot_product_attention.default:
        value = argument(node, 2)
    elif node.target in (aten.matmul.default, aten.bmm.default):
        weights = argument(node, 0)
        while isinstance(weights, fx.Node) and weights.target in (*_VIEWS, *_COPIES, aten.expand.default):
            weights = argument(weights, 0)
        if not isinstance(weights, fx.Node) or weights.target is not aten.softmax.int:
            return None
        value = argument(node, 1)
    else:
        return None
    return value if isinstance(value, fx.Node) else None


class _Walk:
    """Follows a value to all that has to rotate with it."""

    def __init__(self, program: Program, start: fx.Node, width: int) -> None:
        self._program = program
        self.space = Space(start, width)
        # What each operator reads or writes of a stored tensor: name -> operator -> axes.
        self._uses: dict[str, dict[fx.Node, set[int]]] = {}
        self._scaling: dict[fx.Node, None] = {}
        if width < 2:
            self._refuse(start, "it has one channel")
        self._pending = [start]
        while self._pending:
            node = self._pending.pop()
            if node not in self.space.values:
                self.space.values[node] = None
                self._visit(node)
        for node in self._scaling:
            self._norm_scale(node)
        self._check_uses()

    def _refuse(self, node: fx.Node, reason: str) -> None:
        if self.space.obstacle is None:
            self.space.obstacle = (node, reason)

    def _visit(self, node: fx.Node) -> None:
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or not self._fits(node):
            self._refuse(node, f"{operator_name(node)} cuts its channels apart")
            return
        if value.dtype not in _ROTATED_TYPES:
            self._refuse(node, f"its type is {value.dtype}")
            return
        self._made(node)
        for user in node.users:
            self._used(node, user)

    def _fits(self, node: fx.Node) -> bool:
        shape = value_of(node).shape
        return bool(shape) and isinstance(shape[-1], int) and shape[-1] % self.space.width == 0

    # --- what makes a value -------------------------------------------------------------------------

    def _made(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            self._stored(node, -1, node)
            return
        layer = layer_of(self._program, node)
        if layer is not None and layer.kind == "embedding":
            self._weight(layer, 1)
            return
        if layer is not None and layer.kind == "linear":
            self._weight(layer, 0)
            if layer.bias is not None:
                self._stored(layer.bias, 0, node)
            return
        carried = None if node.op != "call_function" else self._carried(node)
        if carried is None:
            made = "an input of the model" if node.op == "placeholder" else f"made by {operator_name(node)}"
            self._refuse(node, f"%{node.name} is {made}")
            return
        self._pending.extend(carried)

    def _used(self, node: fx.Node, user: fx.Node) -> None:
        if user.op == "output":
            self._refuse(node, f"%{node.name} is an output of the model")
            return
        layer = layer_of(self._program, user)
        if layer is not None and layer.kind == "linear" and layer.data is node:
            self._weight(layer, 1)
            return
        if self._is_invariant(node, user):
            return
        carried = self._carried(user) if user.op == "call_function" else None
        if carried is None or node not in carried or _times_used(user, node) != carried.count(node):
            self._refuse(user, f"%{node.name} goes to {operator_name(user)}")
            return
        self._pending.append(user)

    def _weight(self, layer: Layer, axis: int) -> None:
        if layer.weight_value is not layer.weight:
            self._refuse(layer.node, f"the weight of '{layer.name}' is masked")
        elif layer.weight_name in self._program.sparsity:
            self._refuse(layer.node, f"the weight of '{layer.name}' has zeros that are promised")
        elif layer.kind == "linear" and layer.operator.out_axis != 0:
            self._refuse(
                layer.node,
                f"the weight of '{layer.name}' is not a matrix [O, K]; canonicalize-layers makes it one",
            )
        else:
            self._stored(layer.weight, axis, layer.node)

    def _stored(self, stored: fx.Node, axis: int, user: fx.Node) -> None:
        if stored.op != "get_attr" or not self._program.has_tensor(str(stored.target)):
            self._refuse(user, f"%{stored.name} is computed, not stored")
            return
        tensor = self._program.tensor(stored)
        if tensor.dtype not in _ROTATED_TYPES:
            self._refuse(user, f"@{stored.target} is {tensor.dtype}")
        elif tensor.dim() < 1 or tensor.shape[axis] % self.space.width:
            self._refuse(user, f"@{stored.target} has no channels of its own")
        elif axis < 0:
            for reader in stored.users:
                self._uses.setdefault(str(stored.target), {}).setdefault(reader, set()).add(tensor.dim() - 1)
        else:
            self._uses.setdefault(str(stored.target), {}).setdefault(user, set()).add(axis)

    # --- what lies between --------------------------------------------------------------------------

    def _carried(self, node: fx.Node) -> list[fx.Node] | None:
        """Return the arguments that rotate with a node's value, or None if it does more than to carry them."""
        target = node.target
        first = argument(node, 0)
        if not isinstance(value_of(node), torch.Tensor) or not self._fits(node):
            return None
        if target in _SUMS:
            return self._summands(node)
        if target in _PRODUCTS:
            return self._scaled(node)
        if target in _NORMS:
            return self._normed(node)
        if target is aten.cat.default:
            parts = argument(node, 0)
            assert isinstance(parts, (list, tuple))
            return list(parts) if not _is_last(node, argument(node, 1)) else None
        if target is aten.scaled_dot_product_attention.default:
            value = argument(node, 2)
            return [value] if isinstance(value, fx.Node) else None
        if target in (aten.matmul.default, aten.bmm.default):
            value = argument(node, 1)
            return [value] if isinstance(value, fx.Node) and value.op != "get_attr" else None
        if not isinstance(first, fx.Node) or not isinstance(value_of(first), torch.Tensor):
            return None
        if self._moves(node, first):
            return [first]
        return None

    def _moves(self, node: fx.Node, first: fx.Node) -> bool:
        """Whether an operator only moves blocks of channels, or leaves the last axis alone."""
        target = node.target
        if not self._fits(first):
            return False
        if target in _VIEWS or target in _COPIES or target is aten.neg.default:
            return True
        if target in _MOVES:
            axis = argument(node, _MOVES[target])
            larger = node if target is aten.unsqueeze.default else first
            return isinstance(axis, int) and not _is_last(larger, axis)
        rank = value_of(first).dim()
        if target is aten.transpose.int:
            return not any(_is_last(first, argument(node, place)) for place in (1, 2))
        if target is aten.permute.default:
            order = argument(node, 1)
            return isinstance(order, (list, tuple)) and order[-1] % rank == rank - 1
        if target is aten.expand.default:
            return bool(value_of(first).shape[-1] == value_of(node).shape[-1])
        if target in _MEANS:
            axes = argument(node, 1)
            return isinstance(axes, (list, tuple)) and not any(_is_last(first, axis) for axis in axes)
        return False

    def _summands(self, node: fx.Node) -> list[fx.Node] | None:
        carried = []
        for item in (argument(node, 0), argument(node, 1)):
            if not isinstance(item, fx.Node) or _is_narrow(item):
                self.space.keeps_mean = True  # adds the same to all channels
            else:
                carried.append(item)
        return carried

    def _scaled(self, node: fx.Node) -> list[fx.Node] | None:
        first, second = argument(node, 0), argument(node, 1)
        for one, other in ((first, second), (second, first)):
            if not isinstance(one, fx.Node) or _is_narrow(one):
                continue
            if not isinstance(other, fx.Node) or _is_narrow(other):
                return [one] if one is first or node.target is aten.mul.Tensor else None
            if node.target is aten.mul.Tensor and _is_vector(self._program, other, value_of(node).shape[-1]):
                self._scaling[node] = None
                return [one]
        return None

    def _normed(self, node: fx.Node) -> list[fx.Node] | None:
        first, shape = argument(node, 0), argument(node, 1)
        weight, bias = _NORMS[node.target]
        if not isinstance(first, fx.Node) or not isinstance(shape, (list, tuple)) or len(shape) != 1:
            return None
        if bias is not None:
            self.space.keeps_mean = True
        if isinstance(argument(node, weight), fx.Node):
            self._scaling[node] = None
        elif bias is not None and isinstance(argument(node, bias), fx.Node):
            return None
        return [first]

    def _is_invariant(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether what an operator makes of a value is the same for every basis."""
        axes = argument(user, 1) if user.op == "call_function" else None
        if user.target in _MEANS and _is_over_last(node, axes):
            self.space.keeps_mean = True
            return True
        if user.target in _DEVIATIONS and _is_over_last(node, axes):
            self.space.keeps_mean = True
            return True
        return _is_square(user, node) and all(
            reader.target in _MEANS and _is_over_last(user, argument(reader, 1)) for reader in user.users
        )

    # --- what has to hold in the end ----------------------------------------------------------------

    def _norm_scale(self, node: fx.Node) -> None:
        """Find out what reads the values that a norm's weight scales."""
        weight, bias = _scale_tensors(self._program, node)
        if weight is None:
            self._refuse(node, f"the weight of {operator_name(node)} %{node.name} is computed, not stored")
            return
        if _is_one(self._program, weight, bias):
            return
        width = value_of(node).shape[-1]
        values: dict[fx.Node, None] = {node: None}
        pending, layers = [node], []
        for value in pending:
            for user in value.users:
                layer = layer_of(self._program, user)
                if layer is not None and layer.kind == "linear" and layer.data is value:
                    layers.append(layer)
                elif (
                    user.op == "call_function"
                    and user in self.space.values
                    and argument(user, 0) is value
                    and self._moves(user, value)
                    and value_of(user).shape[-1] == width
                ):
                    if user not in values:
                        values[user] = None
                        pending.append(user)
                else:
                    self._refuse(user, f"values that a norm has scaled go to {operator_name(user)}")
                    return
        for stored in (weight, *([bias] if bias is not None else [])):
            name = str(stored.target)
            if tensor_users(self._program, name) != [node] or name in self._program.shared:
                self._refuse(node, f"@{name} is used elsewhere too")
        self.space.scales.append(NormScale(node, weight, bias, tuple(values), tuple(layers)))

    def _check_uses(self) -> None:
        """Check that every use of a tensor is one in this space, along the same axes."""
        for name, uses in self._uses.items():
            axes = set().union(*uses.values())
            self.space.tensors[name] = axes
            for user in tensor_users(self._program, name):
                if uses.get(user) != axes:
                    self._refuse(user, f"@{name} is used elsewhere too")
            if name in self._program.shared:
                self._refuse(next(iter(uses)), f"@{name} is used in another part of the model")


def _is_one(program: Program, weight: fx.Node, bias: fx.Node | None) -> bool:
    shifts = bias is not None and bool(program.tensor(bias).detach().any())
    return not shifts and bool((program.tensor(weight).detach() == 1).all())


def _scale_tensors(program: Program, node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    if node.target in _NORMS:
        found = [None if place is None else argument(node, place) for place in _NORMS[node.target]]
    else:
        pair = (argument(node, 0), argument(node, 1))
        stored = [item for item in pair if isinstance(item, fx.Node) and item.op == "get_attr"]
        found = [stored[0], None]
    nodes = [item for item in found if isinstance(item, fx.Node)]
    if not nodes or any(item.op != "get_attr" or not program.has_tensor(str(item.target)) for item in nodes):
        return None, None
    return nodes[0], nodes[1] if len(nodes) > 1 else None


def _is_embedding(program: Program, node: fx.Node) -> bool:
    layer = layer_of(program, node)
    return layer is not None and layer.kind == "embedding"


def _is_norm(node: fx.Node, data: fx.Node) -> bool:
    """Whether an operator begins a norm over a value's last axis."""
    if node.target in _NORMS:
        return argument(node, 0) is data
    return _is_square(node, data) and any(
        user.target in _MEANS and _is_over_last(node, argument(user, 1)) for user in node.users
    )


def _is_square(node: fx.Node, data: fx.Node) -> bool:
    if node.target is aten.pow.Tensor_Scalar:
        return argument(node, 0) is data and argument(node, 1) == 2
    return node.target is aten.mul.Tensor and argument(node, 0) is data and argument(node, 1) is data


def _is_vector(program: Program, node: fx.Node, channels: Any) -> bool:
    """Whether a stored tensor holds one number a channel."""
    if node.op != "get_attr" or not program.has_tensor(str(node.target)):
        return False
    return tuple(program.tensor(node).shape) == (channels,)


def _is_narrow(item: fx.Node) -> bool:
    """Whether a value has the same number for all channels: a last axis of one, or none."""
    value = value_of(item)
    return not isinstance(value, torch.Tensor) or value.dim() == 0 or bool(value.shape[-1] == 1)


def _is_last(node: fx.Node, axis: object) -> bool:
    rank = value_of(node).dim()
    return isinstance(axis, int) and axis % max(1, rank) == rank - 1


def _is_over_last(node: fx.Node, axes: object) -> bool:
    return isinstance(axes, (list, tuple)) and len(axes) == 1 and _is_last(node, axes[0])


def _times_used(user: fx.Node, node: fx.Node) -> int:
    """How often a value is among the arguments of an operator."""
    found = 0

    def count(item: Any) -> Any:
        nonlocal found
        found += item is node
        return item

    fx.map_arg((user.args, user.kwargs), count)
    return found
