"""Move the unevenness of layers' inputs into their weights."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, fx

from sqcompile.input_scales import input_groups, scale_inputs
from sqcompile.layers import Layer, layers_of, select_layers
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter
from sqcompile.second_order import Hessian
from sqcompile.second_order.layers import visit_layers
from sqcompile.second_order.scaling import smoothing_scale


class SmoothQuant(Pass):
    """Divide the inputs of layers, channel by channel, so that a few large channels do not spoil the others.

    Language models have channels whose values are a hundred times those of others; rounded with one scale a
    tensor or token, the others keep no digits. A channel is divided by s in what makes it (the weight of a norm,
    the layer before a product), and the weights that read it are multiplied by s: the same function.
    `equalize-layers` does so between layers with only ReLU and pooling in between.

    Shapes: weight [O, K]; s [K], s_j = max|x_j|^t / max|w_j|^(1-t).
    Rewrites: the weight of a norm, or of the layer before a product, divided by s; weights multiplied by s.
    Keeps: close(rtol=1e-4): scaled in float64, stored as float32.
    Rejects: inputs that something else reads too; that are made by anything but a norm with a weight or a
        product with a layer's output; weights that are masked or shared.
    Raises: SelectionError for patterns that match no layer; PassOptionError for a strength out of range;
        CalibrationError without data, or if inputs of a layer are not finite.
    Source: Xiao et al. 2022, arXiv 2211.10438, equation 4.

    Attributes:
        strength: t, the share of the unevenness that moves into the weights, 0 < t ≤ 1.
        layers: Patterns of the layers whose inputs are scaled.
        exclude: Patterns of layers to leave alone.
        max_bytes: Memory for the values of all batches at one place of the graph, in bytes.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.close(rtol=1e-4, atol=1e-6)
    local: ClassVar[bool] = True

    strength: float = 0.5
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise self.reject_option("strength", "a share t, 0 < t ≤ 1")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Measure each group of layers that read one value, and fold its scale."""
        selected = select_layers(layers_of(program), self.layers, self.exclude, where=f"pass {self.name}")
        groups = input_groups(program, selected, context.remark)
        peaks: dict[fx.Node, Tensor] = {}

        def visit(layer: Layer, hessian: Hessian) -> Tensor:
            assert layer.data is not None
            peaks[layer.data] = hessian.peak
            return program.tensor(layer.weight).detach()

        visit_layers(
            program,
            [layer for group in groups for layer in group.layers],
            visit,
            context,
            max_bytes=self.max_bytes,
            purpose="measuring inputs",
        )
        edit = Rewriter(program, self.name)
        for group in groups:
            # Asked for now: an earlier group may have scaled the rows of these weights.
            weights = [edit.program.tensor(layer.weight).detach() for layer in group.layers]
            scale_inputs(edit, group, smoothing_scale(weights, peaks[group.data], self.strength))
        return PassResult(edit.finish(), facts={"groups": len(groups)})
