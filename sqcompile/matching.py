"""Small questions that patterns ask about nodes, each answered in one place."""

from __future__ import annotations

import torch
from torch import fx

from sqcompile.program import Program


def is_call(value: object, *targets: object) -> bool:
    """Whether a value is a node that calls one of the operators."""
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def is_mask(value: object) -> bool:
    """Whether a value is a masked weight."""
    return is_call(value, torch.ops.sqcompile.mask.default)


def is_returned(node: fx.Node) -> bool:
    """Whether a node's value is an output of the program."""
    return any(user.op == "output" for user in node.users)


def sole_user(node: fx.Node) -> fx.Node | None:
    """Return the only operator that uses a node; None if there are several, none, or it is returned."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    return None if user.op == "output" else user


def readers(program: Program, name: str) -> list[fx.Node]:
    """Return every node that reads the stored tensor of that name."""
    return [node for node in program.graph.nodes if node.op == "get_attr" and node.target == name]


def tensor_users(program: Program, name: str) -> list[fx.Node]:
    """Return every node that uses the stored tensor of that name, in graph order."""
    return [user for reader in readers(program, name) for user in reader.users]


def scalar_value(program: Program, value: object) -> float | int | None:
    """Return a number that is known: written in the graph, or stored as a buffer of one element.

    Parameters do not count, since training may change them.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if not isinstance(value, fx.Node) or value.op != "get_attr" or not program.has_tensor(str(value.target)):
        return None
    tensor = program.tensor(value)
    if tensor.numel() != 1 or tensor.dtype is torch.bool or isinstance(tensor, torch.nn.Parameter):
        return None
    number = tensor.item()
    return number if isinstance(number, (int, float)) else None


def users_text(node: fx.Node) -> str:
    """Say how a value is used, for remarks: `is returned`, or `has 2 users`."""
    if is_returned(node):
        return "is an output of the program"
    count = len(node.users)
    return f"has {count} user{'' if count == 1 else 's'}"
