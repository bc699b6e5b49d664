"""Running a program operator by operator, each over all batches before the next begins.

So a pass can look at what enters a layer, change the layer, and have everything behind it see the change,
in one run over the data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.errors import Error
from sqcompile.evaluate import refused
from sqcompile.pipeline.context import PassContext
from sqcompile.program import Program
from sqcompile.shelf import Shelf, Shelved

Read = Callable[[fx.Node], Sequence[Any]]
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
        self._last_use = last_uses(program.graph)
        self.steps = list(program.compute_nodes())
        self.substitutes: dict[fx.Node, Tensor] = {}
        self.functions: Mapping[fx.Node, Callable[[Any], Any]] = {}

    def walk(
        self,
        batches: Iterable[Sequence[Any]],
        *,
        stops: Collection[fx.Node] | None = None,
        after: After | None = None,
        shelf: Shelf | None = None,
    ) -> Iterator[tuple[fx.Node, Read]]:
        """Run all batches side by side; yield each operator before it runs, and a way to read its arguments.

        With `stops` only these are yielded, and between two of them one batch after the other runs: then the
        values of all batches are kept only where it stops.

        Memory: the values of all batches that are alive at one place of the graph, or at a stop.

        Args:
            batches: Flat inputs.
            stops: Operators to stop before; None stops before every one.
            after: Called behind every operator; not together with stops.
            shelf: Where values are kept; None keeps them in memory.
        """
        shelf = shelf or Shelf(0)
        values = {node: Shelved(shelf) for node in self._program.placeholders}
        count = 0
        for batch in batches:
            count += 1
            for node, value in zip(self._program.placeholders, batch, strict=True):
                values[node].append(value)
        for run in _runs(self.steps, stops):
            if stops is None or run[0] in stops:
                yield run[0], values.__getitem__
            with torch.no_grad():
                self._advance(run, values, count, shelf, after)

    def _advance(
        self,
        run: Sequence[fx.Node],
        values: dict[fx.Node, Shelved],
        count: int,
        shelf: Shelf,
        after: After | None,
    ) -> None:
        """Compute some operators for all batches, and forget what nothing reads any more."""
        spent = {value for node in run for value in self._last_use.get(node, ())}
        made = {node: Shelved(shelf) for node in run if node not in spent}
        results: list[Any] = []
        for position in range(count):
            own: dict[fx.Node, Any] = {}
            for node in run:
                result = self._compute(node, own, values, position)
                own[node] = result
                for value in self._last_use.get(node, ()):
                    own.pop(value, None)
            if after is not None:
                results.append(result)
                continue
            for node, kept in made.items():
                kept.append(own[node])
            for value in spent:
                if value in values:
                    values[value].drop(position)
        if after is not None:
            (node,) = run
            for value in after(node, results):
                if node in made:
                    made[node].append(value)
        values.update(made)
        for value in spent:
            values.pop(value, None)

    def peak_bytes(self, batch: Sequence[Any]) -> int:
        """Return the most bytes that one batch's values take at one place of the graph."""
        sizes: dict[fx.Node, int] = {}
        peak = 0
        values: dict[fx.Node, Any] = dict(zip(self._program.placeholders, batch, strict=True))
        with torch.no_grad():
            for node in self.steps:
                values[node] = self._compute(node, values, {}, 0)
                sizes[node] = _size_bytes(values[node])
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
        budget = memory_for(context, max_bytes)
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

    def spilling_batches(self, context: PassContext, max_bytes: int, purpose: str) -> Iterable[Sequence[Any]]:
        """Return all calibration batches, read anew each time, if values that do not fit have a folder to go to.

        Without a work folder: as `batches`.
        """
        return (
            self.batches(context, max_bytes, purpose)
            if context.work_dir is None
            else _Batches(context, purpose)
        )

    def _compute(
        self,
        node: fx.Node,
        own: dict[fx.Node, Any],
        values: Mapping[fx.Node, Sequence[Any]],
        position: int,
    ) -> Any:
        """Compute an operator from what was computed beside it, and from the values of a batch."""
        if node in self.substitutes:
            return self.substitutes[node]

        def load(argument: fx.Node) -> Any:
            if argument in self.substitutes:
                return self.substitutes[argument]
            if argument.op == "get_attr":
                return self._program.tensor(argument).detach()
            if argument not in own:
                own[argument] = values[argument][position]
            return own[argument]

        args: Any
        kwargs: Any
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), load)
        if node in self.functions:
            return self.functions[node](args[0])
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except Error:
            raise
        except Exception as error:
            raise refused(node, error) from error


class _Batches:
    """Calibration batches that are read when they are asked for."""

    def __init__(self, context: PassContext, purpose: str) -> None:
        self._context = context
        self._purpose = purpose

    def __iter__(self) -> Iterator[Sequence[Any]]:
        return self._context.batches(self._purpose)


def memory_for(context: PassContext, max_bytes: int) -> int:
    """Return how many bytes the values of all batches may take."""
    return max_bytes if context.max_memory is None else min(max_bytes, context.max_memory // 2)


def dense_batches(context: PassContext, batches: Iterable[Sequence[Any]]) -> Iterable[Sequence[Any]]:
    """Return what the dense program gets where this one gets `batches`."""
    return batches if context.dense_calibration is None else context.dense_calibration


def _runs(steps: Sequence[fx.Node], stops: Collection[fx.Node] | None) -> list[list[fx.Node]]:
    """Return the steps in runs; each but the first begins at a stop."""
    runs: list[list[fx.Node]] = []
    for node in steps:
        if stops is None or node in stops or not runs:
            runs.append([])
        runs[-1].append(node)
    return runs


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
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
