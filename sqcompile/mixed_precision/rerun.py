"""Running the rest of a program again, with one value changed: what comes before it is computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.program import Program
from sqcompile.stepwise import last_uses


class Rerun:
    """A program on one batch, from any place of the graph on.

    Places are asked for in graph order, or nearly so: going back starts from the inputs again.

    Memory: the values that are alive at the place, and those of the run behind it.

    Args:
        program: The program; it is only read.
        batch: Flat inputs.
    """

    def __init__(self, program: Program, batch: Sequence[Any]) -> None:
        self._program = program
        self._steps = list(program.compute_nodes())
        self._places = {node: place for place, node in enumerate(self._steps)}
        self._last_uses = last_uses(program.graph)
        self._inputs = dict(zip(program.placeholders, batch, strict=True))
        self._alive: dict[fx.Node, Any] = dict(self._inputs)
        self._place = 0

    def outputs(
        self, node: fx.Node | None = None, changed: Mapping[fx.Node, Tensor] | None = None
    ) -> list[Any]:
        """Return the flat outputs, with other values for what a node takes.

        Args:
            node: Where the change is; None runs the whole program.
            changed: Values to take, by arguments of the node. Whoever else reads them behind the node does so too.
        """
        place = 0 if node is None else self._places[node]
        if place < self._place:
            self._alive, self._place = dict(self._inputs), 0
        self._run(self._steps[self._place : place], self._alive)
        self._place = place
        values = {**self._alive, **(changed or {})}
        (results,) = self._program.output.args
        self._run(self._steps[place:], values)
        return [self._load(item, values) if isinstance(item, fx.Node) else item for item in results]  # type: ignore[union-attr]

    def _run(self, steps: Sequence[fx.Node], values: dict[fx.Node, Any]) -> None:
        with torch.no_grad():
            for step in steps:
                args: Any
                kwargs: Any
                args, kwargs = fx.node.map_arg(
                    (step.args, step.kwargs), lambda argument: self._load(argument, values)
                )
                values[step] = step.target(*args, **kwargs)  # type: ignore[operator]
                for spent in self._last_uses.get(step, ()):
                    values.pop(spent, None)

    def _load(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node not in values and node.op == "get_attr":
            return self._program.tensor(node).detach()
        return values[node]
