"""Masking the weights of least magnitude times activation."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sqcompile.layers import Layer
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.pruning import PrunableWeight, choose_layers, prunable_weights, set_mask
from sqcompile.rewrite import Rewriter
from sqcompile.second_order import Hessian, refit
from sqcompile.second_order.layers import obstacle, visit_layers
from sqcompile.sparsity import Pattern


class Wanda(Pass):
    """Mask the weights of least |w| · ‖x‖, output by output: x are the inputs that the weight multiplies.

    The layers are pruned in graph order, on calibration data that went through the pruned ones before
    them. Weights do not change unless `refit` is set.

    Shapes: weight [O, K]; its mask likewise, True where it is kept.
    Rewrites: linear(x, @weight)  ==>  linear(x, mask(@weight, @weight_mask)).
    Keeps: interface().
    Rejects: layers that are not linear or share their weight; weights whose sizes are no multiple of the
        pattern's.
    Raises: PassOptionError for options out of range; SelectionError for patterns that match no layer;
        InputError for weights, CalibrationError for inputs of layers that are NaN or infinite.
    Source: Sun et al. 2023, arXiv 2306.11695, equation 1.

    Attributes:
        sparsity: Fraction of each output's weights to zero, 0 ≤ s < 1. N:M patterns say it themselves.
        pattern: `unstructured`, N of M along the inputs (`2:4`), or blocks of outputs × inputs (`1x4`).
        refit: Solve for the surviving weights exactly, row by row; K³ / 3 operations a row.
        layers: Patterns of the layers to prune.
        exclude: Patterns of layers to leave as they are.
        max_bytes: Memory for the values of all batches at one place of the graph, in bytes.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.interface()

    sparsity: float | None = None
    pattern: Pattern = Pattern()
    refit: bool = False
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        fixed = self.pattern.fixed_sparsity
        if fixed is None and self.sparsity is None:
            raise self.reject_option("sparsity", "a sparsity, or an N:M pattern such as 2:4")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise self.reject_option("sparsity", "a fraction s of weights to zero, 0 ≤ s < 1")
        if fixed is not None and self.sparsity not in (None, fixed):
            raise self.reject_option(
                "sparsity", f"nothing, or {fixed:g}: the pattern {self.pattern} fixes it"
            )

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Prune layer after layer."""
        chosen = []
        for layer in choose_layers(program, self.layers, self.exclude, (), where=f"pass {self.name}"):
            reason = obstacle(program, layer)
            if reason is None:
                chosen.append(layer)
            else:
                context.remark(layer.node, f"is not pruned: {reason}")
        found = prunable_weights(program, chosen, self.pattern, context.remark)
        weights = {weight.layer.node: weight for weight in found}
        results: list[tuple[PrunableWeight, Tensor, Tensor]] = []

        def visit(layer: Layer, hessian: Hessian) -> Tensor:
            weight = weights[layer.node]
            mask = self._mask(weight, hessian)
            if not weight.removes(mask):
                return weight.dense
            value = weight.tensor
            if self.refit:
                value = refit(weight.dense, mask, hessian).to(value.dtype)
            results.append((weight, value, mask))
            return value * mask

        layers = [weight.layer for weight in found]
        visit_layers(
            program,
            layers,
            visit,
            context,
            max_bytes=self.max_bytes,
            purpose="pruning layers",
            with_dense=self.refit,
        )
        edit = Rewriter(program, self.name)
        facts = {}
        for weight, value, mask in results:
            if self.refit:
                edit.replace_tensor(weight.layer.weight, value)
            set_mask(edit, weight, mask, self.pattern)
            facts[weight.layer.name] = 1.0 - float(mask.sum()) / mask.numel()
        return PassResult(changes=edit.finish(), facts={"sparsity": facts})

    def _mask(self, weight: PrunableWeight, hessian: Hessian) -> Tensor:
        scores = weight.tensor.abs().float() * hessian.diagonal.sqrt()
        mask = self.pattern.mask_rows(scores, self.sparsity or 0.0, weight.kept)
        return mask if weight.kept is None else torch.logical_and(mask, weight.kept)
