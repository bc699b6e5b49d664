"""How much a model suffers when one layer gets one format: measured on calibration data, layer by layer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.nn import functional

from sqcompile.errors import CalibrationError, InputError, did_you_mean
from sqcompile.executor import Pending
from sqcompile.layers import Layer, layers_of
from sqcompile.mixed_precision.candidate import Candidate
from sqcompile.mixed_precision.rerun import Rerun
from sqcompile.pipeline.context import PassContext
from sqcompile.program import Program
from sqcompile.quantization.affine import Search
from sqcompile.quantization.scheme import weight_format
from sqcompile.quantization.stored import promised, weight_tensor
from sqcompile.second_order.hessian import Hessian
from sqcompile.second_order.layers import obstacle, visit_layers
from sqcompile.second_order.rounding import Rounded, grid_obstacle, round_weight
from sqcompile.storage import program_bytes, program_of_bytes

Measure = Literal["divergence", "error", "fisher"]
"""How the harm of a candidate is measured.

- `divergence`: mean KL(dense ‖ changed) of the distributions that the first output gives by a softmax over its last
  axis, in nats: for language models and classifiers. One run of the model for each layer and candidate.
- `error`: mean square of the change of the first output, as a share of its own: for every other model.
- `fisher`: the divergence to second order, ½ Σ_o G_o (ΔW H ΔWᵀ)_oo, with the mean square G_o of the gradient at the
  layer's output o: one backward run in all.
"""


MEASURES: tuple[Measure, ...] = ("fisher", "divergence", "error")

Distance = Callable[[Tensor, Tensor], float]
"""Takes the output as it was and as it is; returns how far they are apart, averaged over what was predicted."""


@dataclass(frozen=True)
class Sensitivity:
    """What each candidate does to each layer.

    Attributes:
        layers: Names of the layers, in graph order.
        candidates: The candidates.
        losses: By layer and candidate, [L, C]; infinite where a layer cannot take a candidate.
        bits: What each layer's weight takes in each candidate, [L, C].
        shapes: Shape of each layer's weight, [O, K].
        measure: How the losses were measured.
    """

    layers: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    losses: NDArray[np.float64]
    bits: NDArray[np.float64]
    shapes: tuple[tuple[int, int], ...]
    measure: Measure

    @property
    def weights(self) -> NDArray[np.int64]:
        """Weights of each layer, [L]."""
        return np.array([outputs * inputs for outputs, inputs in self.shapes], dtype=np.int64)


def measure_sensitivity(
    program: Program,
    layers: Sequence[Layer],
    candidates: Sequence[Candidate],
    context: PassContext,
    *,
    measure: Measure = "fisher",
    search: Search = "mse",
    max_batches: int = 4,
    max_bytes: int = 2**30,
) -> Sensitivity:
    """Try every candidate on every layer, one at a time, all others as they are.

    A candidate's weight is made as GPTQ and SparseGPT make it, on the Hessian of the layer's inputs, so that
    what is measured is what will be used.

    Args:
        program: The program, in floating point; it is only read.
        layers: Layers with a matrix [O, K] as weight and a Hessian (`second_order.layers.obstacle`).
        candidates: What each may become.
        context: Holds the calibration data.
        measure: How the harm is measured.
        search: Of scales.
        max_batches: Batches on which losses are measured; Hessians see all that fit.
        max_bytes: Memory for the values of all batches at one place of the graph.

    Raises:
        CalibrationError: If there is no data.
        InputError: If the first output is no floating-point tensor with a last axis.
    """
    losses = np.full((len(layers), len(candidates)), np.inf)
    judge = context.executor.share(_judge(program, layers, context, measure, max_batches))
    measured: dict[fx.Node, Pending[list[float]]] = {}

    def visit(layer: Layer, hessian: Hessian) -> Tensor:
        dense = weight_tensor(program, layer)
        trials = [_trial(program, layer, dense, candidate, search) for candidate in candidates]
        measured[layer.node] = context.executor.submit(
            _losses, judge, layer.node.name, dense, hessian, trials
        )
        return dense

    visit_layers(
        program, layers, visit, context, max_bytes=max_bytes, purpose=f"measuring {len(candidates)} formats"
    )
    for row, layer in enumerate(layers):
        losses[row] = measured[layer.node].result()
    shapes = [tuple(weight_tensor(program, layer).shape) for layer in layers]
    bits = [[float(candidate.size_bits(shape)) for candidate in candidates] for shape in shapes]
    return Sensitivity(
        tuple(layer.name for layer in layers),
        tuple(candidates),
        losses,
        np.array(bits).reshape(losses.shape),
        tuple((outputs, inputs) for outputs, inputs in shapes),
        measure,
    )


def parse_measure(text: str) -> Measure:
    """Return the measure of a name.

    Raises:
        InputError: If there is none of that name.
    """
    for measure in MEASURES:
        if measure == text:
            return measure
    raise InputError(
        f"No measure is called '{text}'.",
        seen=text,
        expected=", ".join(MEASURES),
        next_step=did_you_mean(text, MEASURES),
    )


def measurable(program: Program, layers: Iterable[Layer], context: PassContext) -> list[Layer]:
    """Return the layers that can be measured; say why others cannot."""
    found = []
    for layer in layers:
        reason = obstacle(program, layer)
        if reason is None and weight_tensor(program, layer).dtype != torch.float32:
            reason = f"its weight is {weight_tensor(program, layer).dtype}"
        if reason is None:
            found.append(layer)
        else:
            context.remark(layer.node, f"is not measured: {reason}")
    return found


Trial = Callable[[Tensor, Hessian], Rounded]
"""Takes a weight and the Hessian of its inputs; returns what a candidate makes of it."""


def _trial(
    program: Program, layer: Layer, dense: Tensor, candidate: Candidate, search: Search
) -> Trial | None:
    """Return what tries a candidate on a layer's weight, or None if the layer cannot take it."""
    format, _ = weight_format(layer, candidate.format, tuple(dense.shape))
    if grid_obstacle(format) is not None:
        return None
    if candidate.prunes and candidate.pattern.obstacle(tuple(dense.shape)) is not None:
        return None
    promise = promised(program, layer.weight_value, layer.weight)
    return partial(
        round_weight,
        format=format,
        search=search,
        sparsity=candidate.sparsity if candidate.prunes else None,
        pattern=candidate.pattern,
        kept=None if promise is None else promise.mask,
        where=f"layer '{layer.name}'",
    )


def _losses(
    judge: _Run | _Fisher, node: str, dense: Tensor, hessian: Hessian, trials: Sequence[Trial | None]
) -> list[float]:
    """Return what each trial costs; infinite where there is none."""
    return [
        np.inf if trial is None else judge.loss(node, dense, trial(dense, hessian).weight, hessian)
        for trial in trials
    ]


def _judge(
    program: Program, layers: Sequence[Layer], context: PassContext, measure: Measure, max_batches: int
) -> _Run | _Fisher:
    batches = []
    for batch in context.batches("reading"):
        batches.append(batch)
        if len(batches) == max_batches:
            break
    if not batches:
        raise CalibrationError(
            "There is no calibration batch to measure on.",
            where=f"pass {context.origin}",
            seen="an empty iterable",
            expected="one batch at least",
            next_step="pass calibration=[batch, …] to sqcompile.compile",
        )
    if measure == "fisher":
        return _Fisher(program, layers, batches, context.seed)
    return _Run(program, batches, _divergence if measure == "divergence" else _error)


class _Run:
    """Judges by running the program with one weight changed.

    Sent to another process it takes the program along, as a file would hold it.
    """

    def __init__(self, program: Program, batches: Sequence[Sequence[Any]], distance: Distance) -> None:
        self._program = program
        self._batches = batches
        self._distance = distance
        self._layers = {layer.node.name: layer for layer in layers_of(program)}
        self._runs = [Rerun(program, batch) for batch in batches]
        self._dense = [_first_output(program, run.outputs()) for run in self._runs]

    def loss(self, node: str, dense: Tensor, changed: Tensor, hessian: Hessian) -> float:
        """Return the mean distance of the outputs."""
        layer = self._layers[node]
        total = count = 0.0
        for run, wanted in zip(self._runs, self._dense, strict=True):
            outputs = run.outputs(layer.node, {layer.weight_value: changed})
            total += self._distance(wanted, _first_output(self._program, outputs)) * wanted[..., 0].numel()
            count += wanted[..., 0].numel()
        return total / count if count else 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        stored = program_bytes(self._program)
        key = hashlib.sha256(stored).hexdigest()
        return _unpacked_run, (key, stored, list(self._batches), self._distance)


# The last one that came from another process: it is the same for all layers, and unpacked once.
_unpacked: dict[str, _Run] = {}


def _unpacked_run(key: str, stored: bytes, batches: list[Sequence[Any]], distance: Distance) -> _Run:
    if key not in _unpacked:
        _unpacked.clear()
        _unpacked[key] = _Run(program_of_bytes(stored), batches, distance)
    return _unpacked[key]


class _Fisher:
    """Judges by the curvature of the log-likelihood at the layer's outputs.

    G is the diagonal of the Fisher information with labels drawn from the model's own distribution.
    Source: Amari 1998; Martens 2014, arXiv 1412.1193, section 5 (true, not empirical, Fisher).
    """

    def __init__(
        self, program: Program, layers: Sequence[Layer], batches: Sequence[Sequence[Any]], seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._squares: dict[str, Tensor] = {}
        predictions = 0
        for batch in batches:
            taps, output = _tapped(program, [layer.node for layer in layers], batch)
            logits = _first_output(program, output).float()
            likelihood = functional.log_softmax(logits, -1)
            drawn = torch.multinomial(
                likelihood.detach().exp().flatten(0, -2).cpu(), 1, generator=generator
            ).to(logits.device)
            picked = likelihood.flatten(0, -2).gather(-1, drawn).sum()
            gradients = torch.autograd.grad(picked, list(taps.values()), allow_unused=True)
            predictions += drawn.numel()
            for node, gradient in zip(taps, gradients, strict=True):
                if gradient is None:
                    continue
                squares = gradient.flatten(0, -2).square().sum(0)
                known = self._squares.get(node.name)
                self._squares[node.name] = squares if known is None else known + squares
        self._predictions = max(1, predictions)

    def loss(self, node: str, dense: Tensor, changed: Tensor, hessian: Hessian) -> float:
        """Return ½ Σ_o G_o (ΔW H ΔWᵀ)_oo, for each prediction."""
        squares = self._squares.get(node)
        if squares is None:
            return 0.0
        delta = changed - dense
        error = ((delta @ hessian.matrix) * delta).sum(1).clamp_(min=0)
        return 0.5 * float((squares / self._predictions * error).double().sum())


def _tapped(
    program: Program, nodes: Sequence[fx.Node], batch: Sequence[Any]
) -> tuple[dict[fx.Node, Tensor], list[Any]]:
    """Run a program with a zero added to the values of some nodes, by which gradients are taken."""
    wanted = set(nodes)
    taps: dict[fx.Node, Tensor] = {}

    class Tapped(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            if node not in wanted:
                return result
            taps[node] = torch.zeros_like(result, requires_grad=True)
            return result + taps[node]

    with torch.enable_grad():
        return taps, list(Tapped(program.graph_module, garbage_collect_values=True).run(*batch))


def _divergence(dense: Tensor, changed: Tensor) -> float:
    wanted, own = functional.log_softmax(dense.float(), -1), functional.log_softmax(changed.float(), -1)
    return float((wanted.exp() * (wanted - own)).sum(-1).double().mean())


def _error(dense: Tensor, changed: Tensor) -> float:
    power = float(dense.double().square().mean()) or 1.0
    return float((changed.double() - dense.double()).square().mean()) / power


def _first_output(program: Program, outputs: Sequence[Any]) -> Tensor:
    output = outputs[0]
    if isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 0:
        return output
    seen = f"{output.dtype} {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    raise InputError(
        "The first output of the program cannot be measured.",
        where=f"output '{program.signature.outputs[0].name}'",
        seen=seen,
        expected="floating-point numbers, such as logits [N, T, vocabulary]",
        next_step="trace the model so that logits come first",
    )
