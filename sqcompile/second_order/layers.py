"""Visiting the layers of a program in order, each with the Hessian of the inputs that it will really get."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, fx

from sqcompile.errors import CalibrationError
from sqcompile.layers import Layer
from sqcompile.pipeline.context import PassContext
from sqcompile.program import Program
from sqcompile.second_order.hessian import Hessian
from sqcompile.stepwise import Read, Stepwise

Visit = Callable[[Layer, Hessian], Tensor]
"""Takes a layer and the Hessian of its inputs; returns the weight to go on with, in the weight's shape."""


def obstacle(program: Program, layer: Layer) -> str | None:
    """Say why a layer has no Hessian over its inputs, or return None.

    A Hessian belongs to a weight [O, K] that multiplies vectors of K inputs and has one user.
    """
    if layer.kind not in ("linear", "matmul"):
        return f"kind {layer.kind} has no Hessian over input channels"
    if layer.operator.out_axis != 0 or program.tensor(layer.weight).dim() != 2:
        return "its weight is not a matrix [O, K]; canonicalize-layers makes it one"
    if layer.data is None:
        return "it takes no data"
    users = [user for node in _readers(program, layer.weight) for user in node.users]
    if len(users) > 1:
        return "its weight has other users"
    return None


def visit_layers(
    program: Program,
    layers: Collection[Layer],
    visit: Visit,
    context: PassContext,
    *,
    max_bytes: int,
    purpose: str,
    with_dense: bool = False,
) -> None:
    """Visit layers in graph order, with calibration data that went through those already visited.

    Layers that read the same value, as q, k and v do, share a Hessian.

    Args:
        program: The program; it is only read.
        layers: Layers without an obstacle.
        visit: Decides about a layer.
        context: Holds the calibration data.
        max_bytes: Memory for the values of all batches at one place of the graph.
        purpose: What it is done for, for the progress bar.
        with_dense: Let the Hessians know the inputs of the unchanged program as well (`Hessian.cross`);
            takes twice the time and memory of a run.

    Raises:
        CalibrationError: If there is no data, or the inputs of a layer are not finite; the text names it.
    """
    chosen = {layer.node: layer for layer in layers}
    if not chosen:
        return
    changed, dense = Stepwise(program), Stepwise(program)
    share = max_bytes // 2 if with_dense else max_bytes
    batches = changed.batches(context, share, f"{purpose}: reading")
    waiting: dict[fx.Node, int] = {}
    for layer in layers:
        assert layer.data is not None
        waiting[layer.data] = waiting.get(layer.data, 0) + 1
    hessians: dict[fx.Node, Hessian] = {}
    wanted: Iterator[tuple[fx.Node, Read | None]]
    wanted = dense.walk(batches) if with_dense else ((node, None) for node in dense.steps)
    steps = zip(changed.walk(batches), wanted, context.progress.track(changed.steps, purpose), strict=False)
    for (node, read), (_, read_dense), _ in steps:
        if node not in chosen:
            continue
        layer = chosen[node]
        data = layer.data
        assert data is not None
        if data not in hessians:
            hessians[data] = _hessian(layer, read(data), read_dense(data) if read_dense else None)
        with torch.no_grad():
            changed.substitutes[layer.weight_value] = visit(layer, hessians[data])
        waiting[data] -= 1
        if not waiting[data]:
            del hessians[data]


def _hessian(layer: Layer, values: list[Tensor], wanted: list[Tensor] | None) -> Hessian:
    hessian = Hessian(values[0].shape[-1], values[0].device, f"layer '{layer.name}'")
    for index, value in enumerate(values):
        hessian.add(value, None if wanted is None else wanted[index])
    if hessian.count == 0:
        raise CalibrationError(
            "A layer never saw data.",
            where=f"layer '{layer.name}'",
            seen="0 inputs",
            expected="calibration batches that reach every layer",
            next_step="calibrate with data that reaches this layer, or exclude it",
        )
    return hessian


def _readers(program: Program, weight: fx.Node) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "get_attr" and node.target == weight.target]
