"""How atoms flow through a program: the labels of every dimension of every value and stored tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sqcompile.channels.atoms import Atoms, Labels
from sqcompile.program import Program
from sqcompile.text import locate, operator_name

Size = Any
"""A size: an int, or the expression of a symbolic dimension."""


@dataclass(frozen=True, eq=False)
class Part:
    """One factor of a dimension.

    Attributes:
        size: How many positions it has; an expression where that depends on the inputs.
        labels: The atoms of each position, or None where the size is an expression.
    """

    size: Size
    labels: Labels | None = None


Dim = tuple[Part, ...]
"""A dimension as a product of parts, the first one slowest: one part unless it is partly symbolic."""

Value = tuple[Dim, ...]
"""All dimensions of a tensor."""


@dataclass(frozen=True)
class Reason:
    """Why a dimension cannot shrink.

    Attributes:
        text: The reason.
        node: The node that is the reason.
    """

    text: str
    node: fx.Node

    def __str__(self) -> str:
        return f"{self.text} ({locate(self.node)})"


@dataclass(frozen=True)
class Axis:
    """A dimension that brought atoms of its own.

    Attributes:
        name: A stored tensor and its dimension (`fc.weight:0`), or a node.
        node: Where it came from.
    """

    name: str
    node: fx.Node


@dataclass
class Flow:
    """The labels of a program, made by `flow_of`.

    Attributes:
        program: The program.
        atoms: All atoms.
        values: The dimensions of every node's value; a list of them where it is a tuple.
        tensors: The dimensions of every stored tensor, by name: tied weights have one entry.
        axes: Dimensions that brought atoms of their own; atoms know them by number.
        roles: What dimensions serve as: (role, labels, node).
        pieces: Parts that dimensions are cut into.
        hidden: Dimensions inside an operator: the groups of a convolution, by its node.
    """

    program: Program
    atoms: Atoms = field(default_factory=Atoms)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    tensors: dict[str, Value] = field(default_factory=dict)
    axes: list[Axis] = field(default_factory=list)
    roles: list[tuple[str, Labels, fx.Node]] = field(default_factory=list)
    hidden: dict[fx.Node, Dim] = field(default_factory=dict)
    pieces: list[Labels] = field(default_factory=list)
    _resolved: dict[int, Labels] = field(default_factory=dict)
    _alive: list[Labels] = field(default_factory=list)  # so that no number in `_resolved` is used again

    # --- for rules: asking -------------------------------------------------------------------------

    def value(self, node: Any) -> Value:
        """Return the dimensions of a tensor."""
        found = self.values[node]
        assert isinstance(found, tuple)
        return found

    def sizes(self, node: fx.Node) -> list[Size]:
        """Return the recorded sizes of a node's value."""
        return sizes_of(node.meta["val"])

    def resolved(self, labels: Labels) -> Labels:
        """Return labels in the atoms that decide; only when the whole program has been followed."""
        key = id(labels)
        if key not in self._resolved:
            self._resolved[key] = self.atoms.resolve(labels)
            self._alive.append(labels)
        return self._resolved[key]

    # --- for rules: making -------------------------------------------------------------------------

    def fresh(self, size: Size, node: fx.Node, name: str = "") -> Dim:
        """Return a dimension of its own."""
        if not isinstance(size, int):
            return (Part(size),)
        return (Part(size, self.atoms.fresh(size, self.axis(node, name))),)

    def axis(self, node: fx.Node, name: str = "") -> int:
        """Return the number of a new axis."""
        self.axes.append(Axis(name or node.name, node))
        return len(self.axes) - 1

    def fixed(self, size: Size, node: fx.Node, text: str) -> Dim:
        """Return a dimension that cannot shrink."""
        if not isinstance(size, int):
            return (Part(size),)
        return (Part(size, self.atoms.fixed(size, Reason(text, node))),)

    def all_fixed(self, value: Any, node: fx.Node, text: str) -> Any:
        """Return a recorded value with dimensions that cannot shrink; nested as it is."""
        if isinstance(value, torch.Tensor):
            return tuple(self.fixed(size, node, text) for size in sizes_of(value))
        if isinstance(value, (list, tuple)):
            return [self.all_fixed(item, node, text) for item in value]
        return None

    # --- for rules: relating -----------------------------------------------------------------------

    def unify(self, first: Dim, second: Dim, node: fx.Node, text: str = "") -> Dim:
        """Make two dimensions shrink together, and return one of them."""
        if first is second:
            return first
        reason = Reason(text or f"{operator_name(node)} ties two dimensions that are built differently", node)
        same = len(first) == len(second) and all(a.size == b.size for a, b in zip(first, second, strict=True))
        if not same:
            self.block(first, node, reason.text)
            self.block(second, node, reason.text)
            return first
        for one, other in zip(first, second, strict=True):
            if one.labels is not None and other.labels is not None:
                self.atoms.unify(one.labels, other.labels, reason)
        return first

    def block(self, dim: Dim, node: fx.Node, text: str) -> None:
        """Say that a dimension cannot shrink."""
        for part in dim:
            if part.labels is not None and part.labels.size:
                self.atoms.block(part.labels, Reason(text, node))

    def note(self, role: str, dim: Dim, node: fx.Node) -> None:
        """Say what a dimension serves as."""
        for part in dim:
            if part.labels is not None and len(part.labels) > 1:
                self.roles.append((role, part.labels, node))

    def split(self, dim: Dim, sizes: Sequence[int], node: fx.Node, text: str) -> list[Dim]:
        """Return the parts of a dimension that is a product, the first one slowest."""
        labels = labels_of(dim)
        assert labels is not None
        split = self.atoms.split(
            labels,
            sizes,
            lambda size: self.atoms.fresh(size, self.axis(node)),
            Reason(text, node),
        )
        return [(Part(len(part), part),) for part in split]

    def merge(self, dims: Sequence[Dim]) -> Dim:
        """Return the dimension that merges others, the first one slowest."""
        parts: list[Part] = []
        for part in (part for dim in dims for part in dim):
            last = parts[-1] if parts else None
            if last is not None and last.labels is not None and part.labels is not None:
                parts[-1] = Part(last.size * part.size, self.atoms.product([last.labels, part.labels]))
            else:
                parts.append(part)
        return tuple(parts)


def labels_of(dim: Dim) -> Labels | None:
    """Return the labels of a dimension of known size, or None if it is symbolic, or partly so."""
    return dim[0].labels if len(dim) == 1 else None


def size_of(dim: Dim) -> Size:
    """Return the size of a dimension."""
    size: Size = 1
    for part in dim:
        size = size * part.size
    return size


def sizes_of(value: torch.Tensor) -> list[Size]:
    """Return the sizes of a recorded tensor: ints, and expressions of symbols."""
    found: list[Size] = []
    for size in value.shape:
        expression = size.node.expr if isinstance(size, torch.SymInt) else size
        is_number = not isinstance(expression, int) and expression.is_number
        found.append(int(expression) if is_number else expression)
    return found


Rule = Callable[[Flow, fx.Node], Any]
"""Relates the dimensions of a node's arguments and returns those of its value."""


def flow_of(program: Program) -> Flow:
    """Follow every dimension through a program."""
    from sqcompile.channels.rules import rule_of

    flow = Flow(program)
    for node in program.graph.nodes:
        if node.op == "output":
            _block_outputs(flow, node)
        elif node.op == "placeholder":
            flow.values[node] = flow.all_fixed(node.meta.get("val"), node, "it is an input of the model")
        elif node.op == "get_attr":
            flow.values[node] = _stored(flow, node)
        else:
            rule = rule_of(node)
            flow.values[node] = _unknown(flow, node) if rule is None else rule(flow, node)
    return flow


def _stored(flow: Flow, node: fx.Node) -> Any:
    name = str(node.target)
    if not flow.program.has_tensor(name):
        return None
    if name not in flow.tensors:
        shape = flow.program.tensor(name).shape
        flow.tensors[name] = tuple(
            flow.fixed(1, node, "it has one element")
            if size == 1
            else flow.fresh(size, node, f"{name}:{axis}")
            for axis, size in enumerate(shape)
        )
    return flow.tensors[name]


def _unknown(flow: Flow, node: fx.Node) -> Any:
    """Block whatever enters an operator that nothing is known about."""
    text = f"nothing is known about the dimensions of '{operator_name(node)}'"
    for source in node.all_input_nodes:
        for dim in dims_of(flow.values.get(source)):
            flow.block(dim, node, text)
    return flow.all_fixed(node.meta.get("val"), node, text)


def _block_outputs(flow: Flow, node: fx.Node) -> None:
    for source in node.all_input_nodes:
        for dim in dims_of(flow.values.get(source)):
            flow.block(dim, source, "it is an output of the model")


def dims_of(value: Any) -> list[Dim]:
    """Return the dimensions of a value, or of all values of a tuple."""
    if isinstance(value, tuple):
        return list(value)
    return [dim for item in value for dim in dims_of(item)] if isinstance(value, list) else []
