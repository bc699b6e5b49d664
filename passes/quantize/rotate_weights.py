"""Rotate what passes between layers, so that no channel of it stands out."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from sqcompile.layers import Layer, layer_of
from sqcompile.levels import Level
from sqcompile.matching import tensor_users
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter, set_bias
from sqcompile.rotation import Rotation, hadamard_rotation, has_hadamard, mean_keeping_rotation
from sqcompile.spaces import NormScale, Space, residual_spaces, value_spaces


class RotateWeights(Pass):
    """Multiply weights with Hadamard matrices, so that values between layers have no channels that stand out.

    A few channels of a language model's residual stream, and some of the values of its attention, are far larger
    than the others; rounded with one scale, the others keep no digits. An orthogonal matrix Q spreads each
    channel over all: layers that write the stream get W Q, those that read it Qᵀ W, and sums and RMS norms in between
    commute with it, once the weights of norms are folded into the layers behind them. LayerNorm subtracts the mean:
    Q then is a random rotation that keeps the mean. Only weights change: the function stays, and costs nothing more.

    Shapes: x [..., n] -> x Q, Q = diag(±1) H / √n; values of attention [..., heads · n] -> each head times Q.
    Rewrites: weights (and biases, tables of positions) of embeddings and linear layers, rotated;
        weights of norms  ==>  1, biases of norms  ==>  0, folded into the layers behind them;
        a weight tied to the embedding behind a norm with a weight gets a tensor of its own.
    Keeps: close(rtol=1e-4): rotated in float64, stored as float32; norms add up other numbers.
    Rejects: streams that anything else reads or writes: an output of the model, a norm whose scaled values go on
        (norms behind the layers, as in BERT and Gemma 2), layers that are not linear; weights that are masked,
        promised to be sparse, used elsewhere too, or not in float32.
    Raises: PassOptionError if nothing is to be rotated.
    Source: Ashkboos et al. 2024, arXiv 2404.00456 (QuaRot, what it fuses); Liu et al. 2024, arXiv 2405.16406
        (SpinQuant's R1 and R2, not learned).

    Attributes:
        residual: Rotate the residual stream.
        values: Rotate the values of attention, head by head.
        untie: Store a weight that embedding and head share twice where the norm before the head has a weight; else
            the stream of such a model stays as it is.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.close(rtol=1e-4, atol=1e-6)

    residual: bool = True
    values: bool = True
    untie: bool = True

    def __post_init__(self) -> None:
        if not self.residual and not self.values:
            raise self.reject_option("residual", "the residual stream, the values of attention, or both")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Fold the norms of each stream that can be rotated, then rotate it; then the values of attention."""
        edit = Rewriter(program, self.name)
        facts = {"residual": 0, "values": 0}
        if self.residual:
            chosen = self._rotatable(program, residual_spaces(program), context)
            for scale in [scale for space in chosen for scale in space.scales]:
                self._fold(edit, scale, context)
            # Found anew: what was folded has made biases, and weights of their own.
            starts = {space.start for space in chosen}
            for space in residual_spaces(program):
                if space.start in starts:
                    self._rotate(edit, space, context.seed + facts["residual"], context)
                    facts["residual"] += 1
        if self.values:
            for space in self._rotatable(program, value_spaces(program), context):
                self._rotate(edit, space, context.seed + 1000 + facts["values"], context)
                facts["values"] += 1
        return PassResult(edit.finish(), facts=facts)

    def _rotatable(self, program: Program, spaces: list[Space], context: PassContext) -> list[Space]:
        """Return the spaces that can be rotated, and say why the others cannot."""
        if not spaces:
            context.remark(
                "program", "has no channels that norms and sums, or attention, hand from layer to layer"
            )
        found = []
        for space in spaces:
            tied = next((name for scale in space.scales for name in _tied(program, scale)), None)
            if space.obstacle is not None:
                node, reason = space.obstacle
                context.remark(node, f"keeps %{space.start.name} from being rotated: {reason}")
            elif tied is not None and not self.untie:
                context.remark(
                    space.start, f"is not rotated: @{tied} would have to be stored twice (untie=false)"
                )
            elif not _is_open(space):
                context.remark(space.start, "is rotated already")
            else:
                found.append(space)
        return found

    def _fold(self, edit: Rewriter, scale: NormScale, context: PassContext) -> None:
        """Move the weight and the bias of a norm into the layers that read what it makes."""
        program = edit.program
        weight = program.tensor(scale.weight).detach().double()
        bias = None if scale.bias is None else program.tensor(scale.bias).detach().double()
        for known in scale.layers:
            layer = self._own(edit, known, context)
            old = program.tensor(layer.weight).detach()
            if bias is not None and bool(bias.any()):
                added = old.double() @ bias
                if layer.bias is not None:
                    added = added + program.tensor(layer.bias).detach().double()
                set_bias(edit, layer, added.to(old.dtype))
            edit.replace_tensor(layer.weight, (old.double() * weight).to(old.dtype))
        edit.replace_tensor(scale.weight, torch.ones_like(program.tensor(scale.weight)))
        if scale.bias is not None:
            edit.replace_tensor(scale.bias, torch.zeros_like(program.tensor(scale.bias)))
        for node in scale.values:
            node.meta["unscaled"] = (weight, bias)

    def _own(self, edit: Rewriter, layer: Layer, context: PassContext) -> Layer:
        """Give a layer a weight of its own, if others use it too."""
        program = edit.program
        users = tensor_users(program, layer.weight_name)
        if len(users) > 1:
            tensor = program.tensor(layer.weight).detach()
            context.remark(
                layer.node,
                f"@{layer.weight_name} is stored once more for '{layer.name}': the norm before it has a weight, which "
                f"the other users do not see; {tensor.numel() * tensor.element_size():,} bytes",
            )
            # Each keeps, or gets, the name that is its own.
            is_owner = layer.weight_name == f"{layer.name}.weight"
            moved = [user for user in users if (user is layer.node) != is_owner]
            first = layer_of(program, moved[0])
            assert first is not None
            copy = edit.constant(f"{first.name}.weight", nn.Parameter(tensor), like=moved[0])
            for user in moved:
                other = layer_of(program, user)
                assert other is not None and other.operator.weight is not None
                edit.set_argument(user, other.operator.weight, copy)
        found = layer_of(program, layer.node)
        assert found is not None
        return found

    def _rotate(self, edit: Rewriter, space: Space, seed: int, context: PassContext) -> None:
        rotation = self._rotation(space, seed, context)
        for name, axes in space.tensors.items():
            tensor = edit.program.tensor(name)
            for axis in sorted(axes):
                tensor = rotation.turn(tensor, axis)
            edit.replace_tensor(edit.read(name), tensor)
        for node in space.values:
            if node.op == "get_attr":
                continue
            weight, bias = node.meta.pop("unscaled", (None, None))
            edit.rotate(node, rotation if weight is None else rotation.after(1 / weight, bias))

    def _rotation(self, space: Space, seed: int, context: PassContext) -> Rotation:
        if space.keeps_mean:
            return mean_keeping_rotation(space.width, seed)
        if not has_hadamard(space.width):
            context.remark(
                space.start,
                f"is rotated partly at random: no Hadamard matrix of {space.width} is known here, only one of "
                f"{space.width & -space.width}",
            )
        return hadamard_rotation(space.width, seed)


def _is_open(space: Space) -> bool:
    """Whether a space can be rotated, and is not yet."""
    return space.obstacle is None and not any("rotated" in node.meta for node in space.values)


def _tied(program: Program, scale: NormScale) -> list[str]:
    """Return the weights behind a norm that others use too: they cannot take in its weight alone."""
    names = (layer.weight_name for layer in scale.layers)
    return [name for name in names if len(tensor_users(program, name)) > 1]
