"""Rounding the layers of a program one after the other, and storing their codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqcompile.executor import Pending
from sqcompile.layers import Layer, layers_of, select_layers, stored_weight
from sqcompile.pipeline.context import PassContext
from sqcompile.quantization.affine import Search
from sqcompile.quantization.format import Format
from sqcompile.quantization.scheme import Override, choose_formats, sites_of, weight_format
from sqcompile.quantization.stored import fit_decoding, store_weight, weight_tensor
from sqcompile.rewrite import Rewriter
from sqcompile.second_order.hessian import Hessian
from sqcompile.second_order.layers import obstacle, visit_layers
from sqcompile.second_order.rounding import Rounded

RoundLayer = Callable[[Layer, Format], Callable[[Hessian], Rounded]]
"""Takes a layer and its format; returns what rounds its weight, given the Hessian of its inputs. That is a piece of
work for an executor: it holds tensors, and no graph."""


@dataclass(frozen=True)
class Choice:
    """What is rounded, and to what.

    Attributes:
        weight: Format of weights.
        formats: Other formats, by pattern or `kind:…`.
        search: Of the scales of layers that are rounded to nearest.
        layers: Patterns of the layers to quantize.
        exclude: Patterns of layers to leave in floating point.
        obstacle: Says why a format cannot be rounded to with a Hessian, or returns None.
    """

    weight: Format
    formats: tuple[Override, ...]
    search: Search
    layers: Sequence[str]
    exclude: Sequence[str]
    obstacle: Callable[[Format], str | None]


def round_layers(
    edit: Rewriter,
    context: PassContext,
    choice: Choice,
    round_layer: RoundLayer,
    *,
    max_bytes: int,
    with_dense: bool,
    where: str,
    tell: Callable[[Layer, Rounded], None] = lambda layer, rounded: None,
) -> int:
    """Round the chosen layers in graph order, each on data that went through those before it, and store codes.

    Layers without a Hessian of their own (embeddings, convolutions, tied weights), and those of formats with
    an obstacle, are rounded to nearest.

    Args:
        edit: Edits the program once all layers are decided.
        context: Holds the calibration data; told about each layer that is treated otherwise, and why.
        choice: What is rounded, and to what.
        round_layer: Rounds a layer.
        max_bytes: Memory for the values of all batches at one place of the graph.
        with_dense: Whether the Hessians need the inputs of the dense program too.
        where: Who asks, for errors.
        tell: Told about each layer that `round_layer` has rounded.

    Returns:
        How many layers `round_layer` was asked about.

    Raises:
        SelectionError: If a pattern matches no layer.
        InputError: If a weight is not finite.
        CalibrationError: If there is no data, or a layer's inputs are not finite.
    """
    program = edit.program
    sites = [site for site in sites_of(program) if site.layer is not None]
    selected = {site.node for site in select_layers(sites, choice.layers, choice.exclude, where=where)}
    choices = choose_formats(sites, choice.weight, choice.formats, where=where)
    formats: dict[fx.Node, Format] = {}
    visited: list[Layer] = []
    for layer in layers_of(program):
        wanted = choices[layer.node]
        if layer.node not in selected or wanted is None:
            continue
        tensor = weight_tensor(program, layer)
        if tensor.dtype != torch.float32:
            context.remark(layer.node, f"stays in floating point: its weight is {tensor.dtype}")
            continue
        formats[layer.node], changed = weight_format(layer, wanted, tuple(tensor.shape))
        reason = obstacle(program, layer) or choice.obstacle(formats[layer.node])
        if reason is None:
            visited.append(layer)
        if reason is not None or changed is not None:
            context.remark(layer.node, reason or changed or "")
    results: dict[fx.Node, Rounded] = {}

    def visit(layer: Layer, hessian: Hessian) -> Pending[Tensor]:
        def keep(rounded: Rounded) -> Tensor:
            results[layer.node] = rounded
            tell(layer, rounded)
            return rounded.weight

        return context.executor.submit(round_layer(layer, formats[layer.node]), hessian).then(keep)

    visit_layers(
        program,
        visited,
        visit,
        context,
        max_bytes=max_bytes,
        purpose="quantizing layers",
        with_dense=with_dense,
    )
    stored: dict[tuple[fx.Node, Format], fx.Node] = {}
    for layer in layers_of(program):
        if layer.node in formats:
            _store(edit, layer, formats[layer.node], results.get(layer.node), stored, choice.search)
    if not edit.changes:
        context.remark("program", "has no layer to quantize")
    return len(visited)


def _store(
    edit: Rewriter,
    layer: Layer,
    format: Format,
    result: Rounded | None,
    stored: dict[tuple[fx.Node, Format], fx.Node],
    search: Search,
) -> None:
    value = layer.weight_value
    if (value, format) not in stored:
        weight = weight_tensor(edit.program, layer) if result is None else result.weight
        decoding = fit_decoding(weight, format, search) if result is None else result.decoding
        with edit.before(layer.node):
            node = store_weight(edit, value, layer.weight, weight, decoding, format)
        if result is not None and result.sparsity is not None:
            codes = stored_weight(node)
            assert codes is not None
            edit.program.sparsity[str(codes.target)] = result.sparsity
        stored[value, format] = node
    assert layer.operator.weight is not None
    edit.set_argument(layer.node, layer.operator.weight, stored[value, format])
