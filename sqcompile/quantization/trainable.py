"""Quantization-aware training: an observed program as a module whose scales are parameters, too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sqcompile.program import Program, value_of
from sqcompile.quantization.affine import Search
from sqcompile.quantization.format import Format
from sqcompile.quantization.learned import LearnedState
from sqcompile.quantization.lookup import fake_lookup
from sqcompile.quantization.mappings import LARGEST_ENTRY
from sqcompile.quantization.observed import (
    observer_name,
    state_of,
    value_observers,
    value_table,
    weight_observers,
)
from sqcompile.quantization.observers import Fixed, ObserverState
from sqcompile.quantization.stored import Decoding, weight_decoding, weight_tensor
from sqcompile.training import Trainable

# A scale stays above this part of what it began as: at zero it would divide by zero, and never come back.
_LEAST_FACTOR = 2.0**-10


@dataclass(frozen=True)
class _Scales:
    """Names of the tensors that say how the codes of one observer are decoded; `last` is zero point or table."""

    start: str
    last: str
    factor: str | None
    has_table: bool


class TrainableQuantized(Trainable):
    """An observed program to train as it will be quantized: every observer is a fake quantization.

    Beside the program's own parameters it has one for each learned scale, `NAME_scale_factor`: the scale
    divided by the one that it began with, so that it is near 1 whatever the tensor's size, and optimizers
    that move all parameters alike (Adam) move it as much as others. Its gradient is such that a step of plain
    gradient descent moves the scale as LSQ does.

    Args:
        program: A program of level `OBSERVED`, calibrated; it is only read.
        search: How the first scales of weights are chosen.
        learn_scales: Whether scales are parameters; fixed ranges (of a sigmoid) never are.
        freeze_norms: As `Trainable`.

    Raises:
        CalibrationError: If an observer never saw data.
        InputError: If a weight is not finite.
    Source: Esser et al. 2020 (LSQ), sections 2.1 and 2.2.
    """

    def __init__(
        self,
        program: Program,
        *,
        search: Search = "mse",
        learn_scales: bool = True,
        freeze_norms: bool = False,
    ) -> None:
        self._search: Search = search
        self._learn = learn_scales
        self._scales: dict[str, _Scales] = {}
        super().__init__(program, freeze_norms=freeze_norms)

    def states(self, program: Program) -> dict[str, LearnedState]:
        """Return the states that a program's observers have after training."""
        tensors = {**dict(self.named_buffers()), **dict(self.named_parameters())}
        found = {}
        for name, names in self._scales.items():
            scale = tensors[names.start].detach()
            if names.factor is not None:
                scale = _effective(tensors[names.factor].detach(), scale)
            zero_point, table = tensors[names.last], None
            if names.has_table:
                zero_point, table = torch.zeros_like(scale, dtype=torch.int32), zero_point
            found[name] = LearnedState(program.observers[name], scale.float(), zero_point, table)
        return found

    def _prepare(self, twin: Program) -> None:
        super()._prepare(twin)
        weights = weight_observers(twin)
        decodings: dict[fx.Node, tuple[Decoding, tuple[int, ...]]] = {}
        for node, layers in weights.items():
            state, weight = state_of(twin, node), weight_tensor(twin, layers[0])
            decodings[node] = weight_decoding(state, weight, self._search), tuple(weight.shape)
        for node in value_observers(twin):
            decodings[node] = _decoding_of_values(state_of(twin, node)), _sizes_of_sample(node)
        sources: dict[str, tuple[fx.Node, fx.Node]] = {}
        for node, (decoding, shape) in decodings.items():
            name, state = observer_name(node), state_of(twin, node)
            if name not in sources:
                learns = self._learn and not isinstance(state.observer, Fixed)
                sources[name] = self._scale(twin, name, decoding, state.format, shape, learns)
            format, (scale, last) = state.format, sources[name]
            options: tuple[Any, ...] = (*format.granularity.pair, node not in weights)
            function: Any = fake_lookup
            if decoding.table is None:
                options = (*format.granularity.pair, format.qmin, format.qmax)
                function = torch.ops.sqcompile.fake_quantize.default
            with twin.graph.inserting_before(node):
                fake = twin.graph.call_function(function, (node.args[0], scale, last, *options))
            node.replace_all_uses_with(fake)
            twin.graph.erase_node(node)

    def _scale(
        self,
        twin: Program,
        name: str,
        decoding: Decoding,
        format: Format,
        shape: tuple[int, ...],
        learns: bool,
    ) -> tuple[fx.Node, fx.Node]:
        """Store how codes are decoded; return the nodes of the scale, and of the zero point or the table."""
        graph, scale = twin.graph, decoding.scale
        with graph.inserting_before(next(iter(graph.nodes))):
            start, start_name = _store(twin, f"{name}_scale_start", scale)
            if decoding.table is None:
                last, last_name = _store(twin, f"{name}_zero_point", decoding.zero_point)
            else:
                last, last_name = _store(twin, f"{name}_table", decoding.table)
            has_table = decoding.table is not None
            self._scales[name] = _Scales(start_name, last_name, None, has_table)
            if not learns:
                return start, last
            factor, factor_name = _store(twin, f"{name}_scale_factor", nn.Parameter(torch.ones_like(scale)))
        self._scales[name] = _Scales(start_name, last_name, factor_name, has_table)
        positive = format.qmax - (format.middle if format.symmetric else format.qmin)
        count = math.prod(shape) / max(1, scale.numel())
        damping = 1 / math.sqrt(max(1.0, count * positive))
        if decoding.table is not None:
            # Of a linear code with as many bits a scale is one step; that of a table is 1/127 of its range.
            damping *= (positive / LARGEST_ENTRY) ** 2
        with graph.inserting_before(next(twin.compute_nodes())):
            return graph.call_function(learned_scale, (factor, start, damping)), last


def _decoding_of_values(state: ObserverState) -> Decoding:
    if state.format.mapping.is_linear:
        return Decoding(*state.parameters())
    scale, table = value_table(state)
    return Decoding(scale, torch.zeros_like(scale, dtype=torch.int32), table)


class _LearnedScale(torch.autograd.Function):
    """scale = start · |factor|, with the gradient that makes one step of descent LSQ's own.

    LSQ descends the scale itself by g · dL/ds. With s = start · f a step of f moves s by start · Δf, so that the
    gradient of f is g · dL/ds / start.
    """

    @staticmethod
    def forward(ctx: Any, factor: Tensor, start: Tensor, damping: float) -> Tensor:
        ctx.save_for_backward(factor, start)
        ctx.damping = damping
        return _effective(factor, start)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        factor, start = ctx.saved_tensors
        sign = torch.where(factor < 0, -1.0, 1.0)
        return (gradient * sign * ctx.damping / start).to(factor.dtype), None, None


def learned_scale(factor: Tensor, start: Tensor, damping: float) -> Tensor:
    """Return a scale from its trained factor; see `TrainableQuantized`.

    Shapes: factor and start as `scale_shape` says; result alike.
    """
    scale: Tensor = _LearnedScale.apply(factor, start, damping)  # type: ignore[no-untyped-call]
    return scale


def _effective(factor: Tensor, start: Tensor) -> Tensor:
    return start * factor.abs().clamp(min=_LEAST_FACTOR)


def _store(twin: Program, name: str, value: Tensor) -> tuple[fx.Node, str]:
    name = twin.free_name(name)
    twin.set_tensor(name, value)
    return twin.graph.get_attr(name), name


def _sizes_of_sample(node: fx.Node) -> tuple[int, ...]:
    """Return the sizes of one sample of a value, without those that are not known."""
    value = value_of(node)
    return tuple(size for size in value.shape[1:] if isinstance(size, int))
