"""Observed programs: what their observers belong to, and the parameters that they freeze to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqcompile.layers import Layer, layers_of
from sqcompile.operators.table import Scales, argument, data_arguments, operator_of
from sqcompile.program import Program
from sqcompile.quantization.format import Format
from sqcompile.quantization.observers import ObserverState
from sqcompile.quantization.placement import origin


@dataclass(frozen=True)
class Parameters:
    """A frozen observer: scale and zero point, and the format that they are for."""

    scale: Tensor
    zero_point: Tensor
    format: Format


def is_observe(node: fx.Node) -> bool:
    """Whether a node is an `observe`."""
    return node.target is torch.ops.sqcompile.observe.default


def observer_name(node: fx.Node) -> str:
    """Return the name of the observer that an `observe` node feeds."""
    return str(argument(node, 1))


def state_of(program: Program, node: fx.Node) -> ObserverState:
    """Return the state that an `observe` node feeds."""
    return program.observers[observer_name(node)]


def weight_observers(program: Program) -> dict[fx.Node, list[Layer]]:
    """Return the `observe` nodes on weights, with the layers whose weight each is."""
    found: dict[fx.Node, list[Layer]] = {}
    for layer in layers_of(program):
        if is_observe(layer.weight_value):
            found.setdefault(layer.weight_value, []).append(layer)
    return found


def value_observers(program: Program) -> list[fx.Node]:
    """Return the `observe` nodes on values that are computed, in graph order."""
    weights = weight_observers(program)
    return [node for node in program.compute_nodes() if is_observe(node) and node not in weights]


def freeze(state: ObserverState) -> Parameters:
    """Return the parameters for the range that an observer chose.

    Raises:
        CalibrationError: If it never saw data; the text names the place.
    """
    return Parameters(*state.parameters(), state.format)


def codes_source(value: fx.Node, target: object) -> fx.Node | None:
    """Follow a value back to the node of operator `target` whose scale it has, or return None.

    Operators that move elements keep the scale, and those that need one common scale (cat) have it.
    """
    while True:
        value = origin(value)
        if value.target is target:
            return value
        entry = operator_of(value)
        if entry is None or entry.scales is not Scales.SHARES:
            return None
        value = data_arguments(value)[0]
