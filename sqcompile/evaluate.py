"""Evaluating parts of a program: constants, and values on the way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from sqcompile.program import Program


def constant_value(program: Program, node: fx.Node) -> torch.Tensor | None:
    """Return the value of a node that depends on stored tensors alone, or None if it depends on inputs."""
    cache: dict[fx.Node, Any] = {}

    def value(item: fx.Node) -> Any:
        if item in cache:
            return cache[item]
        if item.op == "get_attr":
            result: Any = program.tensor(item).detach()
        else:
            if item.op != "call_function":
                raise _NotConstantError
            args, kwargs = fx.node.map_arg((item.args, item.kwargs), value)
            with torch.no_grad():
                result = item.target(*args, **kwargs)  # type: ignore[operator]
        cache[item] = result
        return result

    try:
        result = value(node)
    except (_NotConstantError, KeyError, AttributeError):
        return None
    return result if isinstance(result, torch.Tensor) else None


def run_watched(
    program: Program,
    inputs: Sequence[Any],
    watched: Collection[fx.Node],
    on_value: Callable[[fx.Node, Any], None],
) -> list[Any]:
    """Run the program and hand over the values of the watched nodes as they are made.

    Values are freed as soon as their last user has run, so memory stays that of a plain run.

    Args:
        program: The program.
        inputs: Flat inputs.
        watched: Nodes of its graph whose values are wanted.
        on_value: Called with each watched node and its value; it must not keep or change the value.

    Returns:
        Flat outputs.
    """
    wanted = set(watched)

    class Watcher(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            if node in wanted:
                on_value(node, result)
            return result

    with torch.no_grad():
        return list(Watcher(program.graph_module, garbage_collect_values=True).run(*inputs))


class _NotConstantError(Exception):
    pass
