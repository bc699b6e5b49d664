"""Comparing two programs layer by layer on the same inputs: where does the error come from?"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import fx

from sqcompile.errors import Error
from sqcompile.evaluate import run_watched
from sqcompile.layer_values import original_name
from sqcompile.layers import Layer, layer_of, layers_of
from sqcompile.metrics import Distance, DistanceMeter, distance
from sqcompile.program import Program
from sqcompile.text import locate

Watch = Callable[[Sequence[Any], Collection[fx.Node], Callable[[fx.Node, Any], None]], object]
"""Runs a program on flat inputs and hands over the values of some of its nodes, in graph order."""

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
        before: The same of what the layer takes in, or None if that is an input or not known.
    """

    name: str
    node: str
    place: str
    distance: Distance
    before: Distance | None = None

    @property
    def loss(self) -> float:
        """Noise that the layer adds to what reaches it, as a share of its output's power.

        The SQNR falls from layer to layer, as errors pile up; the loss is large where one is made.
        """
        if not self.distance.finite:
            return math.inf if self.before is None or self.before.finite else 0.0
        return max(0.0, self.distance.noise - (self.before.noise if self.before else 0.0))


def compare_layers(
    reference: Program,
    program: Program,
    batches: Iterable[Sequence[Any]],
    *,
    run_reference: Watch | None = None,
    run_program: Watch | None = None,
) -> list[LayerDistance]:
    """Compare the outputs of the layers of one program with the same values in another.

    Values are paired by node name; where a pass has put one node in another's place (a convolution for
    the batch norm that was folded into it), by the name of the node which it stands for. Where a
    pass has rescaled or rotated channels (`Rewriter.rescale`, `Rewriter.rotate`), that is undone. At most
    2¹⁸ evenly spaced elements of each value are compared, so that memory stays small.

    Args:
        reference: The program that is right, usually the one that was traced.
        program: The program to judge.
        batches: Flat inputs.
        run_reference: What runs the first program, such as a `WatchedSession` of it; None: PyTorch.
        run_program: What runs the second.

    Returns:
        One entry a layer, in graph order.
    """
    layers = layers_of(program)
    pairs = _counterparts(reference, program.compute_nodes())
    results = {layer.node: _result(layer, pairs) for layer in layers}
    feeding = {layer.node: _feeding(layer, pairs) for layer in layers}
    watched = [*results.values(), *feeding.values()]
    meters: dict[fx.Node, DistanceMeter] = {}

    def add(node: fx.Node, right: torch.Tensor, value: torch.Tensor) -> None:
        meters.setdefault(node, DistanceMeter()).add(right, value)

    run_reference = run_reference or partial(run_watched, reference)
    run_program = run_program or partial(run_watched, program)
    wanted = {node: pairs[node] for node in watched if node is not None and node in pairs}
    for batch in batches:
        _meet(run_reference, run_program, wanted, batch, add)
    found: dict[fx.Node | None, Distance] = {node: meter.result() for node, meter in meters.items()}
    return [
        LayerDistance(
            layer.name,
            layer.node.name,
            locate(layer.node),
            found[results[layer.node]],
            found.get(feeding[layer.node]),
        )
        for layer in layers
        if results[layer.node] in found
    ]


@dataclass(frozen=True)
class NamedLayer:
    """A layer of something that shows its values by their names.

    Attributes:
        name: Name of the layer.
        node: Name of its own value.
        place: Node, module path and source line, as far as they are known.
        values: Names of the values that it can be judged by, its own first; then those made from it alone, up to the
            next layer: a batch norm that the other side has folded, an activation that a runtime has fused.
    """

    name: str
    node: str
    place: str
    values: tuple[str, ...]


class NamedValues(Protocol):
    """Something that runs and shows its values, under the names of the traced model's nodes.

    A program is one (`ProgramValues`), and a file whose values have names. Values are handed over as they would be had
    no pass rescaled or rotated them.
    """

    def names(self) -> Collection[str]:
        """Return the names of the values that it can show."""
        ...

    def layers(self) -> list[NamedLayer]:
        """Return its layers, in order."""
        ...

    def show(
        self, inputs: Sequence[Any], names: Collection[str], on_value: Callable[[str, torch.Tensor], None]
    ) -> object:
        """Run on flat inputs, and hand over the floating-point values of these names."""
        ...


class ProgramValues:
    """A program's values by name.

    Args:
        program: The program.
        run: What runs it, such as a `WatchedSession` of it; None: PyTorch.
    """

    def __init__(self, program: Program, run: Watch | None = None) -> None:
        self._program = program
        self._run = run or partial(run_watched, program)
        self._nodes: dict[str, fx.Node] = {}
        # Where channels were rescaled or rotated, only layers say so, not what is between them.
        changed = any("rescaled" in node.meta or "rotated" in node.meta for node in program.compute_nodes())
        self._layers: list[NamedLayer] = []
        for layer in layers_of(program):
            nodes = [layer.node] if changed else list(self._behind(layer.node))
            for node in filter(_is_float, nodes):
                self._nodes.setdefault(original_name(node), node)
            names = tuple(original_name(node) for node in nodes)
            self._layers.append(NamedLayer(layer.name, layer.node.name, locate(layer.node), names))

    def names(self) -> Collection[str]:
        """Return the names of the traced nodes whose values layers, and what is made from them alone, have."""
        return self._nodes.keys()

    def layers(self) -> list[NamedLayer]:
        """Return its layers, in graph order."""
        return self._layers

    def show(
        self, inputs: Sequence[Any], names: Collection[str], on_value: Callable[[str, torch.Tensor], None]
    ) -> object:
        """Run on flat inputs, and hand over the values of these names."""
        wanted = {self._nodes[name]: name for name in names}

        def hand_over(node: fx.Node, value: Any) -> None:
            on_value(wanted[node], _undone(node, value))

        return self._run(inputs, wanted, hand_over)

    def _behind(self, node: fx.Node) -> Iterable[fx.Node]:
        """Yield a node, and those that are computed from it alone, up to the next layer."""
        while True:
            yield node
            users = list(node.users)
            if len(users) != 1 or layer_of(self._program, users[0]) is not None:
                return
            node = users[0]
            if node.op != "call_function" or sum(item.op != "get_attr" for item in node.all_input_nodes) > 1:
                return


def compare_named(
    reference: NamedValues, other: NamedValues, layers: Sequence[NamedLayer], batches: Iterable[Sequence[Any]]
) -> list[LayerDistance]:
    """Compare two things that show values by name, at the first value of each layer that both have.

    Args:
        reference: What is right.
        other: What to judge.
        layers: The layers of one of them.
        batches: Flat inputs.

    Returns:
        One entry a layer whose value both show in the same shape, in order.
    """
    both = set(reference.names()) & set(other.names())
    judged = {layer: next((name for name in layer.values if name in both), None) for layer in layers}
    wanted = {name for name in judged.values() if name is not None}
    meters: dict[str, DistanceMeter] = {}
    for batch in batches:
        kept: dict[str, tuple[torch.Size, torch.Tensor]] = {}

        def keep(name: str, value: torch.Tensor) -> None:
            kept[name] = value.shape, _sample(value)  # noqa: B023  (called before the next batch)

        def meet(name: str, value: torch.Tensor) -> None:
            shape, right = kept.get(name, (None, None))  # noqa: B023
            if right is not None and value.shape == shape:
                meters.setdefault(name, DistanceMeter()).add(right, _sample(value))

        reference.show(batch, wanted, keep)
        other.show(batch, wanted, meet)
    return [
        LayerDistance(layer.name, layer.node, layer.place, meters[name].result())
        for layer, name in judged.items()
        if name is not None and name in meters
    ]


def first_jump(
    before: Program,
    after: Program,
    batch: Sequence[Any],
    parted: Callable[[torch.Tensor, torch.Tensor], bool] | None = None,
) -> str | None:
    """Return the place of the first value, present in both programs, where they part clearly.

    Args:
        before: The program that is right.
        after: The program to judge.
        batch: Flat inputs.
        parted: Says of two values, right one first, whether they part; by default below 20 dB. Values
            that are not finite part in any case.
    """
    nodes = [node for node in after.compute_nodes() if _is_float(node)]
    found: list[fx.Node] = []

    def judge(node: fx.Node, right: torch.Tensor, value: torch.Tensor) -> None:
        if found:
            return
        apart = distance(right, value)
        if not apart.finite or (parted(right, value) if parted else apart.sqnr_db < 20):
            found.append(node)

    try:
        pairs = _counterparts(before, nodes)
        _meet(partial(run_watched, before), partial(run_watched, after), pairs, batch, judge)
    except Error:
        return None  # the new program cannot even be run
    return locate(found[0]) if found else None


def _counterparts(reference: Program, nodes: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Map nodes of another program to the nodes of the reference that have the same value."""
    known: dict[str, fx.Node] = {}
    for node in reference.compute_nodes():
        known.setdefault(original_name(node), node)
    pairs = {node: known.get(original_name(node)) for node in nodes}
    return {node: other for node, other in pairs.items() if other is not None}


def _result(layer: Layer, pairs: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Return the value that a layer is judged by: its own, or that of the batch norm which the reference has folded."""
    if layer.node not in pairs and len(layer.node.users) == 1:
        return next(iter(layer.node.users))
    return layer.node


def _feeding(layer: Layer, pairs: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
    """Return the nearest value before a layer that the reference has too; quantization is the layer's own."""
    node = layer.data
    while node is not None and node not in pairs:
        node = node.all_input_nodes[0] if node.all_input_nodes else None
    return node


def _meet(
    run_reference: Watch,
    run_program: Watch,
    pairs: dict[fx.Node, fx.Node],
    batch: Sequence[Any],
    on_pair: Callable[[fx.Node, torch.Tensor, torch.Tensor], None],
) -> None:
    """Run both programs and hand over samples of the paired values, in the order of `program`."""
    kept: dict[fx.Node, torch.Tensor] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            kept[node] = _sample(_undone(node, value))

    def meet(node: fx.Node, value: Any) -> None:
        other = kept.get(pairs[node])
        if other is None or not isinstance(value, torch.Tensor):
            return
        sample = _sample(_undone(node, value))
        if sample.shape == other.shape:
            on_pair(node, other, sample)

    run_reference(batch, set(pairs.values()), keep)
    run_program(batch, pairs, meet)


def _undone(node: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """Return a value as it would be had no pass rescaled or rotated its channels."""
    if "rescaled" in node.meta:
        value = value / node.meta["rescaled"]
    rotation = node.meta.get("rotated")
    # A pass that removed channels afterwards has left nothing to compare.
    return value if rotation is None or value.shape[-1] % rotation.size else rotation.undo(value)


def _sample(value: torch.Tensor) -> torch.Tensor:
    flat = value.detach().reshape(-1)
    step = -(-flat.numel() // _SAMPLE)
    # A step that shares a factor with the number of channels would never see some of them.
    while step > 1 and math.gcd(step, flat.numel()) > 1:
        step += 1
    return flat[::step].clone()


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
