"""What the report's page draws beside figures: where weights are zero, chosen ranges, how the graph changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from sqcompile.evaluate import constant_value, run_watched
from sqcompile.layers import Layer, layers_of
from sqcompile.operators.table import argument
from sqcompile.pipeline.contract import Pass
from sqcompile.program import Program
from sqcompile.report import value_format
from sqcompile.sparsity import as_matrix
from sqcompile.text import module_path, program_text

_MAP_ROWS, _MAP_COLUMNS = 32, 64
_MAP_WEIGHTS = 1 << 24
"""Larger weights have no map: looking for their zeros again would take more time and memory than it tells."""

_LEAST_ZEROS = 0.2
"""Fewer zeros are those that any weight of few bits has."""

_BINS = 48
_GRAPH_LINES = 20_000
"""What the graphs of a report may have of different lines, so that it stays a file that a browser opens."""


@dataclass(frozen=True)
class ActivationRange:
    """Values that a program rounds to integers of a fixed scale, on the check batch.

    Attributes:
        name: The value's node, and behind it the path of the module that it was made in.
        format: Of the integers, such as `uint8`.
        low: Least value, or the range's end where that is less.
        high: Greatest value, or the range's end where that is more.
        counts: Values in equal bins from `low` to `high`.
        range_low: Least value that the integers reach.
        range_high: Greatest value that the integers reach.
        clipped: Fraction of the values beyond them.
    """

    name: str
    format: str
    low: float
    high: float
    counts: tuple[int, ...]
    range_low: float
    range_high: float
    clipped: float


@dataclass(frozen=True)
class Stage:
    """The graph at one time.

    Attributes:
        title: The pass that has just run, or `as traced`.
        lines: The lines of its text, as places in `GraphTexts.lines`.
    """

    title: str
    lines: tuple[int, ...]


@dataclass
class GraphTexts:
    """The texts of the graph as traced and after each pass that changed it; an instrument of the pass manager.

    Each line is kept once, since a pass changes few.

    Attributes:
        lines: All lines that any of the texts has.
        stages: The texts.
        full: Whether there were too many lines to keep all stages.
    """

    lines: list[str] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    full: bool = False

    def __post_init__(self) -> None:
        self._places = {line: place for place, line in enumerate(self.lines)}

    def __call__(self, item: Pass, before: Program, after: Program) -> None:
        """Keep the graph after a pass."""
        if not self.stages:
            self._keep("as traced", before)
        self._keep(f"after {item}", after)

    def _keep(self, title: str, program: Program) -> None:
        if self.full:
            return
        text = program_text(program).splitlines()
        self.full = len(self.lines) + sum(line not in self._places for line in text) > _GRAPH_LINES
        if self.full:
            return
        for line in text:
            if line not in self._places:
                self._places[line] = len(self.lines)
                self.lines.append(line)
        places = tuple(self._places[line] for line in text)
        if not self.stages or self.stages[-1].lines != places:
            self.stages.append(Stage(title, places))


def weight_maps(program: Program, zeros: Mapping[str, float]) -> dict[str, tuple[str, ...]]:
    """Return where the weights of layers are not zero, by name, for layers with many zeros.

    Each weight is a picture of at most 32 by 64 places, outputs from top to bottom, a digit each: 0 where all weights
    are zero, f where all are kept.

    Args:
        program: The compiled program.
        zeros: Fraction of the weights that is zero, by layer.
    """
    found: dict[str, tuple[str, ...]] = {}
    for layer in layers_of(program):
        stored = program.tensor(layer.weight)
        few = zeros.get(layer.name, 0.0) < _LEAST_ZEROS
        if few or layer.name in found or stored.dim() < 2 or stored.numel() > _MAP_WEIGHTS:
            continue
        kept = _kept(program, layer)
        if kept is not None:
            found[layer.name] = _map_of(kept)
    return found


def activation_ranges(program: Program, batch: Sequence[Any]) -> list[ActivationRange]:
    """Return the values that are rounded to integers of a fixed scale, with the range that those reach.

    Args:
        program: The compiled program.
        batch: Flat inputs of one call.
    """
    watched: dict[fx.Node, list[fx.Node]] = {}
    for node in program.compute_nodes():
        if node.target is torch.ops.sqcompile.quantize.default and _is_fixed(node):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            watched.setdefault(source, []).append(node)
    found: dict[fx.Node, ActivationRange] = {}

    def keep(source: fx.Node, value: Any) -> None:
        for node in watched[source]:
            item = _range_of(program, node, value)
            if item is not None:
                found[node] = item

    if watched:
        for placeholder, value in zip(program.placeholders, batch, strict=True):
            if placeholder in watched:
                keep(placeholder, value)
        computed = [node for node in watched if node.op == "call_function"]
        run_watched(program, batch, computed, keep)
    return [found[node] for node in program.compute_nodes() if node in found]


def _kept(program: Program, layer: Layer) -> torch.Tensor | None:
    """Return 1 where a layer's weight is kept, as a matrix [O, K]."""
    stored, value = program.tensor(layer.weight).detach(), layer.weight_value
    full = stored if value is layer.weight else constant_value(program, value)
    if full is None or full.shape != stored.shape:
        return None
    return (as_matrix(full, layer.operator.out_axis, layer.operator.in_axis) != 0).float()


def _map_of(kept: torch.Tensor) -> tuple[str, ...]:
    rows, columns = min(_MAP_ROWS, kept.shape[0]), min(_MAP_COLUMNS, kept.shape[1])
    share = torch.nn.functional.adaptive_avg_pool2d(kept[None], (rows, columns))[0]
    # Anything that is kept shows: the palest shade is for none.
    digits = torch.where(share > 0, (15 * share).round().clamp(min=1), 0).int().tolist()
    return tuple("".join(f"{digit:x}" for digit in row) for row in digits)


def _is_fixed(node: fx.Node) -> bool:
    scale, zero = node.args[1:3]
    stored = all(isinstance(item, fx.Node) and item.op == "get_attr" for item in (scale, zero))
    return stored and argument(node, 3) is None and argument(node, 4) is None


def _range_of(program: Program, node: fx.Node, value: Any) -> ActivationRange | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if not isinstance(value, torch.Tensor) or not value.numel():
        return None
    scale, zero = (float(program.tensor(item).flatten()[0]) for item in node.args[1:3])  # type: ignore[arg-type]
    qmin, qmax = argument(node, 5), argument(node, 6)
    assert isinstance(qmin, int) and isinstance(qmax, int)
    bottom, top = (qmin - zero) * scale, (qmax - zero) * scale
    values = value.detach().float().flatten()
    values = values[torch.isfinite(values)]
    if not values.numel():
        return None
    low, high = min(float(values.min()), bottom), max(float(values.max()), top)
    if not math.isfinite(high - low) or high <= low:
        return None
    counts = torch.histc(values, _BINS, low, high)
    # Half a step beyond the ends still rounds to them.
    beyond = (values < bottom - scale / 2) | (values > top + scale / 2)
    return ActivationRange(
        f"%{source.name}" + (f", {path}" if (path := module_path(source)) else ""),
        value_format(next(iter(node.users), node)),
        low,
        high,
        tuple(int(count) for count in counts.tolist()),
        bottom,
        top,
        float(beyond.float().mean()),
    )
