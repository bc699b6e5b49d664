"""Masking the weights whose loss the others can make up for."""

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
from sqcompile.second_order import Hessian, inverse_factor, refit, sweep
from sqcompile.second_order.allocation import Allocation
from sqcompile.second_order.pruning import Pruned, Share, prune_layers
from sqcompile.second_order.sweep import chooser
from sqcompile.sparsity import Pattern


class SparseGPT(Pass):
    """Mask weights by what their loss costs the layer's outputs, and let the others make up for it.

    The layers are pruned in graph order, on calibration data that went through the pruned ones before
    them. The surviving weights change, so the program must not be pruned from another copy of the model.

    Shapes: weight [O, K]; its mask likewise, True where it is kept. A convolution's weight is a matrix over the
        Kh · Kw · I inputs under its kernel, input channels fastest.
    Rewrites: linear(x, @weight)  ==>  linear(x, mask(@weight', @weight_mask)).
    Keeps: interface().
    Rejects: layers that are neither linear nor convolutions without groups, or share their weight; weights whose
        sizes are no multiple of the pattern's.
    Raises: PassOptionError for options out of range; SelectionError for patterns that match no layer;
        InputError for weights, CalibrationError for inputs of layers that are NaN or infinite.
    Source: Frantar and Alistarh 2023, arXiv 2301.00774; the refit is the closed-form least-squares solution;
        `outliers`: Yin et al. 2023, arXiv 2310.05175.

    Attributes:
        sparsity: Fraction of each weight to zero, 0 ≤ s < 1. N:M patterns say it themselves.
        allocation: How layers share the zeros: `uniform`; `outliers`: blocks with many outstanding weights keep more;
            `sensitivity`: layers that lose less of their outputs lose more weights. Not with N:M patterns.
        spread: How far the sparsity of a layer may be from the whole's, where it is not uniform.
        pattern: `unstructured`, N of M along the inputs (`2:4`), or blocks of outputs × inputs (`1x4`).
        step: Columns that lose their share together; few, so that each is chosen after the others' changes.
        block: Columns whose changes are made at once; changes no result, only the time.
        damping: What is added to the Hessian's diagonal, as a share of its mean.
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
    step: int = 16
    block: int = 128
    damping: float = 0.001
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
        if self.step < 1 or self.step % max(self.pattern.m, self.pattern.columns, 1):
            raise self.reject_option("step", f"a multiple of the columns of the pattern {self.pattern}")
        if self.block < 1 or self.block % self.step:
            raise self.reject_option("block", f"a multiple of step, {self.step}")
        if not self.damping > 0:
            raise self.reject_option("damping", "a positive number")

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
        return partial(
            _prune,
            self,
            weight.matrix(weight.tensor),
            weight.kept_matrix,
            sparsity,
            where=f"layer '{weight.layer.name}'",
        )


def _prune(
    options: SparseGPT, weight: Tensor, kept: Tensor | None, sparsity: float, hessian: Hessian, *, where: str
) -> Pruned:
    dense = weight if kept is None else weight * kept
    factor, damping = inverse_factor(hessian.matrix, options.damping, where)
    swept = sweep(
        dense,
        factor,
        choose=chooser(options.pattern, sparsity),
        kept=kept,
        step=options.pattern.m or options.step,
        block=options.block,
    )
    assert swept.mask is not None
    value = refit(dense, swept.mask, hessian) if options.refit else swept.weight
    remark = None
    if damping > options.damping:
        remark = f"has a singular Hessian: damping {damping:g} instead of {options.damping:g}"
    return Pruned(swept.mask, value.to(weight.dtype), remark)
