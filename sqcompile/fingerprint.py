"""A structural hash: two programs with the same hash are the same graph over the same tensors."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from sqcompile.program import Program


def fingerprint(program: Program) -> str:
    """Hash the graph, recorded types, level, observers and the identity and version of each tensor.

    Node names do not count; order, operators, arguments and tensors do. Tensors count by storage and
    version, not by content: they are immutable, so identity is enough, and weights are never read.
    """
    digest = hashlib.sha256()
    digest.update(str(program.level).encode())
    index: dict[fx.Node, int] = {}

    def describe(argument: Any) -> str:
        if isinstance(argument, fx.Node):
            return f"%{index[argument]}"
        if isinstance(argument, (list, tuple)):
            return "(" + ",".join(describe(item) for item in argument) + ")"
        if isinstance(argument, dict):
            return "{" + ",".join(f"{key}:{describe(item)}" for key, item in sorted(argument.items())) + "}"
        return repr(argument)

    for position, node in enumerate(program.graph.nodes):
        index[node] = position
        parts = [node.op, str(node.target) if node.op != "placeholder" else "", describe(node.args)]
        parts.append(describe(node.kwargs))
        parts.append(_describe_value(node.meta.get("val")))
        if node.op == "get_attr" and program.has_tensor(str(node.target)):
            parts.append(tensor_identity(program.tensor(node)))
        digest.update("|".join(parts).encode())
    for name, state in sorted(program.observers.items()):
        digest.update(f"{name}:{id(state)}:{state.count}".encode())
    return digest.hexdigest()[:16]


def tensor_identity(tensor: torch.Tensor) -> str:
    """Return storage, layout and version of a tensor; writing into it changes the version."""
    return f"{tensor.data_ptr()}:{tensor._version}:{tuple(tensor.shape)}:{tensor.stride()}:{tensor.dtype}"


def _describe_value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)}{value.dtype}"
    if isinstance(value, (list, tuple)):
        return ",".join(_describe_value(item) for item in value)
    return str(value)
