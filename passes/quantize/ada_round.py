"""Learn for each weight whether to round it up or down."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from sqcompile.layers import Layer
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.quantization.affine import Search
from sqcompile.quantization.format import Format, PerGroup
from sqcompile.quantization.scheme import Override
from sqcompile.quantization.stored import forget_unused_promises, promised, weight_tensor
from sqcompile.rewrite import Rewriter
from sqcompile.second_order import Hessian
from sqcompile.second_order.learned_rounding import learn_rounding
from sqcompile.second_order.round_layers import Choice, round_layers
from sqcompile.second_order.rounding import Rounded, grid_obstacle

WEIGHT = Format(bits=4, signed=False, symmetric=False, granularity=PerGroup(32))


class AdaRound(Pass):
    """Store weights as codes; gradients decide for each weight whether it is rounded up or down.

    All roundings of a layer are learned together, so that their errors cancel in its outputs; `gptq` decides
    column by column and is much faster. The layers are treated in graph order, on calibration data that went
    through those before them. The error is measured with the Hessian of a layer's inputs, which is exact, so that
    data is run once.

    Layers without a Hessian of their own (embeddings, convolutions, tied weights) and mappings that are not linear
    are rounded to nearest.

    Shapes: weight [O, K]: scale [O] a channel, [O, ceil(K / n)] a group of n.
    Rewrites: linear(%x, @weight)  ==>  linear(%x, dequantize(@codes)).
    Keeps: interface().
    Rejects: weights that are not float32 (remark).
    Raises: PassOptionError for options out of range; SelectionError for patterns that match no layer;
        InputError for weights, CalibrationError for inputs of layers that are NaN or infinite.
    Source: Nagel et al. 2020, arXiv 2004.10568, equations 21 to 25.

    Attributes:
        weight: Format of weights: affine or symmetric, a scale a tensor, channel or group.
        search: Of scales: `minmax` covers every weight; `mse` has the least squared error; `half-quadratic`
            the least sum of a low power of the errors, which forgives outliers.
        steps: Steps of Adam a layer; each costs two products of the weight with the Hessian.
        rate: Its learning rate.
        dense_targets: Fit to what the layer makes in the dense model, not to what it would make of the inputs
            that the layers before have changed; twice the time and memory of the runs over the data.
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
    steps: int = 300
    rate: float = 0.03
    dense_targets: bool = True
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
        if self.steps < 1:
            raise self.reject_option("steps", "at least 1")
        if not self.rate > 0:
            raise self.reject_option("rate", "a positive number")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Choose formats, learn the roundings layer by layer, and store the codes."""
        edit = Rewriter(program, self.name)
        learned = round_layers(
            edit,
            context,
            Choice(self.weight, self.formats, self.search, self.layers, self.exclude, _obstacle),
            lambda layer, format: self._rounding(program, layer, format),
            max_bytes=self.max_bytes,
            with_dense=self.dense_targets,
            where=f"pass {self.name}",
        )
        edit.finish()
        forget_unused_promises(program)
        return PassResult(edit.changes, facts={"learned": learned})

    def _rounding(self, program: Program, layer: Layer, format: Format) -> Callable[[Hessian], Rounded]:
        promise = promised(program, layer.weight_value, layer.weight)
        return partial(
            learn_rounding,
            weight_tensor(program, layer),
            format=format,
            search=self.search,
            steps=self.steps,
            rate=self.rate,
            kept=None if promise is None else promise.mask,
        )


def _obstacle(format: Format) -> str | None:
    if not format.mapping.is_linear:
        return "is rounded to nearest: its mapping is not linear"
    return grid_obstacle(format)
