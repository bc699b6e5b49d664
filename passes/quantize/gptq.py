"""Round weights so that the layer's outputs change least."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from sqcompile.layers import Layer
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.pruning import choose_layers
from sqcompile.quantization.affine import Search
from sqcompile.quantization.format import Format, PerGroup
from sqcompile.quantization.scheme import Override
from sqcompile.quantization.stored import forget_unused_promises, promised, weight_tensor
from sqcompile.rewrite import Rewriter
from sqcompile.second_order import Hessian
from sqcompile.second_order.round_layers import Choice, round_layers
from sqcompile.second_order.rounding import Rounded, grid_obstacle, round_weight
from sqcompile.sparsity import Pattern

WEIGHT = Format(bits=4, signed=False, symmetric=False, granularity=PerGroup(32))


class GPTQ(Pass):
    """Store weights as codes, rounded column by column so that later columns make up for each error.

    The layers are quantized in graph order, on calibration data that went through the quantized ones
    before them. Scales are chosen for the weights as they were, so that columns may be treated in the
    order of their importance and yet keep their groups: the runtime needs no permutation. With a
    `sparsity` or an N:M `pattern`, one sweep prunes and rounds, each making up for the other.

    Layers without a Hessian of their own (embeddings, convolutions, tied weights) are rounded to nearest.

    Shapes: weight [O, K]: scale [O] a channel, [O, ceil(K / n)] a group of n.
    Rewrites: linear(%x, @weight)  ==>  linear(%x, dequantize(@codes)).
    Keeps: interface().
    Rejects: weights that are not float32 (remark).
    Raises: PassOptionError for options out of range; SelectionError for patterns that match no layer;
        InputError for weights, CalibrationError for inputs of layers that are NaN or infinite.
    Source: Frantar et al. 2023, arXiv 2210.17323; order and groups as its reference code's act-order with
        static groups; pruning as Frantar and Alistarh 2023, arXiv 2301.00774 ("joint sparsification and quantization").

    Attributes:
        weight: Format of weights: affine or symmetric, a scale a tensor, channel or group; or a mapping, whose
            table is fitted with the Hessian's diagonal as weights.
        search: Of scales: `minmax` covers every weight; `mse` has the least squared error; `half-quadratic`
            the least sum of a low power of the errors, which forgives outliers.
        act_order: Treat columns with large inputs first; not together with pruning.
        dense_targets: Fit to what the layer makes in the dense model, not to what it would make of the inputs
            that the layers before have changed; twice the time and memory of the runs over the data.
        damping: What is added to the Hessian's diagonal, as a share of its mean.
        sparsity: Fraction of each weight to zero in the same sweep, or None.
        pattern: `unstructured`, N of M along the inputs (`2:4`), or blocks of outputs × inputs (`1x4`).
        unpruned: Patterns of layers that are rounded, and lose nothing; `kind:head`: those that make the outputs.
        layers: Patterns of the layers to quantize.
        exclude: Patterns of layers to leave in floating point.
        formats: Other formats, by pattern or `kind:…`; `float` leaves the layer as it is.
        max_bytes: Memory for the values of all batches at one place of the graph, in bytes.
    """

    requires = Level.ATEN
    produces = Level.QDQ
    keeps: ClassVar[Keeps] = Keeps.interface()
    local: ClassVar[bool] = True

    weight: Format = WEIGHT
    search: Search = "mse"
    act_order: bool = True
    dense_targets: bool = True
    damping: float = 0.01
    sparsity: float | None = None
    pattern: Pattern = Pattern()
    unpruned: tuple[str, ...] = ()
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    formats: tuple[Override, ...] = ()
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        formats = [self.weight, *(choice for _, choice in self.formats if isinstance(choice, Format))]
        if any(format.dynamic for format in formats):
            raise self.reject_option(
                "weight", "a static format: a weight's scale is known when it is quantized"
            )
        if self._prunes or not self.pattern.is_unstructured:
            mistake = self.pattern.sparsity_mistake(self.sparsity)
            if mistake is not None:
                raise self.reject_option("sparsity", mistake)
        if not self.damping > 0:
            raise self.reject_option("damping", "a positive number")

    @property
    def _prunes(self) -> bool:
        return self.sparsity is not None or self.pattern.m > 0

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Choose formats, sweep the layers in order, and store their codes."""
        edit = Rewriter(program, self.name)
        pruned = set()
        if self._prunes:
            chosen = choose_layers(program, ("*",), self.unpruned, (), where=f"pass {self.name}")
            pruned = {layer.node for layer in chosen}
        swept = round_layers(
            edit,
            context,
            Choice(self.weight, self.formats, self.search, self.layers, self.exclude, grid_obstacle),
            lambda layer, format: self._rounding(program, layer, format, layer.node in pruned),
            max_bytes=self.max_bytes,
            with_dense=self.dense_targets,
            where=f"pass {self.name}",
            tell=lambda layer, rounded: self._tell(layer, rounded, context),
        )
        edit.finish()
        forget_unused_promises(program)
        return PassResult(edit.changes, facts={"swept": swept})

    def _rounding(
        self, program: Program, layer: Layer, format: Format, prunes: bool
    ) -> Callable[[Hessian], Rounded]:
        promise = promised(program, layer.weight_value, layer.weight)
        return partial(
            round_weight,
            weight_tensor(program, layer),
            format=format,
            search=self.search,
            act_order=self.act_order,
            damping=self.damping,
            sparsity=self.sparsity if prunes else None,
            pattern=self.pattern if prunes else Pattern(),
            kept=None if promise is None else promise.mask,
            where=f"layer '{layer.name}'",
        )

    def _tell(self, layer: Layer, rounded: Rounded, context: PassContext) -> None:
        if rounded.damping > self.damping:
            context.remark(
                layer.node, f"has a singular Hessian: damping {rounded.damping:g} instead of {self.damping:g}"
            )
