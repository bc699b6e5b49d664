"""Schemes: which number format each operator of a program gets.

A pass has one default format; overrides change it for single layers, by name pattern, or for a type of
operator, as PyTorch's qconfig dictionaries did. `"float"` leaves an operator in floating point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from sqcompile.errors import SelectionError, did_you_mean
from sqcompile.layers import Layer, layer_of, select_layers
from sqcompile.operators.table import TABLE, Operator, argument, operator_of, preserves_scale
from sqcompile.program import Program
from sqcompile.quantization.format import Format, PerChannel, PerGroup
from sqcompile.text import module_path

Override = tuple[str, Format | Literal["float"]]
"""A pattern and the format of what it matches.

The pattern is one of `select_layers` (`layer1.*`, `re:…`), or `kind:` and a kind of operator
(`kind:linear`, `kind:add`); `kind:head` are the linear layers that make the program's outputs.
"""

_KIND = "kind:"
HEAD = "head"

# What may stand between the last layer and the output: models cast, scale and cap their logits.
_AFTER_HEAD = frozenset({"aten::to", "aten::_to_copy", "aten::mul", "aten::div", "aten::tanh", "aten::add"})


@dataclass(frozen=True)
class Site:
    """An operator that quantization may choose: a layer, or one with integer kernels.

    Attributes:
        name: The layer's name; for other operators the module path, else the node's name.
        node: The operator.
        operator: What the operator table says about it.
        layer: The layer, or None for operators without a stored weight.
    """

    name: str
    node: fx.Node
    operator: Operator
    layer: Layer | None

    @property
    def kind(self) -> str:
        """Kind of the operator, such as `linear` or `add`."""
        return self.operator.kind


def sites_of(program: Program) -> list[Site]:
    """Return the layers and the operators with integer kernels, in graph order."""
    found = []
    for node in program.compute_nodes():
        entry = operator_of(node)
        if entry is None:
            continue
        layer = layer_of(program, node)
        if layer is not None:
            found.append(Site(layer.name, node, entry, layer))
        elif entry.integer:
            found.append(Site(module_path(node) or node.name, node, entry, None))
    return found


def choose_formats(
    sites: Sequence[Site], default: Format | None, overrides: Sequence[Override], *, where: str = ""
) -> dict[fx.Node, Format | None]:
    """Return the format of each site; None for floating point. Of several matching overrides, the last wins.

    Args:
        sites: What to choose for.
        default: The format of what no override matches.
        overrides: See `Override`.
        where: Who asks, for the error.

    Raises:
        SelectionError: If a pattern matches nothing, or there is no such kind; the nearest names are given.
    """
    formats: dict[fx.Node, Format | None] = {site.node: default for site in sites}
    for pattern, choice in overrides:
        for site in _matching(sites, pattern, where):
            formats[site.node] = None if isinstance(choice, str) else choice
    return formats


def is_head(node: fx.Node) -> bool:
    """Whether a node is a linear layer whose result is an output of the program, but for casts and scaling."""
    entry = operator_of(node)
    return entry is not None and entry.kind == "linear" and _reaches_output(node)


def weight_format(layer: Layer, format: Format, shape: Sequence[int]) -> tuple[Format, str | None]:
    """Return the format with its axis on the weight's own axes, and a remark if it had to change.

    `channel=0` means the output channels and `group=n` groups along the input channels, wherever the
    operator keeps them: transposed convolutions and `x @ weight` have them the other way round. The scale
    of a group takes part in the sum over its inputs, so a convolution with less input channels than a
    group (a depthwise one has one) gets a scale a channel instead.

    Shapes: linear [O, I], conv [O, I / groups, Kh, Kw], transposed conv [I, O / groups, Kh, Kw].
    """
    out_axis, in_axis = layer.operator.out_axis % len(shape), layer.operator.in_axis % len(shape)
    granularity = format.granularity
    if isinstance(granularity, PerChannel) and granularity.axis == 0:
        return _with(format, PerChannel(out_axis)), None
    if not isinstance(granularity, PerGroup) or granularity.axis != -1:
        return format, None
    depth = shape[in_axis]
    if len(shape) > 2 and depth < granularity.size:
        short = f"its {depth} input channels are less than a group of {granularity.size}: one scale a channel"
        return _with(format, PerChannel(out_axis)), short
    reason = None
    if depth % granularity.size:
        last = depth % granularity.size
        reason = (
            f"its {depth} input channels are no multiple of {granularity.size}: the last group has {last}"
        )
    # The last axis keeps its text `group=n`.
    axis = -1 if in_axis == len(shape) - 1 else in_axis
    return _with(format, PerGroup(granularity.size, axis)), reason


def _with(format: Format, granularity: PerChannel | PerGroup) -> Format:
    if granularity == format.granularity:
        return format
    return Format(
        bits=format.bits,
        signed=format.signed,
        symmetric=format.symmetric,
        granularity=granularity,
        dynamic=format.dynamic,
        narrow=format.narrow,
        mapping=format.mapping,
    )


def _matching(sites: Sequence[Site], pattern: str, where: str) -> list[Site]:
    if not pattern.startswith(_KIND):
        return select_layers(sites, (pattern,), where=where)
    kind = pattern.removeprefix(_KIND)
    if kind == HEAD:
        return [site for site in sites if is_head(site.node)]
    known = {entry.kind for entry in TABLE.values() if entry.integer or entry.weight is not None}
    if kind not in known:  # a known kind that this program lacks is no mistake: pipelines name embeddings
        raise SelectionError(
            f"There is no kind of operator '{kind}' to quantize.",
            where=where or None,
            seen=pattern,
            expected=", ".join(sorted(known | {HEAD})),
            next_step=did_you_mean(kind, [*known, HEAD]),
        )
    return [site for site in sites if site.kind == kind]


def _reaches_output(node: fx.Node) -> bool:
    for user in node.users:
        if user.op == "output":
            return not user.meta.get("inner", False)  # of a part of a model: what the next part takes
        if (preserves_scale(user) or _follows_head(user)) and _reaches_output(user):
            return True
    return False


def _follows_head(node: fx.Node) -> bool:
    """Whether a node casts, scales or caps one value: it takes no other computed value."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target._schema.name not in _AFTER_HEAD:
        return False
    return not isinstance(argument(node, 1), fx.Node)
