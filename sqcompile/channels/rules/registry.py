"""The table of dimension rules, one entry an operator, filled by the files of this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import fx

from sqcompile.channels.flow import Flow, Rule

if TYPE_CHECKING:
    from sqcompile.channels.shrink import Shrink

Resize = Callable[["Shrink", fx.Node], None]
"""Changes the constants of a node's call after dimensions have shrunk."""

RULES: dict[Any, Rule] = {}
RESIZES: dict[Any, Resize] = {}

_F = TypeVar("_F", bound=Callable[..., Any])


def rule(*targets: Any) -> Callable[[_F], _F]:
    """Register the rule of operators."""

    def register(function: _F) -> _F:
        for target in targets:
            RULES[target] = function
        return function

    return register


def resize(*targets: Any) -> Callable[[_F], _F]:
    """Register how the constants of operators follow their dimensions."""

    def register(function: _F) -> _F:
        for target in targets:
            RESIZES[target] = function
        return function

    return register


def overloads(*names: str) -> list[Any]:
    """Return operators of ATen by name and overload (`relu.default`), those that this PyTorch has."""
    found = []
    for name in names:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if operator is not None:
            found.append(operator)
    return found


def rule_of(node: fx.Node) -> Rule | None:
    """Return the rule of a node's operator, or None if nothing is known about it."""
    found = RULES.get(node.target)
    if found is not None:
        return found
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return RULES["pointwise"]
    if not isinstance(target, torch._ops.OpOverload):
        return _scalar
    return None


def _scalar(flow: Flow, node: fx.Node) -> Any:
    """Python's own functions of sizes have no dimensions."""
    return None
