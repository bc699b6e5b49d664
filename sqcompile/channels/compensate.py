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
from sqcompile.evaluate import run_watched
from sqcompile.layers import Layer, layers_of
from sqcompile.matching import tensor_users
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter

Batches = Callable[[], Iterable[Sequence[Any]]]

_RIDGE = 1e-3  # of the mean square of the inputs: rounding must not decide where inputs are alike


class _Seen(Exception):
    """The watched value has been made; the rest of the run is not wanted."""


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
    for item in lost:
        layer = item.layer
        assert layer.data is not None
        after = nodes[layer.node.name]
        data = after.args[layer.operator.data[0]]
        assert isinstance(data, fx.Node)
        has_bias = _own_bias(program, nodes.get(layer.bias.name) if layer.bias is not None else None)
        program.recompile()
        moments = _moments(dense, layer, program, data, batches, constant=has_bias)
        if moments is None:
            continue
        mixing = _mixing(*moments, item.kept)
        _refit(edit, dense, item, mixing, nodes, has_bias)


def _own_bias(program: Program, bias: fx.Node | None) -> bool:
    return bias is not None and bias.op == "get_attr" and len(tensor_users(program, str(bias.target))) == 1


def _moments(
    dense: Program, layer: Layer, program: Program, data: fx.Node, batches: Batches, *, constant: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return E[x x'ᵀ] and E[x' x'ᵀ], where x' ends in 1 if the layer has a bias."""
    assert layer.data is not None
    cross = square = None
    count = 0
    for batch in batches():
        before = _rows(dense, batch, layer.data, data_axis(layer))
        after = _rows(program, batch, data, data_axis(layer))
        if constant:
            after = torch.cat([after, torch.ones(1, after.shape[1], dtype=after.dtype)])
        product, own = before @ after.T, after @ after.T
        cross = product if cross is None else cross + product
        square = own if square is None else square + own
        count += after.shape[1]
    if cross is None or square is None or not count:
        return None
    return cross / count, square / count


def _rows(program: Program, batch: Sequence[Any], node: fx.Node, axis: int) -> torch.Tensor:
    """Return the values of a node in a run, one row a channel; the run ends there."""
    seen: list[torch.Tensor] = []

    def keep(_: fx.Node, value: torch.Tensor) -> None:
        moved = value.detach().movedim(axis, 0)
        seen.append(moved.reshape(moved.shape[0], -1).to(torch.float64))
        raise _Seen

    try:
        run_watched(program, batch, [node], keep)
    except _Seen:
        pass
    return seen[0]


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
