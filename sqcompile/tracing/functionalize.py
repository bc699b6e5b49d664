"""Removing in-place operators, so that passes and backends see values only.

`relu_(x)` becomes `relu(x)`, and what read `x` afterwards reads the result. That is right where nothing
else shows the written memory: no view of it, made before, is read after. Elsewhere the caller falls
back on torch.export's own functionalization, which is general, but as slow as tracing itself, and
rewrites half of the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sqcompile.errors import TraceError
from sqcompile.infer import infer_node, same_type
from sqcompile.operators.table import argument
from sqcompile.text import locate

_aten = torch.ops.aten

# May return (a view of) an argument although their schemas do not say so.
_UNDECLARED_ALIASES = frozenset(
    {
        _aten.type_as.default,
        _aten._unsafe_view.default,
        _aten.meshgrid.default,
        _aten.meshgrid.indexing,
        _aten.einsum.default,
    }
)
_DROPOUTS = frozenset({_aten.dropout.default, _aten.feature_dropout.default, _aten.alpha_dropout.default})
# Tagged as possibly writing or aliasing because of their running statistics; the result is always new.
_FRESH = frozenset({_aten.batch_norm.default})


def remove_in_place(graph: fx.Graph, state: Collection[str], mode: FakeTensorMode) -> bool:
    """Replace in-place operators by the operators that return a new value.

    Args:
        graph: A flat graph; edited in place, even where the answer is False.
        state: Names of the model's parameters and buffers.
        mode: The fake mode of the recorded values.

    Returns:
        Whether none is left. False: the graph needs general functionalization.

    Raises:
        TraceError: If the model writes into a parameter or buffer; the text names the line.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not is_in_place(node):
            continue
        target, shown_by = _written(graph, node, order)
        _refuse_writes_to_state(node, shown_by, state)
        if any(order[user] > order[node] for other in shown_by - {target} for user in other.users):
            return False
        result = _out_of_place(graph, node, mode)
        if result is None:
            return False
        order[result] = order[node]
        node.replace_all_uses_with(result)
        target.replace_all_uses_with(result, delete_user_cb=_reads_after(order, result))
        graph.erase_node(node)
    return True


def fake_mode_in(graph: fx.Graph) -> FakeTensorMode:
    """Return the fake mode of a graph's recorded values, so that inferred ones share their symbols."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_in_place(node: fx.Node) -> bool:
    """Whether a node writes into its first argument."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def create_call(
    graph: fx.Graph,
    target: torch._ops.OpOverload,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> fx.Node:
    """Insert a call named as torch.export names it: `add_1`, where torch.fx would say `add_tensor_1`."""
    return graph.create_node("call_function", target, args, kwargs, name=target._schema.name.split("::")[1])


def refuse_mutated_state(module: fx.GraphModule, mutated: dict[str, str]) -> None:
    """Raise if torch.export's functionalization found writes into parameters or buffers.

    Args:
        module: The functional graph.
        mutated: Name of the output that holds the new value -> name of the parameter or buffer.

    Raises:
        TraceError: If there is one.
    """
    for output, name in mutated.items():
        node = next((node for node in module.graph.nodes if node.name == output), None)
        raise _state_error(name, None if node is None else locate(node))


def _reads_after(order: dict[fx.Node, int], result: fx.Node) -> Callable[[fx.Node], bool]:
    def replace(user: fx.Node) -> bool:
        return user is not result and order.get(user, -1) > order[result]

    return replace


def _written(graph: fx.Graph, node: fx.Node, order: dict[fx.Node, int]) -> tuple[fx.Node, set[fx.Node]]:
    """Return the value that an in-place operator writes into, and all that may share memory with it."""
    while True:
        target = node.args[0]
        assert isinstance(target, fx.Node)
        shown_by = _aliases(target, order, order[node])
        same = next((value for value in shown_by if _is_off_dropout(value)), None)
        if same is None:
            return target, shown_by
        # In eval mode dropout returns its argument itself; torch.export's functionalization forgets that.
        source = same.args[0]
        assert isinstance(source, fx.Node)
        same.replace_all_uses_with(source)
        graph.erase_node(same)


def _is_off_dropout(node: fx.Node) -> bool:
    return node.target in _DROPOUTS and argument(node, 2) is False


def _aliases(node: fx.Node, order: dict[fx.Node, int], end: int) -> set[fx.Node]:
    """Return the values, made before `end`, that may share memory with `node`; it is one of them."""
    found = {node}
    pending = [node]
    while pending:
        value = pending.pop()
        related = [
            *_aliased_arguments(value),
            *(user for user in value.users if value in _aliased_arguments(user)),
        ]
        for other in related:
            if other not in found and order[other] < end:
                found.add(other)
                pending.append(other)
    return found


def _aliased_arguments(node: fx.Node) -> list[fx.Node]:
    """Return the arguments whose memory the result of a node may share."""
    if node.op != "call_function":
        return []
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        declared = any(result.alias_info is not None for result in target._schema.returns)
        tagged = torch.Tag.maybe_aliasing_or_mutating in target.tags and target not in _FRESH
        if not declared and not tagged and target not in _UNDECLARED_ALIASES:
            return []
    return node.all_input_nodes  # getitem of a list of views, too


def _refuse_writes_to_state(node: fx.Node, shown_by: set[fx.Node], state: Collection[str]) -> None:
    for value in shown_by:
        if value.op == "get_attr" and str(value.target) in state:
            raise _state_error(str(value.target), locate(node))


def _state_error(name: str, where: str | None) -> TraceError:
    return TraceError(
        f"The model writes into its own tensor '{name}' while it runs.",
        where=where,
        seen="a parameter or buffer that changes from call to call",
        expected="a result that depends on the inputs alone",
        next_step="take the tensor as an input and return its new value, or stop updating it in eval mode",
    )


def _out_of_place(graph: fx.Graph, node: fx.Node, mode: FakeTensorMode) -> fx.Node | None:
    """Insert the operator that returns what `node` writes, or return None if there is no exact one."""
    assert isinstance(node.target, torch._ops.OpOverload)
    namespace, name = node.target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    operator = getattr(packet, node.target._overloadname, None)
    if not name.endswith("_") or operator is None or operator._schema.is_mutable:
        return None
    with graph.inserting_before(node):
        result = create_call(graph, operator, node.args, node.kwargs)
    result.meta = dict(node.meta)
    # Written in place, a value keeps its type and shape; out of place, a second tensor may promote or
    # broadcast it.
    written = node.args[0]
    assert isinstance(written, fx.Node)
    if len(node.all_input_nodes) == 1 or same_type(infer_node(result, mode), written.meta["val"]):
        return result
    graph.erase_node(result)
    return None
