"""Inlining the regions that torch.export wraps: `torch.no_grad()` and disabled autocast blocks.

A program is flat: passes and backends see one graph. Gradient mode means nothing to a deployed
model, and a disabled autocast block is what runs anyway, so both dissolve into their contents.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from sqcompile.errors import TraceError
from sqcompile.text import locate

# Name of the higher-order operator -> position of its graph among the arguments.
_WRAPPERS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}


def inline_regions(graph: fx.Graph, module: nn.Module) -> None:
    """Replace every wrapped region of `graph` by its contents, nested ones included.

    Args:
        graph: The graph; edited in place.
        module: Holds the regions' graph modules under their `get_attr` targets.

    Raises:
        TraceError: If autocast is enabled in a region: its types would be lost.
    """
    changed = True
    while changed:
        changed = False
        for node in list(graph.nodes):
            position = _WRAPPERS.get(getattr(node.target, "__name__", ""))
            if node.op == "call_function" and position is not None:
                _inline(graph, node, position, module)
                changed = True
    graph.lint()


def _inline(graph: fx.Graph, node: fx.Node, position: int, module: nn.Module) -> None:
    region_node = node.args[position]
    assert isinstance(region_node, fx.Node)
    region = module.get_submodule(str(region_node.target))
    assert isinstance(region, fx.GraphModule)
    if position == _WRAPPERS["wrap_with_autocast"] and node.args[2]:
        # The region itself has no line; its first operator has.
        inside = next((inner for inner in region.graph.nodes if inner.op == "call_function"), node)
        raise TraceError(
            "The model enables autocast inside.",
            where=locate(inside),
            seen=f"torch.autocast(device_type={node.args[0]!r}, dtype={node.args[1]})",
            expected="types written into the model",
            next_step="convert the model with model.to(dtype) and remove the autocast block",
        )
    operands = list(node.args[position + 1 :])
    copies: dict[fx.Node, Any] = {}
    with graph.inserting_before(node):
        for inner in region.graph.nodes:
            if inner.op == "placeholder":
                copies[inner] = operands.pop(0)
            elif inner.op == "output":
                results = inner.args[0]
            elif inner.op == "get_attr":
                copy = graph.get_attr(f"{region_node.target}.{inner.target}")
                copy.meta = dict(inner.meta)
                copies[inner] = copy
            else:
                copies[inner] = graph.node_copy(inner, lambda old: copies[old])
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(copies[results])
    else:
        values = [copies[item] if isinstance(item, fx.Node) else item for item in results]
        for user in list(node.users):
            index = user.args[1]
            assert isinstance(index, int)
            user.replace_all_uses_with(values[index])
            graph.erase_node(user)
    graph.erase_node(node)
    if not region_node.users:
        graph.erase_node(region_node)
