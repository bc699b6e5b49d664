"""Hard-concrete gates: how many units a layer reads, as a number that can be descended (L0).

Each unit of a channel group has a gate z between 0 and 1, which multiplies the weights that read the unit. In
training z is random and often exactly 0 or 1; its chance of being open has a gradient, and so can be a penalty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from sqcompile.program import Program
from sqcompile.regularization import Penalty, Rate, Slice, Units, spread
from sqcompile.training import Trainable

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
"""β, γ and ζ of Louizos et al. 2018, section 4.1: temperature, and the interval that is stretched over [0, 1]."""

_OPEN = 3.0  # log α at which a gate is open without noise
# An optimizer that moves every parameter by about its rate would need thousands of steps to close a gate.
_GAIN = 20.0


def log_odds(theta: Tensor) -> Tensor:
    """Return log α of the parameter that is trained, 0 for an open gate. Shapes: any; result alike."""
    return _OPEN + _GAIN * theta


def sample_gates(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Return random gates, from uniform numbers in (0, 1).

    Shapes: both [units]; result alike, 0 to 1.
    Source: Louizos et al. 2018, equations 10 and 11.
    """
    soft = torch.sigmoid((uniform.logit() + log_alpha) / TEMPERATURE)
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


def mean_gates(log_alpha: Tensor) -> Tensor:
    """Return the gates without noise, as they are after training. Shapes: any; result alike.

    Source: Louizos et al. 2018, equation 13.
    """
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0, 1)


def open_chance(log_alpha: Tensor) -> Tensor:
    """Return the chance that a random gate is not zero. Shapes: any; result alike.

    Source: Louizos et al. 2018, equation 12.
    """
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))


class TrainableGated(Trainable):
    """A program to train with a gate for each unit of some channel groups, open at first.

    Args:
        program: The program; it is only read.
        units: The groups that have gates. The parameter of a group's gates is named `gates_NAME`.
    """

    def __init__(self, program: Program, units: Sequence[Units]) -> None:
        self._units = tuple(units)
        self.gates: dict[str, str] = {}
        super().__init__(program)

    def factors(self) -> dict[str, Tensor]:
        """Return the gates of each group without noise, [units], by name of the group."""
        return {name: mean_gates(log_odds(self.get_parameter(gate))) for name, gate in self.gates.items()}

    def _prepare(self, twin: Program) -> None:
        super()._prepare(twin)
        graph = twin.graph
        for item in self._units:
            name = twin.free_name(f"gates_{item.name.replace('.', '_')}")
            twin.set_tensor(name, nn.Parameter(torch.zeros(item.count)))
            self.gates[item.name] = name
            with graph.inserting_before(next(iter(graph.nodes))):
                theta = graph.get_attr(name)
            with graph.inserting_before(next(twin.compute_nodes())):
                gates = graph.call_function(draw_gates, (theta, False))
            for part in item.reads:
                self._gate(twin, part, gates)

    def _gate(self, twin: Program, part: Slice, gates: fx.Node) -> None:
        graph = twin.graph
        reader = next(node for node in graph.nodes if node.op == "get_attr" and node.target == part.tensor)
        users = list(reader.users)
        stored = []
        with graph.inserting_before(next(iter(graph.nodes))):
            for what, values in (("positions", part.positions), ("units", part.unit)):
                name = twin.free_name(f"{gates.args[0]}_{what}")
                twin.set_tensor(name, values)
                stored.append(graph.get_attr(name))
        with graph.inserting_after(gates):
            gated = graph.call_function(apply_gates, (reader, gates, *stored, part.axis))
        for user in users:
            user.replace_input_with(reader, gated)

    def _switch(self, twin: Program) -> None:
        super()._switch(twin)
        for node in twin.compute_nodes():
            if node.target is draw_gates:
                node.args = (node.args[0], True)


class ExpectedL0(Penalty):
    """strength · Σ chance that a unit is read, over all units of a gated module.

    Its gradient is added to the gates' own before each step of the optimizer.
    """

    def __init__(self, module: TrainableGated, strength: float) -> None:
        super().__init__(module, strength)
        self._gates = tuple(module.gates.values())

    def value(self) -> Tensor:
        """Return strength times the expected number of units that are read."""
        sums = [open_chance(log_odds(self.module.get_parameter(name))).sum() for name in self._gates]
        return self.strength * torch.stack(sums).sum() if sums else torch.zeros(())

    def before(self) -> None:
        """Add the penalty's gradient to that of the loss."""
        with torch.enable_grad():
            value = self.value()
            if value.requires_grad:
                torch.autograd.backward(value)

    def step(self, rate: Rate) -> None:
        """Do nothing: the penalty is smooth."""


def draw_gates(theta: Tensor, training: bool) -> Tensor:
    """Return the gates of one run: random in training, else without noise. Shapes: theta [units]; result alike."""
    if not training:
        return mean_gates(log_odds(theta))
    uniform = torch.rand_like(theta).clamp(1e-6, 1 - 1e-6)
    return sample_gates(log_odds(theta), uniform)


def apply_gates(weight: Tensor, gates: Tensor, positions: Tensor, unit: Tensor, axis: int) -> Tensor:
    """Return a weight times the gates of the units that it reads. Shapes: result as the weight."""
    return weight * spread(gates, positions, unit, axis, weight)
