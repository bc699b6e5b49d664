"""Folding batch norms into the layers beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from sqcompile.evaluate import constant_value
from sqcompile.layers import Layer, layer_of
from sqcompile.levels import Level
from sqcompile.matching import is_mask, sole_user, tensor_users, users_text
from sqcompile.operators.table import argument
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program, value_of
from sqcompile.rewrite import Rewriter, set_bias
from sqcompile.text import operator_name

_BATCH_NORM = torch.ops.aten.batch_norm.default
_KINDS = frozenset(
    {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
)


@dataclass(frozen=True)
class _Affine:
    """What an inference batch norm computes: x · scale + shift.

    Attributes:
        scale: weight / sqrt(variance + eps), float64 [C].
        shift: bias - mean · scale, float64 [C].
    """

    scale: torch.Tensor
    shift: torch.Tensor


class FoldBatchNorm(Pass):
    """Fold inference batch norms into the convolution or linear before them, else into the one after.

    A folded batch norm costs nothing, and the layer's weight then is what it really multiplies with,
    which quantization ranges should see. Prune by magnitude before: see `MaskWeights`.

    Shapes: weight [O, I / groups, …], transposed [I, O / groups, …]; scale and shift [O] or [I].
    Rewrites: conv(x, w, b) -> batch_norm  ==>  conv(x, w · scale, b · scale + shift);
        batch_norm -> conv(x, w, b)  ==>  conv(x, w · scale, b + Σ w · shift), if nothing is padded.
        Transposed and grouped convolutions and linear alike. A masked weight stays masked.
    Keeps: close(rtol=1e-4): weights are folded in float64 and stored in their own type, so each layer
        rounds differently by an ulp or so, and that adds up with depth.
    Rejects: a value between both that has other users or is an output; a shared weight; a batch norm in
        training mode, with computed or bad statistics, or along another axis than the layer's
        channels; zero padding of a shifted input; growth beyond `max_growth`.
    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks …", section 3.2.

    Attributes:
        max_growth: Leave a batch norm whose largest |scale| is above this: it would widen the range of
            the weights so far that few bits cannot hold them. None folds all.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.close(rtol=1e-4, atol=1e-6)
    local: ClassVar[bool] = True

    max_growth: float | None = None

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Fold each batch norm, in graph order, where it can be."""
        if self.max_growth is not None and not self.max_growth > 0:
            raise self.reject_option("max_growth", "a factor > 0, or none")
        edit = Rewriter(program, self.name)
        for node in list(program.graph.nodes):
            if node.target is not _BATCH_NORM:
                continue
            reason = self._fold(edit, node)
            if reason is not None:
                context.remark(node, reason)
        return PassResult(changes=edit.finish())

    def _fold(self, edit: Rewriter, node: fx.Node) -> str | None:
        """Fold a batch norm, or say why not."""
        affine = _affine(edit.program, node)
        if isinstance(affine, str):
            return affine
        if self.max_growth is not None and float(affine.scale.abs().max()) > self.max_growth:
            return (
                f"it scales a channel by {float(affine.scale.abs().max()):.4g}, "
                f"and max-growth is {self.max_growth:g}"
            )
        before, after = _layer(edit.program, node.args[0]), _layer(edit.program, sole_user(node))
        if before is None and after is None:
            return f"there is no convolution or linear beside it: {_neighbours(node)}"
        reasons = []
        if before is not None:
            reason = _why_not_before(edit.program, before, node)
            reason = reason or _fold_into_layer_before(edit, before, node, affine)
            if reason is None:
                return None
            reasons.append(reason)
        if after is not None and after.data is node:
            reason = _why_not_after(edit.program, after, node, affine)
            reason = reason or _fold_into_layer_after(edit, after, node, affine)
            if reason is None:
                return None
            reasons.append(reason)
        return "; ".join(reasons)


def _affine(program: Program, node: fx.Node) -> _Affine | str:
    """Return what a batch norm computes, or why that is not known."""
    if argument(node, 5) is not False:
        return "it is in training mode: its scale depends on the batch"
    values = []
    for position, default in ((1, 1.0), (2, 0.0), (3, None), (4, None)):
        source = argument(node, position)
        if source is None and default is not None:
            values.append(torch.tensor([default], dtype=torch.float64))
        elif isinstance(source, fx.Node) and source.op == "get_attr":
            values.append(program.tensor(source).detach().to(torch.float64))
        else:
            return "its statistics or its scale are computed, not stored"
    weight, bias, mean, variance = values
    eps = argument(node, 7)
    assert isinstance(eps, (int, float))
    scale = (weight / torch.sqrt(variance + eps)).expand_as(mean)
    shift = (bias - mean * scale).expand_as(mean)
    if not bool(torch.isfinite(scale).all() and torch.isfinite(shift).all()):
        return "its statistics give a scale or shift that is not finite"
    return _Affine(scale, shift)


def _layer(program: Program, node: object) -> Layer | None:
    layer = layer_of(program, node) if isinstance(node, fx.Node) else None
    return layer if layer is not None and layer.kind in _KINDS else None


def _neighbours(node: fx.Node) -> str:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before = operator_name(source) if source.op == "call_function" else "an input"
    user = sole_user(node)
    after = operator_name(user) if user is not None else f"its value {users_text(node)}"
    return f"before it is {before}, after it {after}"


def _why_not_before(program: Program, layer: Layer, node: fx.Node) -> str | None:
    """Say why a batch norm cannot be folded into the layer before it, or return None."""
    if sole_user(layer.node) is not node:
        return f"the value of {layer.kind} %{layer.node.name} {users_text(layer.node)}"
    if not _is_channel_axis(program, layer, layer.node):
        return f"axis 1, which it scales, is not the axis of the channels of {layer.kind} %{layer.node.name}"
    if layer.bias is not None and layer.bias.op != "get_attr":
        return f"the bias of {layer.kind} %{layer.node.name} is computed, not stored"
    return _why_weight_must_stay(program, layer)


def _why_not_after(program: Program, layer: Layer, node: fx.Node, affine: _Affine) -> str | None:
    """Say why a batch norm cannot be folded into the layer after it, or return None."""
    name = f"{layer.kind} %{layer.node.name}"
    if not _is_channel_axis(program, layer, node):
        return f"axis 1, which it scales, is not the axis that {name} sums over"
    if layer.bias is not None and layer.bias.op != "get_attr":
        return f"the bias of {name} is computed, not stored"
    if bool((affine.shift != 0).any()):
        if layer.kind.startswith("conv_transpose"):
            return f"it shifts the input of {name}, whose outputs see different parts of the kernel"
        if layer.kind != "linear" and _pads(layer):
            return f"it shifts the input of {name}, which then pads with zeros"
    return _why_weight_must_stay(program, layer)


def _why_weight_must_stay(program: Program, layer: Layer) -> str | None:
    value = layer.weight_value
    chain = [value]
    while is_mask(value):
        assert isinstance(value.args[0], fx.Node)
        value = value.args[0]
        chain.append(value)
    if value is not layer.weight:
        return f"the weight of {layer.kind} %{layer.node.name} is computed, not stored"
    if any(len(item.users) > 1 for item in chain) or len(tensor_users(program, layer.weight_name)) > 1:
        return f"the weight @{layer.weight_name} of {layer.kind} %{layer.node.name} is shared"
    return None


def _is_channel_axis(program: Program, layer: Layer, node: fx.Node) -> bool:
    """Whether axis 1 of a layer's input or output, which batch norm works on, holds the channels."""
    rank = program.tensor(layer.weight).dim()  # 2 for linear: [N, C]; 4 for conv2d: [N, C, H, W]
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dim() == rank


def _pads(layer: Layer) -> bool:
    padding = argument(layer.node, 4)
    return any(size != 0 for size in padding) if isinstance(padding, (list, tuple)) else padding != 0


def _fold_into_layer_before(edit: Rewriter, layer: Layer, node: fx.Node, affine: _Affine) -> str | None:
    """Fold, or say why the result cannot be stored."""
    weight = edit.program.tensor(layer.weight).detach()
    scaled = (weight.to(torch.float64) * _along_outputs(affine.scale, layer, weight)).to(weight.dtype)
    bias = (_bias(edit.program, layer) * affine.scale + affine.shift).to(weight.dtype)
    if (reason := _why_not_stored(layer, scaled, bias)) is not None:
        return reason
    edit.replace_tensor(layer.weight, scaled)
    set_bias(edit, layer, bias)
    edit.replace(node, layer.node)
    edit.erase(node)
    return None


def _fold_into_layer_after(edit: Rewriter, layer: Layer, node: fx.Node, affine: _Affine) -> str | None:
    """Fold, or say why the result cannot be stored."""
    weight = edit.program.tensor(layer.weight).detach()
    masked = constant_value(edit.program, layer.weight_value)
    assert masked is not None
    shifts = bool((affine.shift != 0).any())
    scaled = (weight.to(torch.float64) * _along_inputs(affine.scale, layer, weight)).to(weight.dtype)
    shifted = masked.to(torch.float64) * _along_inputs(affine.shift, layer, weight)
    sums = shifted.sum(dim=[axis for axis in range(weight.dim()) if axis != layer.operator.out_axis])
    bias = (_bias(edit.program, layer) + sums).to(weight.dtype) if shifts else torch.zeros(())
    if (reason := _why_not_stored(layer, scaled, bias)) is not None:
        return reason
    edit.replace_tensor(layer.weight, scaled)
    if shifts:
        set_bias(edit, layer, bias)
    edit.set_argument(layer.node, layer.operator.data[0], node.args[0])
    edit.erase(node)
    return None


def _bias(program: Program, layer: Layer) -> torch.Tensor:
    if layer.bias is None:
        return torch.zeros((), dtype=torch.float64)
    return program.tensor(layer.bias).detach().to(torch.float64)


def _why_not_stored(layer: Layer, *tensors: torch.Tensor) -> str | None:
    if all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        return None
    return f"the weight or bias of {layer.kind} %{layer.node.name} would not be finite in {tensors[0].dtype}"


def _along_outputs(values: torch.Tensor, layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """Shape [O] so that it scales a weight by output channels."""
    return _along(values, layer, weight, layer.operator.out_axis)


def _along_inputs(values: torch.Tensor, layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """Shape [I] so that it scales a weight by input channels."""
    return _along(values, layer, weight, layer.operator.in_axis)


def _along(values: torch.Tensor, layer: Layer, weight: torch.Tensor, axis: int) -> torch.Tensor:
    """Shape values [C] so that they scale a weight along one axis.

    Where that axis holds only one group's share of the channels, the groups lie along the other.
    """
    other = layer.operator.in_axis if axis == layer.operator.out_axis else layer.operator.out_axis
    share, length = weight.shape[axis], weight.shape[other]
    if share == values.numel():
        table = values.reshape(1, share).expand(length, share)
    else:
        table = values.reshape(layer.groups, share).repeat_interleave(length // layer.groups, 0)
    shape = [1] * weight.dim()
    shape[axis], shape[other] = share, length
    ordered = table if other < axis else table.t()
    return ordered.reshape(shape)
