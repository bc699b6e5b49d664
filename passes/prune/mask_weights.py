"""Masking the weights that matter least by their magnitude."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch

from sqcompile.layers import Layer, layers_of, select_layers
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.pruning import PrunableWeight, choose_layers, prunable_weights, set_mask
from sqcompile.rewrite import Rewriter
from sqcompile.sparsity import Cut, Pattern, removed_count

_KIND = "kind:"


class MaskWeights(Pass):
    """Mask the weights of least magnitude: they become zero, and stay zero through training.

    A mask is an operator between the stored weight and its layer. Training the program leaves masked
    weights without gradient and without effect; `ApplyMasks` makes the zeros final. Pruning again only
    adds zeros, so sparsity may grow step by step.

    Prune before `FoldBatchNorm`: a folded weight carries the scale of its channel, by which magnitudes
    of different channels do not compare. ResNet-20 with half of its weights (99.6 % dense, no training):
    96.9 % by layers and 97.4 % by a global threshold; pruned after folding 94.0 % and 63.2 %.

    Shapes: weight [O, I / groups, …]; its mask likewise, True where it is kept. Blocks and N:M groups
        lie in the weight as a matrix [O, Kh · Kw · I / groups], input channels fastest.
    Rewrites: layer(x, @weight)  ==>  layer(x, mask(@weight, @weight_mask)); a weight that several layers
        share gets one mask for all.
    Keeps: interface(): removing weights changes what the model computes.
    Rejects: a weight whose channels are no multiple of the pattern's; one shared with a layer that is
        not selected; one that is no floating-point number or is used outside of layers.
    Raises: PassOptionError for options that contradict each other or are out of range; SelectionError
        for patterns that match no layer; InputError for weights that are NaN or infinite.
    Source: Han et al. 2015 (magnitude); Mishra et al. 2021 (N:M).

    Attributes:
        sparsity: Fraction of each weight to zero (0 ≤ s < 1), rounded down to whole weights or blocks;
            with `scope=global` the fraction of all weights together. N:M patterns say it themselves.
        threshold: Instead of a fraction: keep what is larger than this; of a block, its mean by `norm`.
        pattern: `unstructured`, N of M along the input channels (`2:4`), or blocks of outputs × inputs
            (`1x4`, `16x4`).
        norm: How a block is scored: `l1`, the sum of magnitudes, or `l2`, the root of the sum of squares.
        scope: `layer`: the same fraction of every layer; `global`: one threshold for all, so that layers
            of small weights lose more.
        layers: Patterns of the layers to prune. Embeddings are pruned only if named exactly, or by kind.
        exclude: Patterns of layers to leave as they are; `kind:head`: those that make the outputs.
        kinds: Kinds of layers to prune (`linear`, `conv2d`); empty means all but embeddings.
        sparsities: Other fractions, by pattern or `kind:…`; of several that match, the last counts.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.interface()

    sparsity: float | None = None
    threshold: float | None = None
    pattern: Pattern = Pattern()
    norm: Literal["l1", "l2"] = "l1"
    scope: Literal["layer", "global"] = "layer"
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    sparsities: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        fixed = self.pattern.fixed_sparsity
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise self.reject_option("sparsity", "a fraction s of weights to zero, 0 ≤ s < 1")
        if any(not 0 <= value < 1 for _, value in self.sparsities):
            raise self.reject_option("sparsities", "fractions s of weights to zero, 0 ≤ s < 1")
        if self.threshold is not None and not (0 <= self.threshold < math.inf):
            raise self.reject_option("threshold", "a magnitude, 0 or more")
        if self.sparsity is not None and self.threshold is not None:
            raise self.reject_option("threshold", "none, since sparsity is given: either of both")
        if fixed is None:
            if self.sparsity is None and self.threshold is None and not self.sparsities:
                raise self.reject_option("sparsity", "a sparsity, a threshold, or an N:M pattern such as 2:4")
            return
        given = [self.sparsity, *(value for _, value in self.sparsities)]
        if any(value not in (None, fixed) for value in given):
            option = "sparsity" if self.sparsity not in (None, fixed) else "sparsities"
            raise self.reject_option(option, f"nothing, or {fixed:g}: the pattern {self.pattern} fixes it")
        if self.threshold is not None:
            raise self.reject_option("threshold", f"none: the pattern {self.pattern} fixes the sparsity")
        if self.scope == "global":
            raise self.reject_option("scope", f"layer: the pattern {self.pattern} is the same in every layer")

    @property
    def local(self) -> bool:  # type: ignore[override]
        """Whether layers are pruned each by itself: a threshold for all is one of the whole model."""
        return self.scope == "layer"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Choose weights, score them, and mask what scores least."""
        where = f"pass {self.name}"
        chosen = choose_layers(program, self.layers, self.exclude, self.kinds, where=where)
        if not chosen:
            context.remark("program", "has no layer to prune")
        wanted = self._sparsities(layers_of(program), where)
        weights = [
            weight
            for weight in prunable_weights(program, chosen, self.pattern, context.remark)
            if self._is_wanted(weight, wanted)
        ]
        edit = Rewriter(program, self.name)
        facts = {}
        masks = self._masks(weights, wanted)
        for weight in context.progress.track(weights, "masking weights"):
            mask = set_mask(edit, weight, next(masks), self.pattern)
            facts[weight.layer.name] = 1.0 - float(mask.sum()) / max(1, mask.numel())
            if not bool(mask.any()):
                context.remark(weight.layer.node, "has no weight left: all are below the threshold")
            elif bool(mask.all()) and wanted.get(weight.name, self.sparsity) != 0:
                context.remark(weight.layer.node, f"keeps all its weights: {self._why_none()}")
        return PassResult(changes=edit.finish(), facts={"sparsity": facts})

    def _why_none(self) -> str:
        if self.threshold is not None or self.scope == "global":
            return "none is below the threshold"
        return "they are too few for a part of them to go"

    def _sparsities(self, layers: Sequence[Layer], where: str) -> dict[str, float]:
        """Return the fractions that `sparsities` gives, by name of the weight."""
        found: dict[str, float] = {}
        for pattern, value in self.sparsities:
            if pattern.startswith(_KIND):
                matching = select_layers(layers, kinds=(pattern.removeprefix(_KIND),), where=where)
            else:
                matching = select_layers(layers, (pattern,), where=where)
            found |= {layer.weight_name: value for layer in matching}
        return found

    def _is_wanted(self, weight: PrunableWeight, wanted: dict[str, float]) -> bool:
        default = self.sparsity is not None or self.threshold is not None or self.pattern.m > 0
        return default or weight.name in wanted

    def _masks(self, weights: Sequence[PrunableWeight], wanted: dict[str, float]) -> Iterator[torch.Tensor]:
        """Yield a mask for each weight, in the weight's shape; one is in memory at a time."""
        cut = self._global_cut(weights, wanted)
        for weight in weights:
            scores, kept = self._scores(weight), None if weight.kept is None else weight.matrix(weight.kept)
            if weight.name in wanted:
                mask = self.pattern.mask(scores, wanted[weight.name], kept)
            elif cut is not None:
                removed, cut = cut.removed(self.pattern.block_scores(scores, kept))
                mask = self.pattern.expand(~removed)
            elif self.threshold is not None:
                threshold = self.threshold**2 if self._squares() else self.threshold
                mask = self.pattern.mask_by_threshold(scores, threshold)
            else:
                mask = self.pattern.mask(scores, self.sparsity or 0.0, kept)
            yield weight.from_matrix(mask)

    def _global_cut(self, weights: Sequence[PrunableWeight], wanted: dict[str, float]) -> Cut | None:
        """Return the one threshold for all weights without a fraction of their own."""
        if self.scope != "global" or self.sparsity is None:
            return None
        common = [weight for weight in weights if weight.name not in wanted]
        blocks = sum(weight.tensor.numel() for weight in common) // (self.pattern.rows * self.pattern.columns)

        def chunks() -> Iterator[torch.Tensor]:
            for weight in common:
                kept = None if weight.kept is None else weight.matrix(weight.kept)
                yield self.pattern.block_scores(self._scores(weight), kept)

        return Cut.find(chunks, removed_count(blocks, self.sparsity))

    def _scores(self, weight: PrunableWeight) -> torch.Tensor:
        """Return the matrix [O, K] whose sums over blocks order them as their norms do."""
        matrix = weight.matrix(weight.tensor).to(torch.float32)
        return matrix.square() if self._squares() else matrix.abs()

    def _squares(self) -> bool:
        """Whether scores are squares: of single weights they would only lose small ones to underflow."""
        return self.norm == "l2" and self.pattern.rows * self.pattern.columns > 1
