"""What a program cannot express, found in the traced graph: randomness and statistics of the batch."""

from __future__ import annotations

import torch
from torch import fx

from sqcompile.errors import TraceError
from sqcompile.operators.table import argument
from sqcompile.text import locate

# An operator draws no random numbers if one of these arguments has this value.
_OFF: tuple[tuple[str, object], ...] = (
    ("train", False),
    ("training", False),
    ("p", 0.0),
    ("dropout_p", 0.0),
    ("dropout", 0.0),
)


def refuse_random(graph: fx.Graph) -> None:
    """Raise if an operator draws random numbers; dropout that is switched off does not.

    Raises:
        TraceError: If there is one; the text names the model's line.
    """
    for node in graph.nodes:
        if _draws_random_numbers(node):
            raise TraceError(
                "The model draws random numbers when it runs.",
                where=locate(node),
                seen=str(node.target),
                expected="the same result for the same inputs",
                next_step="pass training=self.training to functional dropout, or take the numbers as an input; "
                "export a model after model.eval()",
            )


def refuse_running_statistics(graph: fx.Graph) -> None:
    """Raise if a batch norm normalizes by its batch and updates running statistics, even in eval mode.

    Raises:
        TraceError: If there is one; the text names the model's line.
    """
    for node in graph.nodes:
        if node.target is not torch.ops.aten.batch_norm.default:
            continue
        if argument(node, 5) and argument(node, 3) is not None:
            raise TraceError(
                "A batch norm normalizes by its batch and updates its running statistics.",
                where=locate(node),
                seen="batch_norm with training=True, which updates its running statistics",
                expected="batch_norm with its running statistics",
                next_step="pass training=self.training; export a model after model.eval()",
            )


def _draws_random_numbers(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    names = [parameter.name for parameter in target._schema.arguments]
    return not any(name in names and argument(node, names.index(name)) == value for name, value in _OFF)
