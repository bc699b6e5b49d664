"""Visiting the layers of a program in order, each with the Hessian of the inputs that it will really get."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.errors import CalibrationError
from sqcompile.executor import Pending
from sqcompile.layers import Layer
from sqcompile.pipeline.context import PassContext
from sqcompile.program import Program
from sqcompile.second_order.hessian import Hessian
from sqcompile.second_order.patches import enough_rows, geometry, has_patches, patches_of
from sqcompile.shelf import open_shelf
from sqcompile.stepwise import Stepwise, dense_batches, memory_for

Visit = Callable[[Layer, Hessian], Tensor | Pending[Tensor]]
"""Takes a layer and the Hessian of its inputs; returns the weight to go on with, in the weight's shape, or the
promise of one: layers that read the same value do not wait for each other."""


def obstacle(program: Program, layer: Layer, *, convolutions: bool = False) -> str | None:
    """Say why a layer has no Hessian over its inputs, or return None.

    A Hessian belongs to a weight [O, K] that multiplies vectors of K inputs and has one user. Convolutions have one
    where they are asked for: K are the inputs under the kernel, as `sparsity.as_matrix` orders them.

    Args:
        program: The program.
        layer: The layer.
        convolutions: Whether convolutions count.
    """
    if convolutions and has_patches(layer):
        pass
    elif convolutions and layer.groups > 1:
        return f"its inputs are divided into {layer.groups} groups"
    elif layer.kind not in ("linear", "matmul"):
        return f"kind {layer.kind} has no Hessian over input channels"
    elif layer.operator.out_axis != 0 or program.tensor(layer.weight).dim() != 2:
        return "its weight is not a matrix [O, K]; canonicalize-layers makes it one"
    if layer.data is None:
        return "it takes no data"
    if layer.weight_name in program.shared:
        return "its weight has other users"
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

    Layers that read the same value, as q, k and v do, share a Hessian, and are visited together; convolutions if
    the same of it lies under their kernels. Tokens of padding,
    which an input `attention_mask` hides, do not count. With a work folder, values that do not fit into memory
    lie there.

    Args:
        program: The program; it is only read.
        layers: Layers without an obstacle.
        visit: Decides about a layer.
        context: Holds the calibration data.
        max_bytes: Memory for the values of all batches at one place of the graph.
        purpose: What it is done for, for the progress bar.
        with_dense: Let the Hessians know the inputs of the unchanged program as well (`Hessian.cross`); takes
            twice the time and memory of a run.

    Raises:
        CalibrationError: If there is no data, or the inputs of a layer are not finite; the text names it.
    """
    groups: dict[Hashable, list[Layer]] = {}
    for layer in layers:
        kernel = program.tensor(layer.weight).shape[2:]
        groups.setdefault((layer.data, has_patches(layer) and geometry(layer, kernel)), []).append(layer)
    if not groups:
        return
    changed, dense = Stepwise(program), Stepwise(program)
    share = max_bytes // 2 if with_dense else max_bytes
    room = memory_for(context, share)
    batches = changed.spilling_batches(context, share, f"{purpose}: reading")
    tokens = [] if context.calibration is None else list(context.calibration.tokens())
    place = {node: index for index, node in enumerate(changed.steps)}
    readers = {
        min((layer.node for layer in group), key=place.__getitem__): group for group in groups.values()
    }
    stops = sorted(readers, key=place.__getitem__)
    with open_shelf(room, context.work_dir) as shelf, open_shelf(room, context.work_dir) as dense_shelf:
        walk = changed.walk(batches, stops=readers, shelf=shelf)
        beside = dense.walk(dense_batches(context, batches), stops=readers, shelf=dense_shelf)
        for node in context.progress.track(stops, purpose):
            _, read = next(walk)
            wanted = next(beside)[1] if with_dense else None
            data = readers[node][0].data
            assert data is not None
            kernel = program.tensor(readers[node][0].weight).shape[2:]
            hessian = _hessian(readers[node][0], kernel, read(data), wanted(data) if wanted else None, tokens)
            with torch.no_grad():
                weights = [visit(layer, hessian) for layer in readers[node]]
                for layer, weight in zip(readers[node], weights, strict=True):
                    changed.substitutes[layer.weight_value] = (
                        weight.result() if isinstance(weight, Pending) else weight
                    )


def _hessian(
    layer: Layer,
    kernel: Sequence[int],
    values: Sequence[Tensor],
    wanted: Sequence[Tensor] | None,
    tokens: Sequence[Tensor | None],
) -> Hessian:
    if has_patches(layer):
        most = enough_rows(values[0].shape[-len(kernel) - 1], kernel, len(values))
        values = _Patches(layer, kernel, values, most)
        wanted = None if wanted is None else _Patches(layer, kernel, wanted, most)
        tokens = ()
    first = values[0]
    hessian = Hessian(first.shape[-1], first.device, f"layer '{layer.name}'")
    for index, value in enumerate(values):
        dense = None if wanted is None else wanted[index]
        real = tokens[index] if index < len(tokens) else None
        if real is not None and value.shape[:-1] == real.shape:  # padding is nothing that the model will see
            value, dense = value[real], None if dense is None else dense[real]
        hessian.add(value, dense)
    if hessian.count == 0:
        raise CalibrationError(
            "A layer never saw data.",
            where=f"layer '{layer.name}'",
            seen="0 inputs",
            expected="calibration batches that reach every layer",
            next_step="calibrate with data that reaches this layer, or exclude it",
        )
    return hessian


class _Patches(Sequence[Tensor]):
    """The patches of each batch of values, computed when they are asked for."""

    def __init__(self, layer: Layer, kernel: Sequence[int], values: Sequence[Tensor], most: int) -> None:
        self._layer, self._kernel, self._values, self._most = layer, kernel, values, most

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return patches_of(self._layer, self._values[index], self._kernel, self._most)


def _readers(program: Program, weight: fx.Node) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "get_attr" and node.target == weight.target]
