"""Least-squares compensation: what is left of a layer's inputs takes over from what went.

A layer read x and reads x' now. With the moments of both over calibration data, its weight W becomes
W' + W · E[(x - S x') x'ᵀ] · (E[x' x'ᵀ] + λ)⁻¹, where W' is what was left of W and S puts the entries of x'
back to their places: the ridge regression of the dense output, drawn to W'. Convolutions mix channels alike
at every place of the kernel. Layers are treated in graph order, each on what the layers before it make now,
so that it also takes back some of their error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from sqcompile.channels.groups import Group
from sqcompile.channels.importance import data_axis
from sqcompile.layers import Layer, layers_of
from sqcompile.matching import tensor_users
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter

Batches = Callable[[], Iterable[Sequence[Any]]]

_RIDGE = 1e-3  # of the mean square of the inputs: rounding must not decide where inputs are alike


class _Run:
    """A run of a program that stops where it is told to and goes on later, with the weights of then.

    Args:
        program: The program.
        inputs: Flat inputs.
    """

    def __init__(self, program: Program, inputs: Sequence[Any]) -> None:
        self._program = program
        self._values: dict[fx.Node, Any] = dict(zip(program.placeholders, inputs, strict=True))
        self._uses = {node: len(node.users) for node in program.graph.nodes}
        self._pending = program.compute_nodes()

    def until(self, node: fx.Node) -> Any:
        """Run up to a node and return its value; values that nothing needs any more are freed."""
        while node not in self._values:
            step = next(self._pending)
            args, kwargs = fx.node.map_arg((step.args, step.kwargs), self._value)
            with torch.no_grad():
                self._values[step] = step.target(*args, **kwargs)  # type: ignore[operator]
            for source in step.all_input_nodes:
                self._uses[source] -= 1
                if not self._uses[source]:
                    self._values.pop(source, None)
        return self._values[node]

    def _value(self, node: fx.Node) -> Any:
        return self._program.tensor(node) if node.op == "get_attr" else self._values[node]


@dataclass(frozen=True)
class Lost:
    """What a layer has lost of its inputs.

    Attributes:
        layer: The layer, in the dense program.
        kept: Which of its inputs are left, [I].
        rows: Which of its outputs are left, [O].
    """

    layer: Layer
    kept: NDArray[np.bool_]
    rows: NDArray[np.bool_]


def losses(
    dense: Program,
    groups: Sequence[Group],
    keep: Callable[[str, int], NDArray[np.bool_]],
    remark: Callable[[fx.Node, str], None],
) -> list[Lost]:
    """Return the layers that read one of the groups and can be compensated, in graph order.

    Args:
        dense: The program before the removal.
        groups: Groups that have lost units.
        keep: Says which positions of a stored tensor's dimension are left.
        remark: Told about each layer that cannot be compensated, and why.
    """
    reading = {member.tensor for group in groups for member in group.members if member.role == "reads"}
    found = []
    for layer in layers_of(dense):
        if layer.weight_name not in reading:
            continue
        rank = dense.tensor(layer.weight).dim()
        kept = keep(layer.weight_name, layer.operator.in_axis % rank)
        if layer.groups != 1:
            remark(layer.node, "is not compensated: its inputs are divided into groups")
        elif layer.weight_value is not layer.weight or len(tensor_users(dense, layer.weight_name)) > 1:
            remark(layer.node, "is not compensated: its weight is masked or shared")
        elif not kept.all():
            rows = keep(layer.weight_name, layer.operator.out_axis % rank)
            found.append(Lost(layer, kept, rows))
    return found


def compensate(edit: Rewriter, dense: Program, lost: Sequence[Lost], batches: Batches) -> None:
    """Refit the weights of layers that have lost inputs, in graph order.

    Args:
        edit: Edits the program after the removal.
        dense: The program before it.
        lost: What its layers have lost.
        batches: Yields calibration batches as flat inputs.
    """
    program = edit.program
    nodes = {node.name: node for node in program.graph.nodes}
    runs = [(_Run(dense, batch), _Run(program, batch)) for batch in batches()] if lost else []
    for item in lost:
        layer = item.layer
        assert layer.data is not None
        data = nodes[layer.node.name].args[layer.operator.data[0]]
        assert isinstance(data, fx.Node)
        has_bias = _own_bias(program, nodes.get(layer.bias.name) if layer.bias is not None else None)
        axis = data_axis(layer)
        values = ((_rows(old.until(layer.data), axis), _rows(new.until(data), axis)) for old, new in runs)
        mixing = _mixing(*_moments(values, constant=has_bias), item.kept)
        _refit(edit, dense, item, mixing, nodes, has_bias)


def _own_bias(program: Program, bias: fx.Node | None) -> bool:
    return bias is not None and bias.op == "get_attr" and len(tensor_users(program, str(bias.target))) == 1


def _moments(
    values: Iterable[tuple[torch.Tensor, torch.Tensor]], *, constant: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return E[x x'ᵀ] and E[x' x'ᵀ], where x' ends in 1 if the layer has a bias."""
    cross = square = torch.zeros(1, dtype=torch.float64)
    count = 0
    for before, after in values:
        if constant:
            after = torch.cat([after, torch.ones(1, after.shape[1], dtype=after.dtype)])
        cross = cross + before @ after.T
        square = square + after @ after.T
        count += after.shape[1]
    return cross / count, square / count


def _rows(value: torch.Tensor, axis: int) -> torch.Tensor:
    """Return a value with one row a channel."""
    moved = value.detach().movedim(axis, 0)
    return moved.reshape(moved.shape[0], -1).to(torch.float64)


def _mixing(cross: torch.Tensor, square: torch.Tensor, kept: NDArray[np.bool_]) -> torch.Tensor:
    """Return D [I, I' (+ 1)]: how much of each entry of x' stands for what x has more."""
    inputs = int(kept.sum())
    residual = cross.clone()
    residual[torch.from_numpy(np.flatnonzero(kept))] -= square[:inputs]
    ridge = torch.full((square.shape[0],), _RIDGE * float(square[:inputs, :inputs].diagonal().mean()) + 1e-12)
    ridge[inputs:] = 0  # the constant costs nothing
    mixing: torch.Tensor = torch.linalg.solve(square + torch.diag(ridge.to(square)), residual.T).T
    return mixing


def _refit(
    edit: Rewriter,
    dense: Program,
    item: Lost,
    mixing: torch.Tensor,
    nodes: dict[str, fx.Node],
    has_bias: bool,
) -> None:
    layer, inputs = item.layer, int(item.kept.sum())
    old = dense.tensor(layer.weight).detach().to(torch.float64)
    axis, out_axis = layer.operator.in_axis % old.dim(), layer.operator.out_axis % old.dim()
    old = old.index_select(out_axis, torch.from_numpy(np.flatnonzero(item.rows)))
    added = torch.tensordot(old, mixing, dims=([axis], [0])).movedim(-1, axis)
    stored = nodes[layer.weight.name]
    weight = edit.program.tensor(stored)
    change = added.narrow(axis, 0, inputs)
    edit.replace_tensor(stored, (weight.detach() + change.to(weight.dtype)).contiguous())
    if has_bias:
        assert layer.bias is not None
        shift = added.select(axis, inputs)
        rest = [
            index for index in range(shift.dim()) if index != (out_axis if out_axis < axis else out_axis - 1)
        ]
        shift = shift.sum(rest) if rest else shift
        bias = nodes[layer.bias.name]
        value = edit.program.tensor(bias)
        edit.replace_tensor(bias, value.detach() + shift.to(value.dtype))
