"""Equalize the ranges of channels across consecutive layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqcompile.layers import Layer, layers_of, select_layers
from sqcompile.levels import Level
from sqcompile.operators.table import argument, operator_of, preserves_scale
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter
from sqcompile.text import operator_name

aten = torch.ops.aten

# f(s · x) = s · f(x) for s > 0, channel by channel. Pooling and padding are in the operator table.
_HOMOGENEOUS = frozenset({aten.relu.default, aten.leaky_relu.default, aten.dropout.default})
_SPATIAL = frozenset({"max_pool", "avg_pool", "pad", "resize"})
_LAYERS = frozenset({"linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))})


class EqualizeLayers(Pass):
    """Scale channels between two layers so that each has an equal range in both weights.

    With one scale a tensor, channels of small range have few codes left. Positively homogeneous
    functions (ReLU, pooling) let a channel be divided by s behind the first layer and multiplied by s in
    the second without changing the result. The s that makes channel i's range equal in both weights is
    s_i = √(r1_i / r2_i), and pairs influence each other, so they are visited until nothing moves.

    Shapes: weight 1 [O, …] with bias [O], weight 2 [P, O / groups, …]; r1, r2, s [O].
    Rewrites: weight 1, bias 1 divided by s; weight 2 multiplied by s.
    Keeps: close(rtol=1e-4): scaled in float64, stored as float32.
    Rejects: a result that goes to several operators or to one that is not homogeneous (fold batch norm
        first; `relax-clamps` turns ReLU6 into ReLU); weights or biases that several layers share.
    Source: Nagel et al. 2019, arXiv 1906.04721, section 4.1.

    Attributes:
        layers: Patterns of the layers whose outputs are equalized.
        exclude: Patterns of layers to leave alone.
        iterations: Visits to every pair at most.
    """

    requires = produces = Level.ATEN
    keeps = Keeps.close(rtol=1e-4, atol=1e-6)

    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    iterations: int = 20

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise self.reject_option("iterations", "at least 1")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Find the pairs, iterate over them, and replace the weights that moved."""
        layers = [layer for layer in layers_of(program) if layer.kind in _LAYERS]
        selected = select_layers(layers, self.layers, self.exclude, where=f"pass {self.name}")
        by_node = {layer.node: layer for layer in layers}
        pairs = [pair for layer in selected if (pair := _pair(layer, by_node, context.remark)) is not None]
        tensors = _Tensors(program)
        for _ in range(self.iterations):
            # Below 0.1 % a code of 8 bits no longer moves.
            if max((_equalize(pair, tensors) for pair in pairs), default=0.0) < 1e-3:
                break
        edit = Rewriter(program, self.name)
        for node, tensor in tensors.moved():
            edit.replace_tensor(node, tensor)
        return PassResult(edit.finish(), facts={"pairs": len(pairs)})


@dataclass(frozen=True)
class _Pair:
    """Two layers with only homogeneous operators in between.

    Attributes:
        first: The layer whose output channels are scaled.
        second: The layer whose input channels are.
        repeat: Inputs of the second for each channel of the first: more than 1 behind a flatten.
    """

    first: Layer
    second: Layer
    repeat: int


class _Tensors:
    """Weights and biases while they are scaled, in float64."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._values: dict[fx.Node, Tensor] = {}

    def __getitem__(self, node: fx.Node) -> Tensor:
        if node not in self._values:
            self._values[node] = self._program.tensor(node).detach().double()
        return self._values[node]

    def __setitem__(self, node: fx.Node, value: Tensor) -> None:
        self._values[node] = value

    def moved(self) -> list[tuple[fx.Node, Tensor]]:
        """Return the tensors that differ from the program's by more than rounding to float32."""
        found = []
        for node, value in self._values.items():
            old = self._program.tensor(node)
            new = value.to(old.dtype)
            if not torch.allclose(new, old, rtol=1e-3, atol=0.0):
                found.append((node, new))
        return found


def _pair(layer: Layer, layers: dict[fx.Node, Layer], remark: Callable[[fx.Node, str], None]) -> _Pair | None:
    """Follow a layer's output to the next layer; None, with a remark, where it cannot be scaled."""
    node = layer.node
    channels = _outputs(layer)
    while True:
        if len(node.users) != 1:
            return _reject(layer, remark, "its result goes to several operators")
        (user,) = node.users
        second = layers.get(user)
        if second is not None and second.data is node:
            break
        if not _homogeneous(user, node):
            return _reject(layer, remark, f"its result goes to {_name(user)}")
        node = user
    inputs = _inputs(second)
    if inputs % channels:
        return _reject(layer, remark, f"'{second.name}' takes {inputs} inputs, not channels")
    for tensor in (layer.weight, layer.bias, second.weight):
        if tensor is not None and (tensor.op != "get_attr" or len(tensor.users) != 1):
            return _reject(layer, remark, "a weight or bias of the pair is shared or computed")
    if second.node is layer.node or second.weight is layer.weight:
        return _reject(layer, remark, "a weight or bias of the pair is shared or computed")
    return _Pair(layer, second, inputs // channels)


def _reject(layer: Layer, remark: Callable[[fx.Node, str], None], reason: str) -> None:
    remark(layer.node, f"is not equalized: {reason}")


def _homogeneous(node: fx.Node, value: fx.Node) -> bool:
    """Whether a node scales with its input channel by channel, and leaves channels at axis 1, or last."""
    entry = operator_of(node)
    if node.op != "call_function" or argument(node, 0) is not value:
        return False
    if node.target in _HOMOGENEOUS:
        return True
    before, after = value.meta["val"], node.meta["val"]
    if node.target is aten.mean.dim:
        dims = argument(node, 1)
        return isinstance(dims, (list, tuple)) and all(dim % before.dim() > 1 for dim in dims)
    if entry is not None and entry.kind in _SPATIAL:
        return bool(before.dim() > 2) and (entry.kind != "pad" or preserves_scale(node) and _pads_space(node))
    if node.target in (aten.flatten.using_ints, aten.view.default, aten.reshape.default):
        # [N, C, …] -> [N, C · …]: every channel becomes a run of features.
        return bool(before.dim() > 2 and after.dim() == 2 and str(before.shape[0]) == str(after.shape[0]))
    return False


def _pads_space(node: fx.Node) -> bool:
    """Whether padding leaves batch and channels alone; `pad` lists two numbers an axis, from the last."""
    pads = argument(node, 1)
    return isinstance(pads, (list, tuple)) and len(pads) <= 2 * (node.meta["val"].dim() - 2)


def _equalize(pair: _Pair, tensors: _Tensors) -> float:
    """Equalize one pair; return by how much its scales moved: the largest |log s|."""
    first, second = pair.first, pair.second
    outputs = _by_output(tensors[first.weight], first)
    inputs = _by_input(tensors[second.weight], second)
    r1 = outputs.abs().amax(1)
    r2 = inputs.abs().amax(1).reshape(-1, pair.repeat).amax(1)
    scale = (r1 / r2).sqrt()
    # A channel that is zero in one of the weights says nothing, and stays.
    scale = torch.where((r1 > 0) & (r2 > 0), scale, torch.ones_like(scale))
    tensors[first.weight] = _from_output(outputs / scale[:, None], tensors[first.weight], first)
    tensors[second.weight] = _from_input(
        inputs * scale.repeat_interleave(pair.repeat)[:, None], tensors[second.weight], second
    )
    if first.bias is not None:
        tensors[first.bias] = tensors[first.bias] / scale
    moved = float(scale.log().abs().amax()) if scale.numel() else 0.0
    return moved if math.isfinite(moved) else 0.0


def _outputs(layer: Layer) -> int:
    return int(layer.node.meta["val"].shape[-1 if layer.kind == "linear" else 1])


def _inputs(layer: Layer) -> int:
    assert layer.data is not None
    return int(layer.data.meta["val"].shape[-1 if layer.kind == "linear" else 1])


def _by_output(weight: Tensor, layer: Layer) -> Tensor:
    """Return the weight as [outputs, everything else]."""
    return _grouped(weight, layer, layer.operator.out_axis)


def _by_input(weight: Tensor, layer: Layer) -> Tensor:
    """Return the weight as [inputs, everything else]."""
    return _grouped(weight, layer, layer.operator.in_axis)


def _from_output(matrix: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    return _ungrouped(matrix, weight, layer, layer.operator.out_axis)


def _from_input(matrix: Tensor, weight: Tensor, layer: Layer) -> Tensor:
    return _ungrouped(matrix, weight, layer, layer.operator.in_axis)


def _grouped(weight: Tensor, layer: Layer, axis: int) -> Tensor:
    """Return [channels along `axis` over all groups, rest]; axis 0 holds all of them, axis 1 those of a group."""
    if axis == 0:
        return weight.reshape(weight.shape[0], -1)
    split = weight.reshape(layer.groups, -1, *weight.shape[1:])
    return split.transpose(1, 2).reshape(layer.groups * weight.shape[1], -1)


def _ungrouped(matrix: Tensor, weight: Tensor, layer: Layer, axis: int) -> Tensor:
    if axis == 0:
        return matrix.reshape(weight.shape)
    rows = weight.shape[0] // layer.groups
    split = matrix.reshape(layer.groups, weight.shape[1], rows, *weight.shape[2:])
    return split.transpose(1, 2).reshape(weight.shape)


def _name(node: fx.Node) -> str:
    return "an output" if node.op == "output" else operator_name(node)
