"""Correct biases for the shift in the mean that quantization causes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from sqcompile.evaluate import run_watched
from sqcompile.layers import Layer, layers_of, select_layers
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.quantization.observed import is_observe
from sqcompile.quantization.simulate import Simulation
from sqcompile.rewrite import Rewriter, set_bias


class CorrectBias(Pass):
    """Shift biases so that every channel has the mean that it has in floating point.

    Rounding a weight shifts the mean of its outputs, most where few weights make an output, as in
    depthwise convolutions. Layer by layer, in graph order, the mean of each channel is measured in
    floating point and with everything before it quantized and already corrected; the difference goes to
    the bias. It runs between `calibrate` and `freeze-observers`, where both programs exist in one: the
    observers' ranges are known, and the floating-point weights are still there.

    The quantized side advances operator by operator over all batches at once, so that one run corrects
    all layers; as many batches are used as `max_bytes` can hold.

    Keeps: interface(): biases of the floating-point program absorb the error of the quantized one.
    Rejects: linear layers without a bias (`add_bias` gives them one; convolutions always get one, since
        integer kernels add it for nothing).
    Raises: CalibrationError without data, or before `calibrate`.
    Source: Nagel et al. 2019, arXiv 1906.04721, section 4.2, with the means measured on data.

    Attributes:
        layers: Patterns of the layers to correct.
        exclude: Patterns of layers to leave alone.
        add_bias: Give linear layers without a bias one.
        max_bytes: Memory for the values of all batches at one place of the graph, in bytes.
    """

    requires = produces = Level.OBSERVED
    keeps: ClassVar[Keeps] = Keeps.interface()

    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    add_bias: bool = False
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise self.reject_option("max_bytes", "a number of bytes")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Measure the means in floating point, then correct layer after layer."""
        layers = select_layers(layers_of(program), self.layers, self.exclude, where=f"pass {self.name}")
        chosen = {layer.node: layer for layer in layers if self._corrects(layer, context)}
        if not chosen:
            return PassResult()
        simulation = Simulation(program)
        batches = simulation.batches(context, self.max_bytes, "correcting biases: reading")
        wanted = _float_means(program, batches, chosen)
        shifts: dict[fx.Node, Tensor] = {}

        def correct(node: fx.Node, values: list[Any]) -> list[Any]:
            layer = chosen.get(node)
            if layer is None:
                return values
            means = _Means(layer)
            for value in values:
                means.add(value)
            shifts[node] = wanted[node] - means.result()
            shift = _beside(shifts[node], layer).to(values[0].dtype)
            return [value + shift for value in values]

        walk = simulation.walk(batches, after=correct)
        for _ in zip(walk, context.progress.track(simulation.steps, "correcting biases"), strict=False):
            pass
        edit = Rewriter(program, self.name)
        for node, shift in shifts.items():
            _shift_bias(edit, chosen[node], shift)
        edit.finish()
        return PassResult(edit.changes, facts={"batches": len(batches)})

    def _corrects(self, layer: Layer, context: PassContext) -> bool:
        if layer.operator.bias is None or not is_observe(layer.weight_value):
            return False
        if layer.bias is None and not (self.add_bias or layer.kind.startswith("conv")):
            context.remark(layer.node, "is not corrected: it has no bias; add-bias=true gives it one")
            return False
        if layer.bias is not None and layer.bias.op != "get_attr":
            context.remark(layer.node, "is not corrected: its bias is computed")
            return False
        return True


class _Means:
    """Mean of each channel of a layer's output, over batches, in float64."""

    def __init__(self, layer: Layer) -> None:
        self._linear = layer.kind == "linear"
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, value: Tensor) -> None:
        channels = value.shape[-1 if self._linear else 1]
        rows = value.reshape(-1, channels) if self._linear else value.transpose(0, 1).reshape(channels, -1).T
        total = rows.sum(0, dtype=torch.float64)
        self._sum = total if self._sum is None else self._sum + total
        self._count += rows.shape[0]

    def result(self) -> Tensor:
        assert self._sum is not None
        return self._sum / max(1, self._count)


def _float_means(
    program: Program, batches: Sequence[Sequence[Any]], chosen: dict[fx.Node, Layer]
) -> dict[fx.Node, Tensor]:
    means = {node: _Means(layer) for node, layer in chosen.items()}
    for batch in batches:
        run_watched(program, batch, chosen, lambda node, value: means[node].add(value))
    return {node: mean.result() for node, mean in means.items()}


def _beside(shift: Tensor, layer: Layer) -> Tensor:
    """Return a shift [C] so that it broadcasts against the layer's output."""
    rank = layer.node.meta["val"].dim()
    return shift if layer.kind == "linear" else shift.reshape(-1, *[1] * (rank - 2))


def _shift_bias(edit: Rewriter, layer: Layer, shift: Tensor) -> None:
    old = layer.bias
    bias = shift if old is None else edit.program.tensor(old).detach().double() + shift
    set_bias(edit, layer, bias.float())
