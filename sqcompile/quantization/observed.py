"""Observed programs: what their observers belong to, and the parameters that they freeze to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqcompile.layers import Layer, layers_of
from sqcompile.operators.table import Scales, argument, data_arguments, operator_of
from sqcompile.program import Program
from sqcompile.quantization.affine import scale_from_range
from sqcompile.quantization.format import Format
from sqcompile.quantization.learned import LearnedState
from sqcompile.quantization.lookup import fit, nearest_entries
from sqcompile.quantization.observers import HistogramState, ObserverState
from sqcompile.quantization.placement import origin

# Codes of values that a table has the entries of: what `lookup.nearest_entries` takes and gives.
ENTRIES = Format(signed=False)


@dataclass(frozen=True)
class Parameters:
    """A frozen observer.

    Attributes:
        scale: The scale.
        zero_point: Its zero point.
        format: The format of the codes.
        entries: What the codes are looked up in before they are decoded, uint8 [256]; None where the mapping is linear.
    """

    scale: Tensor
    zero_point: Tensor
    format: Format
    entries: Tensor | None = None


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
        CalibrationError: If it never saw data, or no histogram of it, where a table has to be fitted; the text names
            the place.
    """
    if state.format.mapping.is_linear:
        return Parameters(*state.parameters(), state.format)
    scale, table = value_table(state)
    return Parameters(
        scale, torch.full_like(scale, ENTRIES.middle, dtype=torch.int32), ENTRIES, nearest_entries(table)
    )


def value_table(state: ObserverState) -> tuple[Tensor, Tensor]:
    """Return scale and table of values whose mapping is not linear: what was learned, or what fits.

    Of a histogram, what is left open in the mapping, and the scale, are those of the least squared error; a range
    alone is covered.

    Shapes: scale []; table int8 [2**bits].
    """
    low, high = state.range()
    if isinstance(state, LearnedState) and state.table is not None:
        return state.scale, state.table
    if isinstance(state, HistogramState):
        seen = state.histogram.counts > 0
        fitted = fit(
            state.histogram.centers()[seen], state.format, "mse", state.histogram.counts[seen].double()
        )
        return fitted.scale, fitted.table
    if not state.format.mapping.is_known:
        raise state.error(
            "a table cannot be fitted to a range alone",
            seen=f"mapping={state.format.mapping}",
            expected="a histogram of the values, or a mapping that is known, such as tanh@2 or nf",
            next_step="observe with histogram-mse",
        )
    return scale_from_range(low, high, ENTRIES)[0], state.format.mapping.table(state.format.bits)


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
