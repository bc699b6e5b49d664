"""Masking the weights of least magnitude times activation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from torch import Tensor

from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.pruning import PrunableWeight
from sqcompile.rewrite import Rewriter
from sqcompile.second_order import Hessian, refit
from sqcompile.second_order.allocation import Allocation
from sqcompile.second_order.pruning import Pruned, Share, prune_layers
from sqcompile.sparsity import Pattern


class Wanda(Pass):
    """Mask the weights of least |w| · ‖x‖, output by output: x are the inputs that the weight multiplies.

    The layers are pruned in graph order, on calibration data that went through the pruned ones before
    them. Weights do not change unless `refit` is set.

    Shapes: weight [O, K]; its mask likewise, True where it is kept. A convolution's weight is a matrix over the
        Kh · Kw · I inputs under its kernel, input channels fastest.
    Rewrites: linear(x, @weight)  ==>  linear(x, mask(@weight, @weight_mask)).
    Keeps: interface().
    Rejects: layers that are neither linear nor convolutions without groups, or share their weight; weights whose
        sizes are no multiple of the pattern's.
    Raises: PassOptionError for options out of range; SelectionError for patterns that match no layer;
        InputError for weights, CalibrationError for inputs of layers that are NaN or infinite.
    Source: Sun et al. 2023, arXiv 2306.11695, equation 1; `outliers`: Yin et al. 2023, arXiv 2310.05175.

    Attributes:
        sparsity: Fraction of each output's weights to zero, 0 ≤ s < 1. N:M patterns say it themselves.
        allocation: How layers share the zeros: `uniform`; `outliers`: blocks with many outstanding weights keep more;
            `sensitivity`: layers that lose less of their outputs lose more weights. Not with N:M patterns.
        spread: How far the sparsity of a layer may be from the whole's, where it is not uniform.
        pattern: `unstructured`, N of M along the inputs (`2:4`), or blocks of outputs × inputs (`1x4`).
        refit: Solve for the surviving weights exactly, row by row; K³ / 3 operations a row.
        layers: Patterns of the layers to prune.
        exclude: Patterns of layers to leave as they are; `kind:head`: those that make the outputs.
        max_bytes: Memory for the values of all batches at one place of the graph, in bytes.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.interface()

    sparsity: float | None = None
    allocation: Allocation = "uniform"
    spread: float = 0.08
    pattern: Pattern = Pattern()
    refit: bool = False
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        mistake = self.pattern.sparsity_mistake(self.sparsity)
        if mistake is not None:
            raise self.reject_option("sparsity", mistake)
        if self.allocation != "uniform" and self.pattern.m:
            raise self.reject_option("allocation", f"uniform: the pattern {self.pattern} fixes the sparsity")
        if not 0 < self.spread < 1:
            raise self.reject_option("spread", "a fraction between 0 and 1")

    @property
    def local(self) -> bool:  # type: ignore[override]
        """Whether each layer is pruned by itself: to share zeros, all have to be compared."""
        return self.allocation == "uniform"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Prune layer after layer."""
        edit = Rewriter(program, self.name)
        sparsity = prune_layers(
            edit,
            context,
            self._pruning,
            share=Share(self.sparsity, self.allocation, self.spread),
            pattern=self.pattern,
            layers=self.layers,
            exclude=self.exclude,
            max_bytes=self.max_bytes,
            with_dense=self.refit,
            where=f"pass {self.name}",
        )
        return PassResult(changes=edit.finish(), facts={"sparsity": sparsity})

    def _pruning(self, weight: PrunableWeight, sparsity: float) -> Callable[[Hessian], Pruned]:
        return partial(_prune, self, weight.matrix(weight.tensor), weight.kept_matrix, sparsity)


def _prune(options: Wanda, weight: Tensor, kept: Tensor | None, sparsity: float, hessian: Hessian) -> Pruned:
    scores = weight.abs().float() * hessian.diagonal.sqrt()
    mask = options.pattern.mask_rows(scores, sparsity, kept)
    if kept is not None:
        mask = mask & kept
    if not options.refit:
        return Pruned(mask)
    dense = weight if kept is None else weight * kept
    return Pruned(mask, refit(dense, mask, hessian).to(weight.dtype))
