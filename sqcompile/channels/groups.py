"""Channel groups: the units that a program can lose, and what goes with each.

A *unit* is the smallest thing that can go: one channel of a residual stage with all weights that read or
write it, one attention head, one neuron. Units that run through the same dimensions are a *group*, of
which any part may go, but not all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import fx

from sqcompile.channels.flow import Flow, Reason, flow_of, labels_of
from sqcompile.channels.rules.attention import HEAD_WIDTH, HEADS
from sqcompile.channels.rules.reductions import AVERAGED
from sqcompile.layers import layers_of
from sqcompile.operators.table import argument
from sqcompile.program import Program
from sqcompile.text import module_path, operator_name

Kind = Literal["channels", "neurons", "heads", "head-width", "embedding"]
"""What a group holds: channels of convolutions, neurons of linear or recurrent layers, heads of attention,
the width of heads, or the width of an embedding and all that is added to it."""


@dataclass(frozen=True)
class Member:
    """A dimension of a stored tensor that shrinks with a group.

    Attributes:
        tensor: Name of the tensor.
        axis: Its dimension.
        size: How many positions the dimension has.
        unit: Of each position below, the number of the unit that it goes with.
        positions: Positions along the dimension that belong to a unit.
        role: What the dimension is: `makes` (output channels of a layer), `reads` (its input channels) or
            `follows` (norms, biases, tables).
        layer: Name of the layer that has the tensor as its weight, or an empty text.
    """

    tensor: str
    axis: int
    size: int
    unit: NDArray[np.int64]
    positions: NDArray[np.int64]
    role: Literal["makes", "reads", "follows"]
    layer: str = ""

    def __str__(self) -> str:
        each = len(self.positions) / max(1, len(np.unique(self.unit)))
        layer = f" of {self.layer}" if self.layer else ""
        what = {"makes": f"output{layer}", "reads": f"input{layer}", "follows": "follows"}[self.role]
        return f"@{self.tensor} dimension {self.axis}: {each:g} of {self.size} a unit, {what}"


@dataclass(frozen=True)
class Group:
    """Units of which any part may go.

    Attributes:
        name: The first layer that makes the dimension, with the kind if that is not its output as a whole,
            and a number if there are several such groups.
        kind: What its units are.
        units: Atoms, one a unit, in the order of their first positions.
        members: Every dimension of a stored tensor that shrinks with it.
        node: The first node that makes the dimension.
        blocked: Why nothing of it may go, or None.
    """

    name: str
    kind: Kind
    units: NDArray[np.int64]
    members: tuple[Member, ...]
    node: fx.Node
    blocked: Reason | None = None

    def __len__(self) -> int:
        return len(self.units)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that make the dimension."""
        return tuple(dict.fromkeys(member.layer for member in self.members if member.role == "makes"))

    @property
    def consumers(self) -> tuple[str, ...]:
        """Names of the layers that read the dimension."""
        return tuple(dict.fromkeys(member.layer for member in self.members if member.role == "reads"))

    def __str__(self) -> str:
        head = f"{self.name}: {len(self)} units of {self.kind}"
        if self.blocked is not None:
            return f"{head}, cannot shrink: {self.blocked}"
        return "\n".join([head, *(f"  {member}" for member in self.members)])


@dataclass(frozen=True)
class Groups:
    """All groups of a program.

    Attributes:
        flow: The labels that they were read from.
        groups: Groups that can shrink, in graph order.
        blocked: Groups that cannot, each with its reason.
    """

    flow: Flow
    groups: tuple[Group, ...]
    blocked: tuple[Group, ...] = field(default=())

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.groups, *self.blocked)))


@dataclass(frozen=True)
class Weight:
    """A stored weight and what its dimensions are.

    Attributes:
        layer: Name of the layer that uses it first.
        kind: Kind of the layer's operator.
        node: The operator.
        makes: Dimensions along which it makes channels.
        reads: The dimension along which it reads channels, or None.
    """

    layer: str
    kind: str
    node: fx.Node
    makes: tuple[int, ...]
    reads: int | None


def find_groups(program: Program) -> Groups:
    """Find every group of channels, heads and neurons of a float program.

    Args:
        program: The program; it is only read.
    """
    flow = flow_of(program)
    weights = weights_of(program)
    places = _places(flow, weights)
    signatures = _signatures(flow)
    roles = _roles(flow)
    atoms = np.fromiter(places, dtype=np.int64, count=len(places))
    by_key: dict[tuple[object, ...], list[int]] = {}
    for unit, stuck in zip(places, flow.atoms.is_blocked(atoms).tolist(), strict=True):
        by_key.setdefault((stuck, signatures.get(unit, (-1 - unit,))), []).append(unit)
    free: list[Group] = []
    blocked: list[Group] = []
    for units in by_key.values():
        group = _group(flow, units, places, roles, weights)
        if group is not None:
            (free if group.blocked is None else blocked).append(group)
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    free.sort(key=lambda group: order[group.node])
    return Groups(flow, _numbered(free), _numbered(blocked))


def _numbered(groups: list[Group]) -> tuple[Group, ...]:
    """Give groups of one layer and kind different names."""
    counts: dict[str, int] = {}
    result = []
    for group in groups:
        name = group.name if group.kind in ("channels", "neurons") else f"{group.name}.{group.kind}"
        counts[name] = counts.get(name, 0) + 1
        number = f"#{counts[name]}" if counts[name] > 1 else ""
        result.append(replace(group, name=f"{name}{number}"))
    return tuple(result)


def weights_of(program: Program) -> dict[str, Weight]:
    """Return the stored weights of layers, recurrent ones included, by name of the tensor."""
    found: dict[str, Weight] = {}
    for layer in layers_of(program):
        entry, rank = layer.operator, program.tensor(layer.weight).dim()
        out_axis, in_axis = entry.out_axis % rank, entry.in_axis % rank
        if layer.kind == "embedding":
            found.setdefault(layer.weight_name, Weight(layer.name, layer.kind, layer.node, (1,), None))
            continue
        # Along the first dimension of a grouped weight lie the groups, which are inputs and outputs.
        makes = (0, out_axis) if layer.groups > 1 and out_axis else (out_axis,)
        found.setdefault(layer.weight_name, Weight(layer.name, layer.kind, layer.node, makes, in_axis))
    for node in program.compute_nodes():
        stored = argument(node, 2) if operator_name(node) in ("lstm.input", "gru.input") else None
        for item in stored if isinstance(stored, (list, tuple)) else ():
            if isinstance(item, fx.Node) and item.op == "get_attr" and program.tensor(item).dim() == 2:
                name = str(item.target)
                owner = module_path(node) or name.rpartition(".")[0] or name
                kind = operator_name(node).partition(".")[0]
                found.setdefault(name, Weight(owner, kind, node, (0,), 1))
    return found


_Place = tuple[str, int, int]
"""A tensor, its dimension, a position."""


def _places(flow: Flow, weights: dict[str, Weight]) -> dict[int, list[_Place]]:
    """Return the places of every atom in stored tensors, weights first, in graph order."""
    order = {name: index for index, name in enumerate(weights)}
    names = sorted(flow.tensors, key=lambda name: order.get(name, len(order)))
    found: dict[int, list[_Place]] = {}
    for name in names:
        for axis, dim in enumerate(flow.tensors[name]):
            labels = labels_of(dim)
            assert labels is not None
            if len(labels) < 2:
                continue
            for column in flow.resolved(labels).T:
                for position, atom in enumerate(column.tolist()):
                    if atom >= 0:
                        found.setdefault(atom, []).append((name, axis, position))
    return found


def _signatures(flow: Flow) -> dict[int, tuple[int, ...]]:
    """Return the axes and pieces that each atom runs through: those of the same ones are a group."""
    roots, axes = flow.atoms.axes()
    pairs = [np.stack([roots, axes], axis=1)]
    for number, labels in enumerate(flow.pieces, start=len(flow.axes)):
        resolved = flow.resolved(labels)
        inside = np.unique(resolved[resolved >= 0])
        pairs.append(np.stack([inside, np.full(len(inside), number)], axis=1))
    return _by_first(np.unique(np.concatenate(pairs), axis=0))


def _by_first(pairs: NDArray[np.int64]) -> dict[int, tuple[int, ...]]:
    """Gather the second numbers of sorted pairs by the first."""
    found: dict[int, tuple[int, ...]] = {}
    starts = np.flatnonzero(np.diff(pairs[:, 0], prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(pairs)], strict=True):
        found[int(pairs[start, 0])] = tuple(pairs[start:end, 1].tolist())
    return found


def _roles(flow: Flow) -> dict[str, NDArray[np.int64]]:
    """Return the atoms that serve in each role."""
    found: dict[str, list[NDArray[np.int64]]] = {}
    for role, labels, _ in flow.roles:
        resolved = flow.resolved(labels)
        found.setdefault(role, []).append(resolved[resolved >= 0])
    return {role: np.unique(np.concatenate(atoms)) for role, atoms in found.items()}


def _group(
    flow: Flow,
    units: list[int],
    places: dict[int, list[_Place]],
    roles: dict[str, NDArray[np.int64]],
    weights: dict[str, Weight],
) -> Group | None:
    """Return the group of some atoms, or None if no layer makes them."""
    gathered: dict[tuple[str, int], tuple[list[int], list[int]]] = {}
    for number, unit in enumerate(units):
        for name, axis, position in places[unit]:
            numbers, positions = gathered.setdefault((name, axis), ([], []))
            numbers.append(number)
            positions.append(position)
    members = tuple(
        _member(flow, weights.get(name), name, axis, numbers, positions)
        for (name, axis), (numbers, positions) in gathered.items()
    )
    made = [member for member in members if member.role == "makes"]
    if not made:
        return None
    atoms = np.array(units)
    node = weights[made[0].tensor].node
    blocked = flow.atoms.reason(units[0])
    if blocked is None:
        whole = next((member for member in members if _is_whole(member)), None)
        if whole is not None:
            text = f"removing a part would leave nothing of @{whole.tensor} dimension {whole.axis}"
            blocked = Reason(text, node)
    kinds = {weights[member.tensor].kind for member in made}
    kind = _kind(atoms, kinds, roles)
    return Group(made[0].layer, kind, atoms, members, node, blocked)


def _member(
    flow: Flow, weight: Weight | None, name: str, axis: int, numbers: list[int], positions: list[int]
) -> Member:
    labels = labels_of(flow.tensors[name][axis])
    assert labels is not None
    role: Literal["makes", "reads", "follows"] = "follows"
    if weight is not None and axis in weight.makes:
        role = "makes"
    elif weight is not None and axis == weight.reads:
        role = "reads"
    layer = weight.layer if weight is not None and role != "follows" else ""
    return Member(name, axis, len(labels), np.array(numbers), np.array(positions), role, layer)


def _is_whole(member: Member) -> bool:
    """Whether a unit is all that there is of a dimension."""
    return bool((np.bincount(member.unit) >= member.size).any())


def _kind(atoms: NDArray[np.int64], kinds: set[str], roles: dict[str, NDArray[np.int64]]) -> Kind:
    """Say what the units of a group are, made by layers of some kinds."""

    def has(role: str) -> bool:
        return bool(np.isin(atoms, roles.get(role, ())).any())

    convolves = any(kind.startswith("conv") for kind in kinds)
    if has(HEADS):
        return "heads"
    if has(HEAD_WIDTH):
        return "head-width"
    if has("embedded") or (not convolves and (has("normalized") or has(AVERAGED))):
        return "embedding"
    return "channels" if convolves else "neurons"
