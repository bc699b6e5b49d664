"""Layers: the operators of a program that have a weight, under the names that users know.

Passes choose layers by name pattern, by kind, and by exclusion; `select_layers` is the one place
that understands patterns and says when one matches nothing.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import fx

from sqcompile.errors import SelectionError, did_you_mean, nearest
from sqcompile.operators.table import Operator, argument, operator_of
from sqcompile.program import Program
from sqcompile.text import module_path

# What may stand between a stored weight and the operator that uses it.
_TRANSPARENT = frozenset({"mask", "quantize", "dequantize", "lookup", "fake_quantize", "observe"})


class Named(Protocol):
    """What selections are made from: something with a name and a kind."""

    @property
    def name(self) -> str:
        """Name by which users select it: a module path."""
        ...

    @property
    def kind(self) -> str:
        """Kind of the operator, as the operator table names it."""
        ...


N = TypeVar("N", bound=Named)


@dataclass(frozen=True)
class Layer:
    """One use of a weight.

    Attributes:
        name: Module path, such as `layer1.0.conv1`; for a functional weight the weight's own name.
        node: The operator.
        operator: What the operator table says about it.
        weight: The `get_attr` node of the stored weight.
    """

    name: str
    node: fx.Node
    operator: Operator
    weight: fx.Node

    @property
    def kind(self) -> str:
        """Kind of the operator, such as `linear`, `conv2d` or `embedding`."""
        return self.operator.kind

    @property
    def weight_name(self) -> str:
        """Name of the stored weight."""
        return str(self.weight.target)

    @property
    def weight_value(self) -> fx.Node:
        """The node that the operator takes as its weight: the stored one, or what masks or dequantizes it."""
        assert self.operator.weight is not None
        value = argument(self.node, self.operator.weight)
        assert isinstance(value, fx.Node)
        return value

    @property
    def bias(self) -> fx.Node | None:
        """The node that the operator takes as its bias, or None."""
        if self.operator.bias is None:
            return None
        value = argument(self.node, self.operator.bias)
        return value if isinstance(value, fx.Node) else None

    @property
    def data(self) -> fx.Node | None:
        """The node that the operator takes as its data, or None for embeddings."""
        for position in self.operator.data:
            if position != self.operator.weight:
                value = argument(self.node, position)
                return value if isinstance(value, fx.Node) else None
        return None

    @property
    def groups(self) -> int:
        """Number of groups of a convolution, else 1."""
        if self.operator.groups is None:
            return 1
        value = argument(self.node, self.operator.groups)
        return value if isinstance(value, int) else 1


def layers_of(program: Program) -> list[Layer]:
    """Return the layers in graph order; a weight that is used twice gives two layers."""
    found = []
    for node in program.graph.nodes:
        layer = layer_of(program, node)
        if layer is not None:
            found.append(layer)
    return found


def layer_of(program: Program, node: fx.Node) -> Layer | None:
    """Return the layer that a node is, or None."""
    entry = operator_of(node)
    if entry is None or entry.weight is None:
        return None
    weight = stored_weight(argument(node, entry.weight))
    if weight is None or not program.has_tensor(str(weight.target)):
        return None
    if program.tensor(weight).dim() < 2:
        return None
    return Layer(_layer_name(node, str(weight.target)), node, entry, weight)


def stored_weight(value: object) -> fx.Node | None:
    """Follow a weight back through masks and (de)quantization to the node that reads it, or None."""
    while isinstance(value, fx.Node):
        if value.op == "get_attr":
            return value
        target = value.target
        name = getattr(getattr(target, "_schema", None), "name", "")
        if not name.startswith("sqcompile::") or name.removeprefix("sqcompile::") not in _TRANSPARENT:
            return None
        value = value.args[0]
    return None


def select_layers(
    layers: Sequence[N],
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    kinds: Iterable[str] = (),
    *,
    where: str = "",
) -> list[N]:
    """Choose layers by patterns on their names.

    Args:
        layers: What to choose from: layers, or other operators with a name and a kind.
        include: Patterns; a layer is chosen if any matches. A pattern is a name, a module path that
            the layer lies in, a shell pattern (`layers.*.mlp.*`), or `re:` and a regular expression.
        exclude: Patterns of layers to leave out.
        kinds: Kinds of operators to choose from (`linear`, `conv2d`); empty means all.
        where: Who asks, for the error.

    Raises:
        SelectionError: If a pattern or a kind matches nothing; the nearest names are given.
    """
    names = [layer.name for layer in layers]
    known_kinds = {layer.kind for layer in layers}
    for kind in kinds:
        if kind not in known_kinds:
            raise SelectionError(
                f"The model has no layer of kind '{kind}'.",
                where=where or None,
                seen=kind,
                expected=", ".join(sorted(known_kinds)) or "a model with layers",
                next_step=did_you_mean(kind, known_kinds),
            )
    chosen = set()
    for pattern in include:
        chosen |= _matching(pattern, names, where)
    for pattern in exclude:
        chosen -= _matching(pattern, names, where)
    wanted = set(kinds)
    return [layer for layer in layers if layer.name in chosen and (not wanted or layer.kind in wanted)]


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern (see `select_layers`) matches a layer's name."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _matching(pattern: str, names: Sequence[str], where: str) -> set[str]:
    try:
        found = {name for name in names if matches(pattern, name)}
    except re.error as error:
        raise SelectionError(
            f"'{pattern}' is not a regular expression.",
            where=where or None,
            seen=str(error),
            expected="an expression of Python's re module behind 're:'",
            next_step="escape special characters, or use a shell pattern such as layers.*.attn",
        ) from error
    if not found and pattern != "*":
        near = nearest(pattern, names)
        raise SelectionError(
            f"The pattern '{pattern}' matches no layer.",
            where=where or None,
            seen=pattern,
            expected="a layer's name, a module path, a shell pattern or re:…",
            next_step=f"nearest layers: {', '.join(near)}" if near else "list them with: sqcompile inspect",
        )
    return found


def _layer_name(node: fx.Node, weight: str) -> str:
    # Passes store `weight` as `weight_codes` or `weight_transposed`; the layer keeps its name.
    weight = weight.removesuffix("_codes").removesuffix("_transposed")
    owner, _, leaf = weight.rpartition(".")
    path = module_path(node)
    if leaf not in ("weight", "weight_orig"):
        return weight
    # A tied weight has one name and several users: the module that uses it names the layer.
    if path and path != owner and not owner.startswith(f"{path}."):
        return path
    return owner or path or weight
