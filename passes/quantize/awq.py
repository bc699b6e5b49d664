"""Scale the inputs of layers so that the weights that matter keep more of their digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor, fx

from sqcompile.executor import Pending
from sqcompile.input_scales import InputGroup, input_groups, scale_inputs
from sqcompile.layers import Layer, layers_of, select_layers
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.quantization import affine
from sqcompile.quantization.affine import Search
from sqcompile.quantization.format import Format, PerGroup
from sqcompile.quantization.lookup import encode, lookup
from sqcompile.quantization.scheme import weight_format
from sqcompile.quantization.stored import fit_decoding
from sqcompile.rewrite import Rewriter
from sqcompile.second_order import Hessian
from sqcompile.second_order.layers import visit_layers
from sqcompile.second_order.scaling import activation_scale

WEIGHT = Format(bits=4, signed=False, symmetric=False, granularity=PerGroup(32))


class AWQ(Pass):
    """Scale the inputs of layers for weights of few bits: large inputs get weights that are rounded less.

    A channel of a layer's input is divided by s in what makes it (the weight of a norm, the layer before a
    product), and the weights that read it are multiplied by s: the same function. Channels with large inputs
    are multiplied up, so that their weights are rounded to a finer part of a group's scale. How much is
    searched for the format that will follow; what rounds comes after this pass, `quantize-weights` or `gptq`.

    Shapes: weight [O, K]; s [K].
    Rewrites: the weight of a norm, or of the layer before a product, divided by s; weights multiplied by s.
    Keeps: close(rtol=1e-4): scaled in float64, stored as float32.
    Rejects: inputs that something else reads too; that are made by anything but a norm with a weight or a
        product with a layer's output; weights that are masked or shared.
    Raises: SelectionError for patterns that match no layer; PassOptionError for options out of range;
        CalibrationError without data, or if inputs of a layer are not finite.
    Source: Lin et al. 2023, arXiv 2306.00978.

    Attributes:
        weight: Format that the weights will have.
        search: Of its scales while factors are compared; `minmax` is quick, and nearly as good as what follows.
        steps: Exponents that are tried between 0 and 1.
        layers: Patterns of the layers whose inputs are scaled.
        exclude: Patterns of layers to leave alone.
        max_bytes: Memory for the values of all batches at one place of the graph, in bytes.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.close(rtol=1e-4, atol=1e-6)
    local: ClassVar[bool] = True

    weight: Format = WEIGHT
    search: Search = "minmax"
    steps: int = 20
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        if self.weight.dynamic:
            raise self.reject_option("weight", "a static format")
        if self.steps < 1:
            raise self.reject_option("steps", "at least 1")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Search a scale for each group of layers that read one value, and fold it."""
        selected = select_layers(layers_of(program), self.layers, self.exclude, where=f"pass {self.name}")
        groups = input_groups(program, selected, context.remark)
        last = {group.layers[-1].node: group for group in groups}
        found: dict[fx.Node, Pending[tuple[Tensor, float, float]]] = {}

        def visit(layer: Layer, hessian: Hessian) -> Tensor:
            group = last.get(layer.node)
            if group is not None:
                found[group.data] = context.executor.submit(self._search(program, group), hessian)
            return program.tensor(layer.weight).detach()

        visit_layers(
            program,
            [layer for group in groups for layer in group.layers],
            visit,
            context,
            max_bytes=self.max_bytes,
            purpose="scaling inputs",
        )
        edit = Rewriter(program, self.name)
        gains = {}
        for group in groups:
            scale, error, plain = found[group.data].result()
            gains[group.layers[0].name] = error / plain if plain > 0 else 1.0
            if not bool((scale == 1).all()):
                scale_inputs(edit, group, scale)
        # Of each group: the error of its outputs after rounding, as a share of that without scales.
        return PassResult(edit.finish(), facts={"error": gains})

    def _search(
        self, program: Program, group: InputGroup
    ) -> Callable[[Hessian], tuple[Tensor, float, float]]:
        weights = [program.tensor(layer.weight).detach().float() for layer in group.layers]
        formats = [
            weight_format(layer, self.weight, tuple(weight.shape))[0]
            for layer, weight in zip(group.layers, weights, strict=True)
        ]
        return partial(
            activation_scale, weights, rounded=partial(_rounded, formats, self.search), steps=self.steps
        )


def _rounded(formats: Sequence[Format], search: Search, index: int, weight: Tensor) -> Tensor:
    format = formats[index]
    decoding = fit_decoding(weight, format, search)
    axis, group_size = format.granularity.pair
    if decoding.table is None:
        return affine.fake_quantize(
            weight, decoding.scale, decoding.zero_point, axis, group_size, format.qmin, format.qmax
        )
    steps = lookup(
        encode(affine.divide(weight, decoding.scale, axis, group_size), decoding.table), decoding.table
    )
    return affine.dequantize(steps, decoding.scale, decoding.zero_point, axis, group_size)
