"""Equalize the ranges of channels across consecutive layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from sqcompile.evaluate import run_watched
from sqcompile.layers import Layer, layers_of, select_layers
from sqcompile.levels import Level
from sqcompile.matching import tensor_users
from sqcompile.operators.table import argument, operator_of, preserves_scale
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.quantization.stored import weight_tensor
from sqcompile.rewrite import Rewriter
from sqcompile.text import operator_name

aten = torch.ops.aten

# f(s · x) = s · f(x) for s > 0, channel by channel. Pooling and padding are in the operator table.
_HOMOGENEOUS = frozenset({aten.relu.default, aten.leaky_relu.default, aten.dropout.default})
_SPATIAL = frozenset({"max_pool", "avg_pool", "pad", "resize"})
_LAYERS = frozenset({"linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))})

# Scales within 0.1 % of each other: a code of 8 bits does not move.
_SETTLED = 1e-3


class EqualizeLayers(Pass):
    """Scale channels between two layers so that those of small range keep codes enough.

    With one scale a tensor, the largest channel decides how coarsely all the others are rounded.
    Positively homogeneous functions (ReLU, pooling) let a channel be divided by s behind the first layer
    and multiplied by s in the second without changing the result, so s is free to choose:

    - `by=weights`: s_i = √(r1_i / r2_i) makes the range of channel i equal in both weights, for weights
      with one scale a tensor; no data is needed.
    - `by=values`: s_i = a_i^t / r2_i^(1-t) moves the share `strength` t of the unevenness of the values
      (a_i: the largest of channel i in calibration data) into the second weight, for weights with one
      scale a channel, which do not care how their outputs are scaled. A depthwise second layer takes all
      of it (t = 1): its channels have scales of their own.

    Pairs influence each other, so they are visited until nothing moves.

    Shapes: weight 1 [O, …] with bias [O], weight 2 [P, O / groups, …]; r1, r2, a, s [O].
    Rewrites: weight 1, bias 1 divided by s; weight 2 multiplied by s.
    Keeps: close(rtol=1e-4): scaled in float64, stored as float32.
    Rejects: a result that goes to several operators or to one that is not homogeneous (fold batch norms
        first; `relax-clamps` turns ReLU6 into ReLU); weights or biases that several layers share.
    Raises: CalibrationError if `by=values` has no data; InputError if a weight holds NaN or infinity.
    Source: Nagel et al. 2019, arXiv 1906.04721, section 4.1 (weights); Xiao et al. 2022, arXiv
        2211.10438, eq. 4 (values, for linear layers behind a norm).

    Attributes:
        by: What is equalized: `weights`, or `values` against the second weight.
        strength: With `by=values`, the share t of the unevenness that moves, 0 < t ≤ 1.
        layers: Patterns of the layers whose outputs are equalized.
        exclude: Patterns of layers to leave alone.
        iterations: Visits to every pair at most.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.close(rtol=1e-4, atol=1e-6)

    by: Literal["weights", "values"] = "weights"
    strength: float = 0.5
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    iterations: int = 100

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise self.reject_option("iterations", "at least 1")
        if not 0 < self.strength <= 1:
            raise self.reject_option("strength", "a share t, 0 < t ≤ 1")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Find the pairs, iterate over them, and replace the weights that moved."""
        layers = [layer for layer in layers_of(program) if layer.kind in _LAYERS]
        selected = select_layers(layers, self.layers, self.exclude, where=f"pass {self.name}")
        by_node = {layer.node: layer for layer in layers}
        pairs = []
        for layer in selected:
            pair = _find_pair(program, layer, by_node)
            if isinstance(pair, str):
                context.remark(layer.node, f"is not equalized: {pair}")
            else:
                pairs.append(pair)
        if not pairs:
            return PassResult()
        scaled = {
            layer.node: _Scaled(program, layer) for pair in pairs for layer in (pair.first, pair.second)
        }
        values = _largest_values(program, pairs, context) if self.by == "values" else None
        for _ in range(self.iterations):
            if max(self._visit(pair, scaled, values) for pair in pairs) < _SETTLED / 10:
                break
        edit = Rewriter(program, self.name)
        for item in scaled.values():
            item.store(edit)
        return PassResult(edit.finish(), facts={"pairs": len(pairs)})

    def _visit(
        self, pair: _Pair, scaled: dict[fx.Node, _Scaled], values: dict[fx.Node, Tensor] | None
    ) -> float:
        """Equalize one pair; return by how much its scales moved: the largest |log s|."""
        first, second = scaled[pair.first.node], scaled[pair.second.node]
        r2 = second.inputs().reshape(-1, pair.repeat).amax(1)
        if values is None:
            r1, share = first.outputs(), 0.5
        else:
            r1, share = values[pair.first.node], 1.0 if second.is_depthwise else self.strength
        # A channel that is always zero says nothing, and stays.
        counts = (r1 > 0) & (r2 > 0)
        if not bool(counts.any()):
            return 0.0
        log = share * r1.log() - (1 - share) * r2.log()
        # Only ratios between channels matter; centred, the numbers keep their magnitude.
        log = torch.where(counts, log - log[counts].mean(), torch.zeros_like(log))
        scale = log.exp()
        first.scale_outputs(1 / scale)
        second.scale_inputs(scale.repeat_interleave(pair.repeat))
        if values is not None:
            values[pair.first.node] = r1 / scale
        return float(log.abs().amax())


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


class _Scaled:
    """A layer while its channels are scaled: magnitudes and factors only, until `store`.

    Shapes: magnitudes [groups, outputs of a group, inputs of a group], kernels reduced to their largest.
    """

    def __init__(self, program: Program, layer: Layer) -> None:
        self._layer = layer
        weight_tensor(program, layer)  # refuses NaN and infinity, which scales would spread to other layers
        weight = program.tensor(layer.weight).detach().double()
        self._magnitudes = _by_channel(weight, layer).abs().amax(3)
        groups, outputs, inputs = self._magnitudes.shape
        self._outputs = torch.ones(groups, outputs, 1, dtype=torch.float64)
        self._inputs = torch.ones(groups, 1, inputs, dtype=torch.float64)

    @property
    def is_depthwise(self) -> bool:
        """Whether every input channel has outputs of its own."""
        return self._magnitudes.shape[0] > 1 and self._magnitudes.shape[2] == 1

    def outputs(self) -> Tensor:
        """Return the largest magnitude of each output channel, [outputs]."""
        return (self._magnitudes * self._inputs).amax(2).flatten() * self._outputs.flatten()

    def inputs(self) -> Tensor:
        """Return the largest magnitude of each input channel, [inputs]."""
        return (self._magnitudes * self._outputs).amax(1).flatten() * self._inputs.flatten()

    def scale_outputs(self, factor: Tensor) -> None:
        """Multiply the output channels."""
        self._outputs = self._outputs * factor.reshape(self._outputs.shape)

    def scale_inputs(self, factor: Tensor) -> None:
        """Multiply the input channels."""
        self._inputs = self._inputs * factor.reshape(self._inputs.shape)

    def store(self, edit: Rewriter) -> None:
        """Give the program the scaled weight and bias, if they moved."""
        if max(float(factor.log().abs().amax()) for factor in (self._outputs, self._inputs)) < _SETTLED:
            return
        layer = self._layer
        old = edit.program.tensor(layer.weight)
        channels = _by_channel(old.detach().double(), layer)
        factors = (self._outputs * self._inputs).unsqueeze(3)
        edit.replace_tensor(layer.weight, _as_weight(channels * factors, old.shape, layer).to(old.dtype))
        trailing = 0 if layer.kind == "linear" else layer.node.meta["val"].dim() - 2
        edit.rescale(layer.node, self._outputs.reshape(-1, *[1] * trailing))
        if layer.bias is not None:
            bias = edit.program.tensor(layer.bias)
            moved = bias.detach().double() * self._outputs.flatten()
            edit.replace_tensor(layer.bias, moved.to(bias.dtype))


def _find_pair(program: Program, layer: Layer, layers: dict[fx.Node, Layer]) -> _Pair | str:
    """Follow a layer's output to the next layer; where it cannot be scaled, return the reason."""
    node = layer.node
    while True:
        if len(node.users) != 1:
            return "its result goes to several operators"
        (user,) = node.users
        second = layers.get(user)
        if second is not None and second.data is node:
            break
        if not _is_homogeneous(user, node):
            return f"its result goes to {'an output' if user.op == 'output' else operator_name(user)}"
        node = user
    channels, inputs = _size(layer.node, layer), _size(node, second)
    if inputs % channels:
        return f"'{second.name}' takes {inputs} inputs, not {channels} channels"
    for tensor in (layer.weight, layer.bias, second.weight):
        if tensor is None:
            continue
        if tensor.op != "get_attr" or len(tensor_users(program, str(tensor.target))) != 1:
            return f"%{tensor.name} is computed, or used elsewhere too"
    return _Pair(layer, second, inputs // channels)


def _is_homogeneous(node: fx.Node, value: fx.Node) -> bool:
    """Whether a node scales with its input channel by channel, and leaves channels at axis 1, or last."""
    if node.op != "call_function" or argument(node, 0) is not value:
        return False
    if node.target in _HOMOGENEOUS:
        return True
    before, after, entry = value.meta["val"], node.meta["val"], operator_of(node)
    if node.target is aten.mean.dim:
        dims = argument(node, 1)
        return isinstance(dims, (list, tuple)) and all(dim % before.dim() > 1 for dim in dims)
    if entry is not None and entry.kind in _SPATIAL:
        return before.dim() > 2 and (entry.kind != "pad" or (preserves_scale(node) and _pads_space(node)))
    if node.target in (aten.flatten.using_ints, aten.view.default, aten.reshape.default):
        # [N, C, …] -> [N, C · …]: every channel becomes a run of features.
        return before.dim() > 2 and after.dim() == 2 and str(before.shape[0]) == str(after.shape[0])
    return False


def _pads_space(node: fx.Node) -> bool:
    """Whether padding leaves batch and channels alone; `pad` lists two numbers an axis, from the last."""
    pads = argument(node, 1)
    return isinstance(pads, (list, tuple)) and len(pads) <= 2 * (node.meta["val"].dim() - 2)


def _largest_values(program: Program, pairs: list[_Pair], context: PassContext) -> dict[fx.Node, Tensor]:
    """Return the largest magnitude of each channel between the layers of each pair, [channels]."""
    largest: dict[fx.Node, Tensor] = {}
    places = {pair.second.data: pair for pair in pairs if pair.second.data is not None}

    def see(node: fx.Node, value: Any) -> None:
        pair = places[node]
        axis = _axis(pair.second, value.dim())
        peaks = value.abs().amax([dim for dim in range(value.dim()) if dim != axis])
        peaks = peaks.double().reshape(-1, pair.repeat).amax(1)
        seen = largest.get(pair.first.node)
        largest[pair.first.node] = peaks if seen is None else torch.maximum(seen, peaks)

    for batch in context.batches("measuring channels"):
        run_watched(program, batch, places, see)
    return largest


def _size(value: fx.Node, layer: Layer) -> int:
    """Return the number of channels of a value that a layer makes or takes."""
    shape = value.meta["val"].shape
    return int(shape[_axis(layer, len(shape))])


def _axis(layer: Layer, rank: int) -> int:
    return rank - 1 if layer.kind == "linear" else 1


def _by_channel(weight: Tensor, layer: Layer) -> Tensor:
    """Return a weight as [groups, outputs of a group, inputs of a group, kernel]."""
    groups = layer.groups
    if layer.operator.out_axis == 0:
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).transpose(1, 2)


def _as_weight(channels: Tensor, shape: torch.Size, layer: Layer) -> Tensor:
    """Undo `_by_channel`."""
    ordered = channels if layer.operator.out_axis == 0 else channels.transpose(1, 2)
    return ordered.reshape(shape)
