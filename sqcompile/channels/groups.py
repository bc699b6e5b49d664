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
    atoms, numbers, groups = _grouped(flow, places)
    roles = _roles(flow)
    free: list[Group] = []
    blocked: list[Group] = []
    for units, entries in _parts(flow, places, atoms, numbers, groups):
        group = _group(flow, units, entries, places, numbers, roles, weights)
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


@dataclass(frozen=True)
class _Places:
    """Where atoms occur in stored tensors; one entry a place, weights first, in graph order.

    Attributes:
        dims: Dimensions of tensors: name and number.
        atom: Of each entry, the atom.
        dim: Of each entry, the index of its dimension in `dims`.
        position: Of each entry, the position along the dimension.
    """

    dims: list[tuple[str, int]]
    atom: NDArray[np.int64]
    dim: NDArray[np.int64]
    position: NDArray[np.int64]


def _places(flow: Flow, weights: dict[str, Weight]) -> _Places:
    order = {name: index for index, name in enumerate(weights)}
    dims: list[tuple[str, int]] = []
    columns: list[NDArray[np.int64]] = []
    for name in sorted(flow.tensors, key=lambda name: order.get(name, len(order))):
        for axis, dim in enumerate(flow.tensors[name]):
            labels = labels_of(dim)
            assert labels is not None
            if len(labels) < 2:
                continue
            for column in flow.resolved(labels).T:
                position = np.flatnonzero(column >= 0)
                index = np.full(len(position), len(dims))
                columns.append(np.stack([column[position], index, position]))
            dims.append((name, axis))
    atom, dim, position = np.concatenate(columns, axis=1) if columns else np.empty((3, 0), dtype=np.int64)
    return _Places(dims, atom, dim, position)


def _grouped(flow: Flow, places: _Places) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Say which atoms are a group: those that run through the same axes and pieces, and may go or may not.

    Returns:
        The atoms that occur, in the order of their first places; then, by atom, the number of each in its
        group, and its group, in the order of their first atoms.
    """
    roots, axes = flow.atoms.axes()
    pairs = [np.stack([roots, axes])]
    for number, labels in enumerate(flow.pieces, start=len(flow.axes)):
        inside = np.unique(flow.resolved(labels))
        inside = inside[inside >= 0]
        pairs.append(np.stack([inside, np.full(len(inside), number)]))
    count = len(flow.axes) + len(flow.pieces)
    root, axis = np.concatenate(pairs, axis=1)
    root, axis = np.divmod(np.unique(root * count + axis), max(1, count))
    # Sets of axes are told apart by the sum of a random number for each.
    marks = np.random.default_rng(0).integers(1 << 62, size=count, dtype=np.uint64)
    signature = np.zeros(flow.atoms.size, dtype=np.uint64)
    np.add.at(signature, root, marks[axis])
    _, first = np.unique(places.atom, return_index=True)
    atoms = places.atom[np.sort(first)]
    key = signature[atoms] * np.uint64(2) + flow.atoms.is_blocked(atoms).astype(np.uint64)
    _, start, group = np.unique(key, return_index=True, return_inverse=True)
    group = np.argsort(np.argsort(start))[group]
    groups = np.full(flow.atoms.size, -1)
    groups[atoms] = group
    order = np.argsort(group, kind="stable")
    begin = np.flatnonzero(np.diff(group[order], prepend=-1))
    numbers = np.full(flow.atoms.size, -1)
    numbers[atoms[order]] = np.arange(len(atoms)) - np.repeat(begin, np.diff([*begin, len(atoms)]))
    return atoms, numbers, groups


def _parts(
    flow: Flow,
    places: _Places,
    atoms: NDArray[np.int64],
    numbers: NDArray[np.int64],
    groups: NDArray[np.int64],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield the units of each group, and its entries among the places, by dimension."""
    if not len(atoms):
        return
    by_group = atoms[np.lexsort((numbers[atoms], groups[atoms]))]
    units = np.split(by_group, np.flatnonzero(np.diff(groups[by_group])) + 1)
    group = groups[places.atom]
    order = np.lexsort((places.dim, group))
    entries = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    yield from zip(units, entries, strict=True)


def _roles(flow: Flow) -> dict[str, NDArray[np.int64]]:
    """Return the atoms that serve in each role."""
    found: dict[str, list[NDArray[np.int64]]] = {}
    for role, labels, _ in flow.roles:
        resolved = flow.resolved(labels)
        found.setdefault(role, []).append(resolved[resolved >= 0])
    return {role: np.unique(np.concatenate(atoms)) for role, atoms in found.items()}


def _group(
    flow: Flow,
    units: NDArray[np.int64],
    entries: NDArray[np.int64],
    places: _Places,
    numbers: NDArray[np.int64],
    roles: dict[str, NDArray[np.int64]],
    weights: dict[str, Weight],
) -> Group | None:
    """Return the group of some atoms, or None if no layer makes them."""
    members = []
    for part in np.split(entries, np.flatnonzero(np.diff(places.dim[entries])) + 1):
        name, axis = places.dims[places.dim[part[0]]]
        number = numbers[places.atom[part]]
        members.append(_member(flow, weights.get(name), name, axis, number, places.position[part]))
    made = [member for member in members if member.role == "makes"]
    if not made:
        return None
    node = weights[made[0].tensor].node
    blocked = flow.atoms.reason(int(units[0]))
    if blocked is None:
        whole = next((member for member in members if _is_whole(member)), None)
        if whole is not None:
            text = f"removing a part would leave nothing of @{whole.tensor} dimension {whole.axis}"
            blocked = Reason(text, node)
        elif len(units) == 1:
            blocked = Reason("it is a group of one, and no group goes as a whole", node)
    kinds = {weights[member.tensor].kind for member in made}
    kind = _kind(units, kinds, roles)
    return Group(made[0].layer, kind, units, tuple(members), node, blocked)


def _member(
    flow: Flow,
    weight: Weight | None,
    name: str,
    axis: int,
    unit: NDArray[np.int64],
    positions: NDArray[np.int64],
) -> Member:
    labels = labels_of(flow.tensors[name][axis])
    assert labels is not None
    role: Literal["makes", "reads", "follows"] = "follows"
    if weight is not None and axis in weight.makes:
        role = "makes"
    elif weight is not None and axis == weight.reads:
        role = "reads"
    layer = weight.layer if weight is not None and role != "follows" else ""
    return Member(name, axis, len(labels), unit, positions, role, layer)


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
