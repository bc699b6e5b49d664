"""How much every unit of a group matters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from sqcompile.channels.groups import Group, Member
from sqcompile.channels.select import Scores
from sqcompile.evaluate import run_watched
from sqcompile.layers import Layer, layers_of
from sqcompile.operators.table import argument
from sqcompile.program import Program
from sqcompile.second_order import Hessian, Reader, elimination_costs

Importance = Literal[
    "l1", "l2", "batch-norm", "taylor", "hessian", "activation", "geometric-median", "random"
]
"""What a unit is judged by; see `score_units`."""

NEEDS_DATA: frozenset[str] = frozenset({"taylor", "hessian", "activation"})

_Array = NDArray[np.float64]


def score_units(
    program: Program,
    groups: Sequence[Group],
    importance: Importance,
    *,
    batches: Callable[[], Iterable[Sequence[Any]]] | None = None,
    seed: int = 0,
) -> tuple[Scores, list[tuple[Group, str]]]:
    """Score every unit; larger matters more.

    - `l1`, `l2`: norm of all weights of layers that make or read the unit.
    - `batch-norm`: |γ| of the norms that the unit passes (Liu et al. 2017).
    - `geometric-median`: distance of the weights that make it from those of the others (He et al. 2019).
    - `activation`: root of the mean square of what the layers read, times the norm of the weights that read
      it (Sun et al. 2023, by channel).
    - `taylor`: root of the mean square of the outputs' change, to first order, if the unit were zero:
      E[(v · J w)²] over random signs v (Molchanov et al. 2019, with the outputs in the place of a loss).
    - `hessian`: root of what the mean squared error of the layers that read it grows by when it goes, after
      all that are cheaper, and the rest is refitted (Kurtić et al. 2023).
    - `random`: as the seed says.

    Args:
        program: The program.
        groups: Its groups.
        importance: Which measure.
        batches: Yields calibration batches, for the measures that need data.
        seed: Seed of what is random.

    Returns:
        The scores, and the groups that the measure says nothing about (their scores are by `l2`), with
        the reason.
    """
    remarks: list[tuple[Group, str]] = []
    scores: dict[str, _Array] = {}
    found: dict[str, _Array] = {}
    if importance == "activation":
        found = _by_activation(program, groups, batches)
    elif importance == "hessian":
        found = _by_hessian(program, groups, batches)
    elif importance == "taylor":
        found = _by_taylor(program, groups, batches, seed)
    generator = np.random.default_rng(seed)
    for group in groups:
        score: _Array | None
        if importance == "random":
            score = generator.random(len(group))
        elif importance == "batch-norm":
            score = _by_batch_norm(program, group)
        elif importance == "geometric-median":
            score = _by_distance(program, group)
        elif importance in NEEDS_DATA:
            score = found.get(group.name)
        else:
            score = _by_norm(program, group, 1 if importance == "l1" else 2)
        if score is None:
            remarks.append((group, f"has nothing that '{importance}' is measured on; ranked by l2"))
            score = _by_norm(program, group, 2)
        scores[group.name] = score
    return scores, remarks


def add_up(group: Group, member: Member, values: torch.Tensor) -> _Array:
    """Sum values of a member's positions, [size], over the positions of each unit."""
    picked = values.detach().to(torch.float64).numpy()[member.positions]
    return np.bincount(member.unit, weights=picked, minlength=len(group)).astype(np.float64)


def along(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    """Return a tensor as a matrix whose rows are the positions of one dimension."""
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def _weights(group: Group, *roles: str) -> list[Member]:
    return [member for member in group.members if member.role in roles]


def _by_norm(program: Program, group: Group, power: int) -> _Array:
    total = np.zeros(len(group))
    for member in _weights(group, "makes", "reads"):
        weight = program.tensor(member.tensor).detach().float()
        rest = [axis for axis in range(weight.dim()) if axis != member.axis]
        total += add_up(group, member, torch.linalg.vector_norm(weight, power, dim=rest) ** power)
    return total if power == 1 else np.sqrt(total)


def _by_batch_norm(program: Program, group: Group) -> _Array | None:
    scales = {
        str(stored.target)
        for node in program.compute_nodes()
        if node.target is torch.ops.aten.batch_norm.default
        and isinstance(stored := argument(node, 1), fx.Node)
        and stored.op == "get_attr"
    }
    members = [member for member in group.members if member.tensor in scales]
    if not members:
        return None
    return np.sum([add_up(group, member, program.tensor(member.tensor).abs()) for member in members], axis=0)  # type: ignore[no-any-return]


def _by_distance(program: Program, group: Group) -> _Array | None:
    total = np.zeros(len(group))
    measured = False
    for member in _weights(group, "makes"):
        rows = along(program.tensor(member.tensor).detach().float(), member.axis)[member.positions]
        order = np.argsort(member.unit, kind="stable")
        each = len(order) // len(group)
        if len(order) != each * len(group) or len(np.unique(member.unit)) != len(group):
            continue
        units = rows[torch.from_numpy(order)].reshape(len(group), -1)
        total += torch.cdist(units, units).sum(1).double().numpy()
        measured = True
    return total if measured else None


def _readers(program: Program, group: Group) -> list[tuple[Member, Layer]]:
    """Return the members that read the group, with their layers, where each input is read as a whole."""
    reads = {member.tensor: member for member in _weights(group, "reads")}
    return [
        (reads[layer.weight_name], layer)
        for layer in layers_of(program)
        if layer.weight_name in reads and layer.groups == 1 and layer.data is not None
    ]


def data_axis(layer: Layer) -> int:
    """Return the dimension of a layer's data that it sums over."""
    return -1 if layer.kind in ("linear", "matmul") else 1


def _by_activation(
    program: Program,
    groups: Sequence[Group],
    batches: Callable[[], Iterable[Sequence[Any]]] | None,
) -> dict[str, _Array]:
    readers = {group.name: _readers(program, group) for group in groups}
    sums: dict[fx.Node, torch.Tensor] = {}
    counts: dict[fx.Node, int] = {}

    def collect(node: fx.Node, rows: torch.Tensor) -> None:
        sums[node] = sums.get(node, torch.zeros(1, dtype=torch.float64)) + rows.double().square().sum(0)
        counts[node] = counts.get(node, 0) + rows.shape[0]

    _watch_inputs(program, readers, batches, collect)
    result: dict[str, _Array] = {}
    for group in groups:
        total = np.zeros(len(group))
        for member, layer in readers[group.name]:
            assert layer.data is not None
            norms = along(program.tensor(member.tensor).detach().double().square(), member.axis).sum(1)
            total += add_up(group, member, norms * sums[layer.data] / counts[layer.data])
        if readers[group.name]:
            result[group.name] = np.sqrt(total)
    return result


def _by_hessian(
    program: Program,
    groups: Sequence[Group],
    batches: Callable[[], Iterable[Sequence[Any]]] | None,
) -> dict[str, _Array]:
    readers = {group.name: _readers(program, group) for group in groups}
    names = {layer.data: layer.name for found in readers.values() for _, layer in found}
    hessians: dict[fx.Node, Hessian] = {}

    def collect(node: fx.Node, rows: torch.Tensor) -> None:
        if node not in hessians:
            hessians[node] = Hessian(rows.shape[1], rows.device, f"layer '{names[node]}'")
        hessians[node].add(rows)

    _watch_inputs(program, readers, batches, collect)
    result: dict[str, _Array] = {}
    for group in groups:
        if not readers[group.name]:
            continue
        found = []
        for member, layer in readers[group.name]:
            assert layer.data is not None
            unit = torch.full((member.size,), -1)
            unit[torch.from_numpy(member.positions)] = torch.from_numpy(member.unit)
            weight = along(program.tensor(member.tensor).detach(), member.axis).T
            found.append(Reader(weight, hessians[layer.data], unit))
        result[group.name] = elimination_costs(found, len(group)).sqrt().numpy()
    return result


def _watch_inputs(
    program: Program,
    readers: Mapping[str, Sequence[tuple[Member, Layer]]],
    batches: Callable[[], Iterable[Sequence[Any]]] | None,
    collect: Callable[[fx.Node, torch.Tensor], None],
) -> None:
    """Show what layers read over all batches: called with the node and the value as rows, [inputs, channels]."""
    assert batches is not None
    axes = {layer.data: data_axis(layer) for found in readers.values() for _, layer in found}

    def show(node: fx.Node, value: torch.Tensor) -> None:
        collect(node, along(value.detach(), axes[node] % value.dim()).T)

    watched = [node for node in axes if node is not None]
    for batch in batches():
        run_watched(program, batch, watched, show)


def _by_taylor(
    program: Program,
    groups: Sequence[Group],
    batches: Callable[[], Iterable[Sequence[Any]]] | None,
    seed: int,
) -> dict[str, _Array]:
    assert batches is not None
    generator = torch.Generator().manual_seed(seed)
    members = {group.name: _weights(group, "reads") or _weights(group, "makes") for group in groups}
    names = sorted({member.tensor for found in members.values() for member in found})
    weights = {name: program.tensor(name).detach().clone().requires_grad_() for name in names}
    totals = {group.name: np.zeros(len(group)) for group in groups}
    count = 0
    for batch in batches():
        outputs = torch.func.functional_call(program.graph_module, weights, tuple(batch))
        floats = [value for value in outputs if isinstance(value, torch.Tensor) and value.is_floating_point()]
        signs = [torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1 for value in floats]
        total = torch.stack([(value * sign).sum() for value, sign in zip(floats, signs, strict=True)]).sum()
        gradients = torch.autograd.grad(total, [weights[name] for name in names], allow_unused=True)
        slopes = {
            name: torch.zeros_like(weights[name]) if slope is None else slope * weights[name].detach()
            for name, slope in zip(names, gradients, strict=True)
        }
        for group in groups:
            change = np.zeros(len(group))
            for member in members[group.name]:
                change += add_up(group, member, along(slopes[member.tensor], member.axis).sum(1))
            totals[group.name] += change**2
        count += 1
    return {name: np.sqrt(total / max(1, count)) for name, total in totals.items()}
