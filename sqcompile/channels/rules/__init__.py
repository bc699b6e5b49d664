"""Dimension rules: for each operator, which dimensions of its arguments and of its value are one.

A rule also says how the constants in a call (sizes of a view, ends of a slice, numbers of groups) follow
when dimensions shrink. An operator without a rule blocks whatever enters it.
"""

from sqcompile.channels.rules import (
    attention,
    layers,
    norms,
    pieces,
    pointwise,
    recurrent,
    reductions,
    spatial,
    views,
)
from sqcompile.channels.rules.registry import RESIZES, RULES, rule_of

__all__ = [
    "RESIZES",
    "RULES",
    "attention",
    "layers",
    "norms",
    "pieces",
    "pointwise",
    "recurrent",
    "reductions",
    "rule_of",
    "spatial",
    "views",
]
