"""Least-squares compensation: what is left of a layer's inputs takes over from what went.

A layer read z and reads x now. Its weight becomes the ridge regression of the dense output on x, drawn to what
was left of it (`second_order.target`); its bias takes the difference of the means. A convolution reads all that
lies under its kernel, so that a channel's neighbours stand in for it as well; transposed ones mix channels alike at
every place of the kernel. Layers are treated in graph order, each on what the layers before it make now, so that
it also takes back some of their error.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from sqcompile.channels.groups import Group
from sqcompile.channels.importance import data_axis
from sqcompile.layers import Layer, layers_of
from sqcompile.matching import tensor_users
from sqcompile.pipeline.context import PassContext
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter
from sqcompile.second_order import Hessian, target
from sqcompile.second_order.patches import enough_rows, geometry, has_patches, patches_of
from sqcompile.sparsity import as_matrix, from_matrix
from sqcompile.stepwise import Read, Stepwise

_DAMPING = 1e-3  # of the mean square of the inputs: rounding must not decide where inputs are alike


@dataclass(frozen=True)
class Lost:
    """What a layer has lost of its inputs; nothing, if they have only changed.

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
    *,
    behind: bool = False,
) -> list[Lost]:
    """Return the layers that read one of the groups and can be compensated, in graph order.

    Args:
        dense: The program before the removal.
        groups: Groups that have lost units.
        keep: Says which positions of a stored tensor's dimension are left.
        remark: Told about each layer that cannot be compensated, and why.
        behind: Return also the layers that read what those make, however far behind.
    """
    reading = {member.tensor for group in groups for member in group.members if member.role == "reads"}
    found = []
    changed = _behind(dense, reading) if behind else set()
    for layer in layers_of(dense):
        losing = layer.weight_name in reading
        if not losing and layer.data not in changed:
            continue
        rank = dense.tensor(layer.weight).dim()
        kept = keep(layer.weight_name, layer.operator.in_axis % rank)
        single = layer.weight_value is layer.weight and len(tensor_users(dense, layer.weight_name)) == 1
        if not losing and (layer.groups != 1 or not single):
            continue
        if layer.groups != 1:
            remark(layer.node, "is not compensated: its inputs are divided into groups")
        elif not single:
            remark(layer.node, "is not compensated: its weight is masked or shared")
        elif not kept.all() or layer.data in changed:
            rows = keep(layer.weight_name, layer.operator.out_axis % rank)
            found.append(Lost(layer, kept, rows))
    return found


def _behind(dense: Program, reading: set[str]) -> set[fx.Node | None]:
    """Return all values that depend on a layer with one of some weights."""
    changed: set[fx.Node | None] = {layer.node for layer in layers_of(dense) if layer.weight_name in reading}
    for node in dense.graph.nodes:
        if any(source in changed for source in node.all_input_nodes):
            changed.add(node)
    return changed


def compensate(
    edit: Rewriter, dense: Program, lost: Sequence[Lost], context: PassContext, *, max_bytes: int
) -> None:
    """Refit the weights of layers that have lost inputs, in graph order.

    Args:
        edit: Edits the program after the removal.
        dense: The program before it.
        lost: What its layers have lost.
        context: Holds the calibration data.
        max_bytes: Memory for the values of all batches at one place of the graph, in bytes.

    Raises:
        CalibrationError: If there is no data, or the inputs of a layer are not finite; the text names it.
    """
    if not lost:
        return
    program = edit.program
    nodes = {node.name: node for node in program.graph.nodes}
    before, after = Stepwise(dense), Stepwise(program)
    # Both programs hold the values of every batch, of which the dense one's are the larger.
    batches = before.batches(context, max_bytes // 2, "compensating: reading")
    walk_before, walk_after = before.walk(batches), after.walk(batches)
    known: tuple[Hashable, Hessian | None] = (None, None)
    for item in context.progress.track(lost, "compensating"):
        layer = item.layer
        assert layer.data is not None
        wanted = _until(walk_before, layer.node)
        read = _until(walk_after, nodes[layer.node.name])
        kernel = tuple(dense.tensor(layer.weight).shape[2:])
        same = (layer.data, geometry(layer, kernel) if has_patches(layer) else None)
        if known[0] != same:  # queries, keys and values read the same
            data = nodes[layer.node.name].args[layer.operator.data[0]]
            assert isinstance(data, fx.Node)
            known = (same, _moments(layer, kernel, wanted(layer.data), read(data)))
        assert known[1] is not None
        _refit(edit, dense, item, known[1], nodes)


def _until(walk: Iterator[tuple[fx.Node, Read]], node: fx.Node) -> Read:
    """Let a program run up to an operator."""
    return next(read for step, read in walk if step is node)


def _moments(
    layer: Layer, kernel: Sequence[int], wanted: Sequence[Tensor], values: Sequence[Tensor]
) -> Hessian:
    """Return the moments of a layer's inputs, both with a last entry of 1, so that they hold the means as well."""
    hessian: Hessian | None = None
    for before, after in zip(wanted, values, strict=True):
        most = enough_rows(after.shape[data_axis(layer)], kernel, len(values))
        x, dense = (_with_one(_inputs(layer, kernel, value, most)) for value in (after, before))
        hessian = hessian or Hessian(x.shape[-1], x.device, f"layer '{layer.name}'")
        hessian.add(x, dense)
    assert hessian is not None
    return hessian


def _inputs(layer: Layer, kernel: Sequence[int], value: Tensor, most: int) -> Tensor:
    """Return what the rows of the weight are multiplied with, [rows, K]."""
    if has_patches(layer):
        return patches_of(layer, value.detach(), kernel, most)
    return value.detach().movedim(data_axis(layer), -1).flatten(0, -2)


def _with_one(rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 1), value=1.0)


def _without_one(hessian: Hessian, *, centred: bool) -> tuple[Hessian, Tensor, Tensor]:
    """Return the moments of the inputs themselves, about their means where those can go into a bias; and the means."""
    assert hessian.cross is not None
    mean, dense_mean = hessian.matrix[:-1, -1], hessian.cross[:-1, -1]
    result = Hessian(len(mean), mean.device)
    result.matrix, result.cross = hessian.matrix[:-1, :-1].clone(), hessian.cross[:-1, :-1].clone()
    result.count = hessian.count
    if centred:
        result.matrix.addr_(mean, mean, alpha=-1)
        result.cross.addr_(dense_mean, mean, alpha=-1)
    return result, mean, dense_mean


def _refit(edit: Rewriter, dense: Program, item: Lost, moments: Hessian, nodes: dict[str, fx.Node]) -> None:
    layer, program = item.layer, edit.program
    bias = _own_bias(program, nodes.get(layer.bias.name) if layer.bias is not None else None)
    hessian, mean, dense_mean = _without_one(moments, centred=bias is not None)
    stored = nodes[layer.weight.name]
    value, old = program.tensor(stored).detach(), dense.tensor(layer.weight).detach()
    axis, out_axis = layer.operator.in_axis % old.dim(), layer.operator.out_axis % old.dim()
    old = old.index_select(out_axis, torch.from_numpy(np.flatnonzero(item.rows)))
    if has_patches(layer):
        before, now = as_matrix(old, out_axis, axis), as_matrix(value, out_axis, axis)
    else:  # outputs and places of the kernel are rows alike: [O · …, I]
        before = old.movedim((out_axis, axis), (0, -1)).flatten(0, -2)
        now = value.movedim((out_axis, axis), (0, -1)).flatten(0, -2)
    before = before.to(hessian.matrix)
    fitted = target(before, hessian, _DAMPING, towards=now.to(hessian.matrix))
    outputs = value.shape[out_axis]
    weight = from_matrix(fitted.reshape(outputs, -1), tuple(value.shape), out_axis, axis)
    edit.replace_tensor(stored, weight.to(value.dtype))
    if bias is not None:
        shift = (before @ dense_mean - fitted @ mean).reshape(outputs, -1).sum(1)
        held = program.tensor(bias).detach()
        edit.replace_tensor(bias, held + shift.to(held.dtype))


def _own_bias(program: Program, bias: fx.Node | None) -> fx.Node | None:
    """Return the bias if it is a stored tensor that no other layer uses."""
    if bias is None or bias.op != "get_attr" or len(tensor_users(program, str(bias.target))) != 1:
        return None
    return bias
