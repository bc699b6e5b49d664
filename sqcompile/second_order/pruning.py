"""Pruning layer after layer, by a choice that knows the Hessian of each layer's inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sqcompile.executor import Pending
from sqcompile.layers import Layer
from sqcompile.pipeline.context import PassContext
from sqcompile.program import Program
from sqcompile.pruning import PrunableWeight, choose_layers, prunable_weights, set_mask
from sqcompile.rewrite import Rewriter
from sqcompile.second_order.allocation import Allocation, allocate
from sqcompile.second_order.hessian import Hessian
from sqcompile.second_order.layers import obstacle, visit_layers
from sqcompile.sparsity import Pattern


@dataclass(frozen=True)
class Pruned:
    """What became of a weight, seen as a matrix.

    Attributes:
        mask: What is kept, [O, K].
        weight: The new weight [O, K]; None if it has not changed.
        remark: What its layer's owner should know, or None.
    """

    mask: Tensor
    weight: Tensor | None = None
    remark: str | None = None


Choose = Callable[[PrunableWeight, float], Callable[[Hessian], Pruned]]
"""Takes a weight and its sparsity; returns what prunes it, given the Hessian of its inputs. That is a piece of work
for an executor: it holds tensors, and no graph."""


@dataclass(frozen=True)
class Share:
    """How many weights go, and from where.

    Attributes:
        sparsity: Of all weights together; None where the pattern says it.
        by: How layers share them.
        spread: How far the sparsity of a layer may be from that of all.
    """

    sparsity: float | None
    by: Allocation = "uniform"
    spread: float = 0.08


def prune_layers(
    edit: Rewriter,
    context: PassContext,
    choose: Choose,
    *,
    share: Share,
    pattern: Pattern,
    layers: Sequence[str],
    exclude: Sequence[str],
    max_bytes: int,
    with_dense: bool,
    where: str,
) -> dict[str, float]:
    """Prune the selected linear layers and convolutions in graph order, each on data that went through those before it.

    Args:
        edit: Edits the program once all layers are decided.
        context: Holds the calibration data; told about each layer that is left as it is, and why.
        choose: Says how a weight is pruned.
        share: How many weights go, and from where.
        pattern: The pattern that the masks will have.
        layers: Patterns of the layers to prune.
        exclude: Patterns of layers to leave as they are.
        max_bytes: Memory for the values of all batches at one place of the graph, in bytes.
        with_dense: Whether the Hessians need the inputs of the dense program too.
        where: Who asks, for errors.

    Returns:
        The sparsity of each weight that lost something, by layer.

    Raises:
        SelectionError: If a pattern matches no layer.
        InputError: If a weight is not finite.
        CalibrationError: If there is no data, or a layer's inputs are not finite.
    """
    program = edit.program
    chosen = [
        layer
        for layer in choose_layers(program, layers, exclude, (), where=where)
        if _has_hessian(program, layer, context)
    ]
    found = prunable_weights(program, chosen, pattern, context.remark)
    weights = {weight.layer.node: weight for weight in found}
    results: list[tuple[PrunableWeight, Tensor, Tensor | None]] = []
    sparsities = allocate(
        program,
        found,
        context,
        by=share.by,
        sparsity=share.sparsity or 0.0,
        spread=share.spread,
        max_bytes=max_bytes,
    )

    def visit(layer: Layer, hessian: Hessian) -> Pending[Tensor]:
        weight = weights[layer.node]

        def keep(pruned: Pruned) -> Tensor:
            if pruned.remark is not None:
                context.remark(layer.node, pruned.remark)
            mask = weight.from_matrix(pruned.mask)
            if not weight.removes(mask):
                return weight.dense
            value = None if pruned.weight is None else weight.from_matrix(pruned.weight)
            results.append((weight, mask, value))
            return (weight.tensor if value is None else value) * mask

        return context.executor.submit(choose(weight, sparsities[weight.name]), hessian).then(keep)

    visit_layers(
        program,
        [weight.layer for weight in found],
        visit,
        context,
        max_bytes=max_bytes,
        purpose="pruning layers",
        with_dense=with_dense,
    )
    sparsity = {}
    for weight, mask, value in results:
        if value is not None:
            edit.replace_tensor(weight.layer.weight, value)
        set_mask(edit, weight, mask, pattern)
        sparsity[weight.layer.name] = 1.0 - float(mask.sum()) / mask.numel()
    return sparsity


def _has_hessian(program: Program, layer: Layer, context: PassContext) -> bool:
    reason = obstacle(program, layer, convolutions=True)
    if reason is not None:
        context.remark(layer.node, f"is not pruned: {reason}")
    return reason is None
