"""Simulation: running an observed program as it will be once its observers are frozen.

Every `observe` becomes the fake quantization that it will freeze to. Operators run in graph order, each
over all batches before the next begins; so a caller can change what an operator made before anything
depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.program import Program
from sqcompile.progress import Progress
from sqcompile.quantization import affine
from sqcompile.quantization.observed import (
    Parameters,
    freeze,
    observer_name,
    state_of,
    value_observers,
    weight_observers,
)
from sqcompile.quantization.stored import weight_scale, weight_tensor

OnValues = Callable[[fx.Node, list[Any]], list[Any]]
"""Takes a node and its values, one a batch; returns the values to go on with."""


class Simulation:
    """An observed program, run with the parameters that its observers freeze to.

    Args:
        program: A program of level `OBSERVED`; it is only read.

    Raises:
        CalibrationError: If an observer never saw data.
        InputError: If a weight is not finite.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._last_use = _last_uses(program.graph)
        frozen: dict[str, Parameters] = {}
        self._values: dict[fx.Node, Parameters] = {}
        for node in value_observers(program):
            name = observer_name(node)
            if name not in frozen:
                frozen[name] = freeze(state_of(program, node))
            self._values[node] = frozen[name]
        self._weights: dict[fx.Node, Tensor] = {}
        for node, layers in weight_observers(program).items():
            format = state_of(program, node).format
            weight = weight_tensor(program, layers[0])
            self._weights[node] = _fake_quantize(weight, Parameters(*weight_scale(weight, format), format))

    def run(self, batches: Sequence[Sequence[Any]], on_values: OnValues, *, progress: Progress) -> None:
        """Run all batches side by side.

        Memory: the values of all batches that are alive at one place of the graph.

        Args:
            batches: Flat inputs.
            on_values: Called behind every operator.
            progress: Shows how far it is.
        """
        values: dict[fx.Node, list[Any]] = {}
        for index, node in enumerate(self._program.placeholders):
            values[node] = [batch[index] for batch in batches]
        steps = list(self._program.compute_nodes())
        with torch.no_grad():
            for node in progress.track(steps, "correcting biases"):
                computed = [self._compute(node, values, position) for position in range(len(batches))]
                values[node] = on_values(node, computed)
                for spent in self._last_use.get(node, ()):
                    values.pop(spent, None)

    def peak_bytes(self, batch: Sequence[Any]) -> int:
        """Return the most bytes that one batch's values take at one place of the graph."""
        sizes: dict[fx.Node, int] = {}
        peak = 0
        values: dict[fx.Node, list[Any]] = {
            node: [value] for node, value in zip(self._program.placeholders, batch, strict=True)
        }
        with torch.no_grad():
            for node in self._program.compute_nodes():
                values[node] = [self._compute(node, values, 0)]
                sizes[node] = _size_bytes(values[node][0])
                peak = max(peak, sum(sizes.values()))
                for spent in self._last_use.get(node, ()):
                    values.pop(spent, None)
                    sizes.pop(spent, None)
        return peak

    def _compute(self, node: fx.Node, values: dict[fx.Node, list[Any]], position: int) -> Any:
        if node in self._weights:
            return self._weights[node]

        def load(argument: fx.Node) -> Any:
            if argument.op == "get_attr":
                return self._program.tensor(argument).detach()
            return values[argument][position]

        args: Any
        kwargs: Any
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), load)
        if node in self._values:
            return _fake_quantize(args[0], self._values[node])
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _fake_quantize(value: Tensor, parameters: Parameters) -> Tensor:
    format = parameters.format
    axis, group_size = format.granularity.pair
    return affine.fake_quantize(
        value, parameters.scale, parameters.zero_point, axis, group_size, format.qmin, format.qmax
    )


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return for each node the values that nothing reads after it."""
    last: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for value in _spent(node, seen):
            last.setdefault(node, []).append(value)
            seen.add(value)
    return last


def _spent(node: fx.Node, seen: set[fx.Node]) -> Iterable[fx.Node]:
    own = [] if node in seen else [node]  # a result that nobody reads
    return [*own, *(value for value in node.all_input_nodes if value not in seen)]


def _size_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(map(_size_bytes, value))
    return 0
