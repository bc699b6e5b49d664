"""Running a program operator by operator, each over all batches before the next begins.

So a pass can look at what enters a layer, change the layer, and have everything behind it see the change,
in one run over the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.pipeline.context import PassContext
from sqcompile.program import Program

Read = Callable[[fx.Node], list[Any]]
"""Returns the values of an operator's argument, one a batch."""

After = Callable[[fx.Node, list[Any]], list[Any]]
"""Takes a node and its values, one a batch; returns the values to go on with."""


class Stepwise:
    """A program that is run step by step.

    Args:
        program: The program; it is only read.

    Attributes:
        steps: The operators, in the order in which they run.
        substitutes: Values to take instead of stored or computed ones, by node; may grow during a run.
        functions: What to compute instead of an operator, by node: a function of its first argument.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._last_use = _last_uses(program.graph)
        self.steps = list(program.compute_nodes())
        self.substitutes: dict[fx.Node, Tensor] = {}
        self.functions: Mapping[fx.Node, Callable[[Any], Any]] = {}

    def walk(
        self, batches: Sequence[Sequence[Any]], *, after: After | None = None
    ) -> Iterator[tuple[fx.Node, Read]]:
        """Run all batches side by side; yield each operator before it runs, and a way to read its arguments.

        Memory: the values of all batches that are alive at one place of the graph.

        Args:
            batches: Flat inputs.
            after: Called behind every operator.
        """
        values: dict[fx.Node, list[Any]] = {}
        for index, node in enumerate(self._program.placeholders):
            values[node] = [batch[index] for batch in batches]
        for node in self.steps:
            yield node, values.__getitem__
            with torch.no_grad():
                computed = [self._compute(node, values, position) for position in range(len(batches))]
            values[node] = computed if after is None else after(node, computed)
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
            for node in self.steps:
                values[node] = [self._compute(node, values, 0)]
                sizes[node] = _size_bytes(values[node][0])
                peak = max(peak, sum(sizes.values()))
                for spent in self._last_use.get(node, ()):
                    values.pop(spent, None)
                    sizes.pop(spent, None)
        return peak

    def batches(self, context: PassContext, max_bytes: int, purpose: str) -> list[Sequence[Any]]:
        """Return as many calibration batches as fit into memory while they advance together; at least one.

        Args:
            context: Holds the calibration data and the cap on memory; told if data is left out.
            max_bytes: Memory for the values of all batches at one place of the graph.
            purpose: What they are read for, for the progress bar.

        Raises:
            CalibrationError: If there is no calibration data.
        """
        budget = max_bytes if context.max_memory is None else min(max_bytes, context.max_memory // 2)
        found: list[Sequence[Any]] = []
        room = 0
        for batch in context.batches(purpose):
            if not found:
                room = budget // max(1, self.peak_bytes(batch))
            if found and len(found) >= room:
                context.remark("program", f"sees the first {len(found)} batches only: more exceed max-bytes")
                break
            found.append(batch)
        return found

    def _compute(self, node: fx.Node, values: dict[fx.Node, list[Any]], position: int) -> Any:
        if node in self.substitutes:
            return self.substitutes[node]

        def load(argument: fx.Node) -> Any:
            if argument in self.substitutes:
                return self.substitutes[argument]
            if argument.op == "get_attr":
                return self._program.tensor(argument).detach()
            return values[argument][position]

        args: Any
        kwargs: Any
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), load)
        if node in self.functions:
            return self.functions[node](args[0])
        return node.target(*args, **kwargs)  # type: ignore[operator]


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
