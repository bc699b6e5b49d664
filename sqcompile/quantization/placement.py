"""Placement: which operators run on integers under static quantization, and which values need codes.

Layers and matrix products always pay. Element-wise operators (add, mul, pooling, …) pay only between
other integer operators: alone, converting their inputs to codes costs more than they do. So one runs on
integers if codes of all its inputs exist anyway and some integer operator takes its result. Residual
streams of transformers, which begin at a floating-point embedding and end in a layer norm, stay in
floating point by this rule, while those of CNNs are integer throughout.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from sqcompile.operators.table import Scales, argument, data_arguments, operator_of, preserves_scale
from sqcompile.quantization.format import Format
from sqcompile.quantization.scheme import Site

# Moves that drop elements.
_DROPS = frozenset({torch.ops.aten.select.int, torch.ops.aten.slice.Tensor})

Remarks = Callable[[fx.Node, str], None]

# Integer kernels of matrix products can leave their int32 sums in floating point at no cost; those of
# convolutions and element-wise operators write codes.
_MATRIX_PRODUCTS = frozenset({"linear", "matmul"})


@dataclass
class Watch:
    """A value that needs codes.

    Attributes:
        value: The node that makes it.
        format: The format of its codes.
        users: Who takes the codes; None for all its users.
        name: Name of its observer; equal for values that must share one scale.
        fixed_range: The range, where the operator that makes the value fixes it.
    """

    value: fx.Node
    format: Format
    users: list[fx.Node] | None = field(default_factory=list)
    name: str = ""
    fixed_range: tuple[float, float] | None = None


def place(sites: Sequence[Site], formats: Mapping[fx.Node, Format], remark: Remarks) -> list[Watch]:
    """Return the values that need codes, in graph order.

    Args:
        sites: The operators that may run on integers, in graph order.
        formats: The format of the data of each.
        remark: Told why an operator stays in floating point although codes of its inputs exist.
    """
    chosen = {site.node: _Integer(site, formats[site.node]) for site in sites}
    while unpaid := _unpaid(chosen, remark):
        for node in unpaid:
            del chosen[node]
    return _watches(chosen)


def origin(value: fx.Node) -> fx.Node:
    """Follow a value back through operators that only move its elements, to the one that made them."""
    while (source := _moved(value)) is not None:
        value = source
    return value


def takers(value: fx.Node) -> Iterator[fx.Node]:
    """Yield the users of a value's elements, looking through operators that only move them."""
    for user in value.users:
        if _moved(user) is value:
            yield from takers(user)
        elif takes_elements(user):
            yield user


def takes_elements(user: fx.Node) -> bool:
    """Whether a user takes a value's elements; others only read its size."""
    if user.op == "output":
        return True
    recorded = user.meta.get("val")
    return isinstance(recorded, torch.Tensor) or (
        isinstance(recorded, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in recorded)
    )


def result(node: fx.Node) -> fx.Node:
    """Return the value that an operator's integer kernel writes: behind an activation that fuses into it."""
    entry = operator_of(node)
    if entry is None or entry.scales is not Scales.OWN or len(node.users) != 1:
        return node
    (user,) = node.users
    following = operator_of(user)
    fuses = following is not None and following.activation and user.args[0] is node
    return user if fuses else node


@dataclass(frozen=True)
class _Integer:
    """An operator that is to run on integers."""

    site: Site
    format: Format

    @property
    def inputs(self) -> list[fx.Node]:
        """Its data arguments, each once, without a stored weight."""
        weight = self.site.layer.weight_value if self.site.layer else None
        return [value for value in dict.fromkeys(data_arguments(self.site.node)) if value is not weight]

    @property
    def pays(self) -> bool:
        """Whether integers pay whatever is around it."""
        return self.site.layer is not None or self.site.kind == "matmul"

    @property
    def shares(self) -> bool:
        """Whether its inputs and its output need one common scale."""
        return self.site.operator.scales is Scales.SHARES


_Chosen = Mapping[fx.Node, _Integer]


def _operators(chosen: _Chosen) -> dict[fx.Node, fx.Node]:
    """Return the integer operators and their results; fused activations are no operators of their own."""
    results: dict[fx.Node, fx.Node] = {}
    fused: set[fx.Node] = set()
    for node in chosen:
        if node not in fused:
            results[node] = result(node)
            fused |= {results[node]} - {node}
    return results


def _unpaid(chosen: _Chosen, remark: Remarks) -> list[fx.Node]:
    """Return the element-wise operators that do not pay, given that all of `chosen` run on integers."""
    results = _operators(chosen)
    coded = set(results.values())
    for item in chosen.values():
        if item.pays:  # what layers take is converted to codes for their sake
            coded |= {origin(value) for value in item.inputs}
    unpaid = []
    for node, item in chosen.items():
        if item.pays or node not in results:
            continue
        values = [origin(value) for value in item.inputs]
        have = [value in coded for value in values if value.op != "get_attr"]
        wanted = any(user in chosen for user in takers(results[node]))
        if have and all(have) and wanted:
            continue
        unpaid.append(node)
        if have and all(have):
            remark(node, "stays in floating point: no integer operator takes its result")
        elif any(have):
            remark(node, "stays in floating point: not all of its inputs are integers")
    return unpaid


def _watches(chosen: _Chosen) -> list[Watch]:
    results = _operators(chosen)
    written = {value: chosen[node].format for node, value in results.items() if _writes_codes(node, chosen)}
    shared = {node for node in results if chosen[node].shares}
    found: dict[_Key, Watch] = {}
    groups = _Groups(shared)
    for value, format in written.items():
        if value not in shared:  # what cat writes has the scale of what it takes
            found[value, format] = Watch(value, format, users=None)
    for node in results:
        item = chosen[node]
        for value in item.inputs:
            key = (origin(value), item.format)
            early = (_before_moves(value), item.format)
            if written.get(key[0]) == item.format:
                pass  # an integer operator writes these codes
            elif _all_take(*early, chosen):
                key = early
                found.setdefault(key, Watch(*key, users=None))
            else:
                key = (value, item.format)
                watch = found.setdefault(key, Watch(*key))
                assert watch.users is not None
                watch.users.append(node)
            if item.shares:
                groups.join((node, item.format), key)
    names = groups.names(found)
    for key, watch in found.items():
        watch.name = names[key]
        watch.fixed_range = _fixed_range(watch.value)
    position = {node: index for index, node in enumerate(_graph_nodes(chosen))}
    return sorted(found.values(), key=lambda watch: position[watch.value])


_Key = tuple[fx.Node, Format]


class _Groups:
    """Sets of values that must share one scale; a set is named after the first operator that demands it."""

    def __init__(self, leaders: set[fx.Node]) -> None:
        self._leaders = leaders
        self._parent: dict[_Key, _Key] = {}

    def join(self, leader: _Key, member: _Key) -> None:
        first, second = self._root(leader), self._root(member)
        if second[0] in self._leaders:
            first, second = second, first
        self._parent[second] = first

    def names(self, keys: Mapping[_Key, Watch]) -> dict[_Key, str]:
        """Return a name for each key; a value with two formats has two names."""
        names: dict[_Key, str] = {}
        for key in keys:
            root = self._root(key)
            if root not in names:
                name, count = root[0].name, 0
                while name in names.values():
                    count += 1
                    name = f"{root[0].name}_format{count}"
                names[root] = name
            names[key] = names[root]
        return names

    def _root(self, key: _Key) -> _Key:
        while (parent := self._parent.get(key, key)) != key:
            key = parent
        return key


def _writes_codes(node: fx.Node, chosen: _Chosen) -> bool:
    """Whether an integer operator writes codes; matrix products only if nobody wants floating point."""
    if chosen[node].site.kind not in _MATRIX_PRODUCTS:
        return True
    return _all_take(result(node), chosen[node].format, chosen)


def _all_take(value: fx.Node, format: Format, chosen: _Chosen) -> bool:
    """Whether every user of a value's elements takes them as codes of that format."""
    return all(user in chosen and chosen[user].format == format for user in takers(value))


def _before_moves(value: fx.Node) -> fx.Node:
    """Follow a value back as `origin` does, but not through what drops elements: fewer are quantized behind it."""
    while value.target not in _DROPS and (source := _moved(value)) is not None:
        value = source
    return value


def _moved(node: fx.Node) -> fx.Node | None:
    """Return the value whose elements a node only moves, or None."""
    if node.target is operator.getitem:
        owner, index = node.args
        if not isinstance(owner, fx.Node) or not preserves_scale(owner):
            return None
        indices = _kind(owner) == "max_pool" and index != 0
        return None if indices else owner
    if not preserves_scale(node):
        return None
    source = argument(node, 0)
    return source if isinstance(source, fx.Node) else None


def _kind(node: fx.Node) -> str:
    """Return the kind of a node's operator, empty if the operator table has none."""
    entry = operator_of(node)
    return "" if entry is None else entry.kind


def _fixed_range(value: fx.Node) -> tuple[float, float] | None:
    entry = operator_of(origin(value))
    return entry.output_range if entry is not None and entry.scales is Scales.FIXED else None


def _graph_nodes(chosen: _Chosen) -> Iterable[fx.Node]:
    for node in chosen:
        return node.graph.nodes
    return ()
