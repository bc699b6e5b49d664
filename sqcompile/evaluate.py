"""Evaluating parts of a program: constants, and values on the way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from sqcompile.errors import Error, InputError
from sqcompile.program import Program
from sqcompile.text import locate


def constant_value(program: Program, node: fx.Node) -> torch.Tensor | None:
    """Return the value of a node that depends on stored tensors alone, or None if it depends on more.

    Inputs, random numbers and operators that write into their arguments all make a value no constant.
    """
    values: dict[fx.Node, Any] = {}
    for item in _ancestors(node) or ():
        if item.op == "get_attr":
            if not program.has_tensor(str(item.target)):
                return None
            values[item] = program.tensor(item).detach()
            continue
        args, kwargs = fx.node.map_arg((item.args, item.kwargs), values.__getitem__)
        with torch.no_grad():
            values[item] = item.target(*args, **kwargs)  # type: ignore[operator]
    result = values.get(node)
    return result if isinstance(result, torch.Tensor) else None


def constant_sources(node: fx.Node) -> list[fx.Node] | None:
    """Return the `get_attr` nodes that a constant is computed from, or None if it is no constant."""
    ancestors = _ancestors(node)
    return None if ancestors is None else [item for item in ancestors if item.op == "get_attr"]


def _ancestors(node: fx.Node) -> list[fx.Node] | None:
    """Return a constant node and all that it is computed from, arguments first; None if it is no constant.

    Without recursion: it is asked of any node, and graphs are thousands of nodes deep.
    """
    found: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        item = pending[-1]
        if item in found:
            pending.pop()
            continue
        if not _is_pure(item):
            return None
        missing = [argument for argument in item.all_input_nodes if argument not in found]
        pending += missing
        if not missing:
            found[item] = None
    return list(found)


def _is_pure(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return node.op == "call_function"
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


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

    Raises:
        InputError: If an operator refuses the values; the text names it.
    """
    wanted = set(watched)

    class Watcher(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            try:
                result = super().run_node(node)
            except Error:
                raise
            except Exception as error:
                raise refused(node, error) from error
            if node in wanted:
                on_value(node, result)
            return result

    with torch.no_grad():
        return list(Watcher(program.graph_module, garbage_collect_values=True).run(*inputs))


def explain_failure(program: Program, inputs: Sequence[Any], error: Exception) -> Error:
    """Return the error for a run that failed: runs again, node by node, to find where."""
    try:
        run_watched(program, inputs, (), lambda node, value: None)
    except Error as located:
        return located
    except Exception:  # before any node: another number of inputs than the program has
        pass
    return refused(None, error)


def refused(node: fx.Node | None, error: Exception) -> InputError:
    """Return the error for an operator that does not take its values, as tokens beyond the vocabulary."""
    # NumPy's numbers are float64 where nothing else is said; tracing does not see that the weights are not.
    mixed = "same dtype" in str(error)
    return InputError(
        "The program cannot run on these inputs.",
        where=None if node is None else locate(node),
        seen=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}",
        expected="inputs of the weights' element type"
        if mixed
        else "values that every operator takes, such as tokens below the size of the vocabulary",
        next_step="convert both to float32: the inputs with .float(), the model with model.float()"
        if mixed
        else "check the values of the inputs; the original model refuses them too",
    )
