"""Comparing two programs layer by layer on the same inputs: where does the error come from?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sqcompile.evaluate import run_watched
from sqcompile.layers import layers_of
from sqcompile.metrics import Distance, DistanceMeter
from sqcompile.program import Program
from sqcompile.text import locate

# What a comparison keeps of one value: enough for stable figures, little enough for large models.
_SAMPLE = 1 << 18


@dataclass(frozen=True)
class LayerDistance:
    """Distance at one layer's output.

    Attributes:
        name: Name of the layer.
        node: Name of the node.
        place: Node, module path and source line.
        distance: Distance from the reference program's value at the same node.
    """

    name: str
    node: str
    place: str
    distance: Distance


def compare_layers(
    reference: Program, program: Program, batches: Iterable[Sequence[Any]]
) -> list[LayerDistance]:
    """Compare the outputs of the layers that both programs hold under the same node name.

    At most 2¹⁸ evenly spaced elements of each value are compared, so that memory stays small.

    Args:
        reference: The program that is right, usually the one that was traced.
        program: The program to judge.
        batches: Flat inputs.

    Returns:
        One entry a layer, in graph order.
    """
    names = {layer.node.name: layer.name for layer in layers_of(reference)}
    ours = {node.name: node for node in program.compute_nodes() if node.name in names}
    theirs = {node.name: node for node in reference.compute_nodes() if node.name in ours}
    return _compare(reference, program, theirs, ours, names, batches)


def first_jump(before: Program, after: Program, batch: Sequence[Any]) -> str | None:
    """Return the place of the first node, present in both programs, where values part clearly.

    A node counts when its SQNR is below 20 dB, or not finite, while all before it are above.
    """
    shared = {node.name: node for node in before.compute_nodes() if _is_float(node)}
    ours = {node.name: node for node in after.compute_nodes() if node.name in shared}
    theirs = {name: shared[name] for name in ours}
    try:
        rows = _compare(before, after, theirs, ours, {}, [batch])
    except (RuntimeError, ValueError, TypeError):
        return None  # the new program cannot even be run
    for row in rows:
        if not row.distance.finite or row.distance.sqnr_db < 20:
            return row.place
    return None


def _compare(
    reference: Program,
    program: Program,
    theirs: dict[str, fx.Node],
    ours: dict[str, fx.Node],
    names: dict[str, str],
    batches: Iterable[Sequence[Any]],
) -> list[LayerDistance]:
    meters: dict[str, DistanceMeter] = {}
    for batch in batches:
        kept: dict[str, torch.Tensor] = {}

        def keep(node: fx.Node, value: Any, kept: dict[str, torch.Tensor] = kept) -> None:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                kept[node.name] = _sample(value)

        def meet(node: fx.Node, value: Any, kept: dict[str, torch.Tensor] = kept) -> None:
            other = kept.pop(node.name, None)
            if other is None or not isinstance(value, torch.Tensor):
                return
            sample = _sample(value)
            if sample.shape == other.shape:
                meters.setdefault(node.name, DistanceMeter()).add(other, sample)

        run_watched(reference, batch, list(theirs.values()), keep)
        run_watched(program, batch, list(ours.values()), meet)
    return [
        LayerDistance(names.get(name, name), name, locate(node), meters[name].result())
        for name, node in ours.items()
        if name in meters
    ]


def _sample(value: torch.Tensor) -> torch.Tensor:
    flat = value.detach().reshape(-1)
    step = -(-flat.numel() // _SAMPLE)
    return flat[::step].clone() if step > 1 else flat.clone()


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
