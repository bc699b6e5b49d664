"""Second step: activations become uint8.

ONNX Runtime's integer kernels for x86 take unsigned activations. Signed ones work, but both operands of a
product of two activations would be signed there, and such products saturate on CPUs without VNNI
(`saturation.py`). Moving codes and zero point by the same amount changes no value.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from sqcompile.backends.onnxruntime.selection.context import Context
from sqcompile.backends.onnxruntime.selection.values import (
    Mapping,
    as_dequantize,
    as_quantize,
    dynamic_scale_of,
)
from sqcompile.operators.table import Scales, argument, operator_of
from sqcompile.rewrite import Rewriter

aten = torch.ops.aten
sq = torch.ops.sqcompile


def make_unsigned(context: Context) -> None:
    """Shift every quantized activation of at most 8 bits with negative codes to codes from 0 on."""
    edit = context.edit
    done: set[fx.Node] = set()
    for node in list(edit.graph.nodes):
        mapping = as_quantize(node)
        if mapping is None or node in done or mapping.qmin >= 0 or mapping.bits > 8:
            continue
        group = _connected(node)
        if group is None:
            continue
        sources, moves, sinks = group
        done.update(sources)
        ranges = {
            (item.qmin, item.qmax)
            for item in (*map(as_quantize, sources), *map(as_dequantize, sinks))
            if item
        }
        if len(ranges) == 1:
            _shift(edit, sources, moves, sinks, -mapping.qmin)


def _connected(start: fx.Node) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]] | None:
    """Return the quantize nodes, the moving operators and the dequantize nodes that share codes.

    None if the codes reach anything else, such as an output of the program.
    """
    sources: list[fx.Node] = []
    moves: list[fx.Node] = []
    sinks: list[fx.Node] = []
    seen: set[fx.Node] = set()
    pending = [start]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if as_dequantize(node) is not None:
            sinks.append(node)
            pending.append(node.args[0])  # type: ignore[arg-type]
            continue
        if as_quantize(node) is not None:
            sources.append(node)
        elif _moves_codes(node):
            moves.append(node)
            pending.extend(item for item in node.all_input_nodes if _holds_codes(item))
        else:
            return None
        pending.extend(node.users)
    order = {node: index for index, node in enumerate(start.graph.nodes)}
    return tuple(sorted(items, key=order.__getitem__) for items in (sources, moves, sinks))  # type: ignore[return-value]


def _moves_codes(node: fx.Node) -> bool:
    entry = operator_of(node)
    if getattr(node.target, "__name__", "") == "getitem":
        return True  # of a chunk or a split
    return entry is not None and entry.scales in (Scales.PRESERVES, Scales.SHARES)


def _holds_codes(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int8, torch.uint8)


def _shift(
    edit: Rewriter, sources: list[fx.Node], moves: list[fx.Node], sinks: list[fx.Node], amount: int
) -> None:
    known: dict[fx.Node, fx.Node] = {}
    for node in sources:
        mapping = as_quantize(node)
        assert mapping is not None
        _replace_arguments(edit, node, mapping, amount, known)
    for node in moves:
        edit.infer(node)
    for node in sinks:
        mapping = as_dequantize(node)
        assert mapping is not None
        _replace_arguments(edit, node, mapping, amount, known)


def _replace_arguments(
    edit: Rewriter, node: fx.Node, mapping: Mapping, amount: int, known: dict[fx.Node, fx.Node]
) -> None:
    zero_point = _shifted_zero_point(edit, mapping, amount, known)
    scale = known.get(mapping.scale, mapping.scale)
    node.args = (
        mapping.source,
        scale,
        zero_point,
        mapping.axis,
        mapping.group_size,
        mapping.qmin + amount,
        mapping.qmax + amount,
    )
    node.kwargs = {}
    edit.infer(node)
    edit.changes += 1


def _shifted_zero_point(
    edit: Rewriter, mapping: Mapping, amount: int, known: dict[fx.Node, fx.Node]
) -> fx.Node:
    node = mapping.zero_point
    if node in known:
        return known[node]
    dynamic = dynamic_scale_of(mapping)
    if dynamic is not None:
        # A second scale operator, fitted to the new codes; its scale equals the first one's.
        x, axis, group_size, qmin, qmax, symmetric = (argument(dynamic, index) for index in range(6))
        assert isinstance(qmin, int) and isinstance(qmax, int)
        with edit.after(dynamic):
            pair = edit.call(
                sq.dynamic_scale.default,
                x,
                axis,
                group_size,
                qmin + amount,
                qmax + amount,
                symmetric,
                like=dynamic,
            )
            known[mapping.scale] = edit.call(operator.getitem, pair, 0, like=dynamic)
            known[node] = edit.call(operator.getitem, pair, 1, like=dynamic)
    elif node.op == "get_attr":
        moved = edit.program.tensor(node) + amount
        known[node] = edit.constant(f"{node.target}_unsigned", moved, like=node)
    else:
        with edit.after(node):
            known[node] = edit.call(aten.add.Tensor, node, amount, like=node)
    return known[node]
