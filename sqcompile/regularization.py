"""Sparse regularization: penalties that drive weights, or whole units of channels, to exactly zero.

    penalty = L1(module, ["fc1.weight"], strength=1e-4)
    with proximal_steps(penalty):              # after every step of any optimizer
        train(module)

A gradient of |w| makes weights small, and never zero. The proximal operator does: after the optimizer's own step
it moves each weight, or each group of weights as a whole, towards zero by rate · strength, and not beyond it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sqcompile.channels.groups import Group
from sqcompile.errors import InputError
from sqcompile.program import Program

Rate = Callable[[Tensor], float]
"""Returns the learning rate of a parameter; 0 where the optimizer does not have it."""


def soft_threshold(x: Tensor, amount: float) -> Tensor:
    """Return the proximal operator of amount · ‖x‖₁: each number moved towards zero, at most to it.

    Shapes: x of any shape; result alike.
    Source: Beck & Teboulle 2009 (ISTA), equation 1.5.
    """
    return x.sign() * (x.abs() - amount).clamp(min=0)


def shrink_factor(norm: Tensor, amount: Tensor) -> Tensor:
    """Return by what the proximal operator of amount · ‖x‖₂ multiplies a group of that norm: 0 to 1.

    Shapes: norm and amount [groups]; result alike.
    Source: Yuan & Lin 2006, section 2 (group lasso).
    """
    return (1 - amount / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(min=0)


@dataclass(frozen=True)
class Slice:
    """Positions along one dimension of a parameter that belong to units.

    Attributes:
        tensor: Name of the parameter.
        axis: Its dimension.
        positions: Positions along it, each once.
        unit: Of each position, the number of its unit.
    """

    tensor: str
    axis: int
    positions: Tensor
    unit: Tensor

    def spread(self, values: Tensor, like: Tensor) -> Tensor:
        """Return a number a position of the dimension, as `spread` does."""
        return spread(values, self.positions, self.unit, self.axis, like)


def spread(values: Tensor, positions: Tensor, unit: Tensor, axis: int, like: Tensor) -> Tensor:
    """Return one number a position along a dimension, 1 where no unit is, to multiply a parameter with.

    Shapes: values [units]; positions and unit [positions]; result [1, …, size, …, 1].
    """
    shape = [1] * like.dim()
    shape[axis] = like.shape[axis]
    return values.new_ones(like.shape[axis]).index_put((positions,), values[unit]).view(shape)


@dataclass(frozen=True)
class Units:
    """The parameters that read each unit of a channel group: without them the unit has no effect.

    Attributes:
        name: Name of the group.
        count: How many units it has.
        reads: Where they are read.
        sizes: Of each unit, how many weights read it; [count].
    """

    name: str
    count: int
    reads: tuple[Slice, ...]
    sizes: Tensor

    @classmethod
    def of(cls, program: Program, group: Group) -> Units | str:
        """Return the readers of a group, or why its units cannot be told apart in them."""
        reads, sizes = [], torch.zeros(len(group))
        for member in group.members:
            if member.role != "reads":
                continue
            tensor = program.tensor(member.tensor)
            if not isinstance(tensor, nn.Parameter):
                return f"@{member.tensor}, which reads it, is no parameter"
            if len(set(member.positions.tolist())) != len(member.positions):
                return f"@{member.tensor} reads several of its units with the same weights"
            unit = torch.from_numpy(member.unit)
            reads.append(Slice(member.tensor, member.axis, torch.from_numpy(member.positions), unit))
            each = tensor.numel() / tensor.shape[member.axis]
            sizes += each * torch.bincount(unit, minlength=len(group))
        if not reads:
            return "no weight reads it"
        return cls(group.name, len(group), tuple(reads), sizes)

    def norms(self, find: Callable[[str], Tensor]) -> Tensor:
        """Return the Euclidean norm of what reads each unit; [count]."""
        squares = torch.zeros(self.count, device=find(self.reads[0].tensor).device)
        for part in self.reads:
            weight = find(part.tensor)
            others = [axis for axis in range(weight.dim()) if axis != part.axis % weight.dim()]
            along = weight.square().sum(others) if others else weight.square()
            squares = squares.index_add(0, part.unit, along[part.positions].to(squares.dtype))
        # The root has no gradient at zero; there its subgradient 0 is taken.
        positive = squares > 0
        return torch.where(positive, squares.where(positive, torch.ones_like(squares)).sqrt(), 0.0)


class Penalty(ABC):
    """A penalty on a module's parameters, in two forms: as a term of the loss, or as a proximal step.

    Args:
        module: The module that is trained; its parameters are looked up by name at every use.
        strength: What the penalty is multiplied with, 0 or more.

    Raises:
        InputError: If the strength is negative or no number.
    """

    def __init__(self, module: nn.Module, strength: float) -> None:
        if not 0 <= strength < float("inf"):
            raise InputError(
                "The strength of a penalty is 0 or more.", where=type(self).__name__, seen=strength
            )
        self.module, self.strength = module, strength

    @abstractmethod
    def value(self) -> Tensor:
        """Return the penalty, [], with its gradient: to be added to a loss, without proximal steps."""

    @abstractmethod
    def step(self, rate: Rate) -> None:
        """Take the proximal step that belongs to one step of an optimizer."""

    def before(self) -> None:  # noqa: B027 (most penalties have nothing to do here)
        """Do what has to be done between the gradients and the optimizer's step."""


class L1(Penalty):
    """strength · Σ |w|, over parameters by name; of batch norms' scales it is network slimming.

    Source: Tibshirani 1996; Liu et al. 2017 (network slimming).
    """

    def __init__(self, module: nn.Module, names: Sequence[str], strength: float) -> None:
        super().__init__(module, strength)
        self.names = tuple(names)

    def value(self) -> Tensor:
        """Return strength · Σ |w|."""
        sums = [self.module.get_parameter(name).abs().sum() for name in self.names]
        return self.strength * torch.stack(sums).sum() if sums else torch.zeros(())

    @torch.no_grad()
    def step(self, rate: Rate) -> None:
        """Move every weight towards zero by rate · strength."""
        for name in self.names:
            parameter = self.module.get_parameter(name)
            parameter.copy_(soft_threshold(parameter, rate(parameter) * self.strength))


class GroupLasso(Penalty):
    """strength · Σ √n · ‖w‖₂ over units of channel groups: the n weights that read a unit vanish together.

    A unit that nobody reads can be removed, and the model computes the same. Each weight reads one unit, so that
    no groups overlap and the proximal step is exact.

    Source: Yuan & Lin 2006; Wen et al. 2016 (structured sparsity).
    """

    def __init__(self, module: nn.Module, units: Sequence[Units], strength: float) -> None:
        super().__init__(module, strength)
        self.units = tuple(units)

    def value(self) -> Tensor:
        """Return strength · Σ √n · ‖w‖₂."""
        sums = [(item.sizes.sqrt() * item.norms(self.module.get_parameter)).sum() for item in self.units]
        return self.strength * torch.stack(sums).sum() if sums else torch.zeros(())

    @torch.no_grad()
    def step(self, rate: Rate) -> None:
        """Scale what reads each unit so that its norm falls by rate · strength · √n, at most to zero."""
        for item in self.units:
            rates = [rate(self.module.get_parameter(part.tensor)) for part in item.reads]
            norms = item.norms(self.module.get_parameter)
            factor = shrink_factor(norms, max(rates) * self.strength * item.sizes.sqrt())
            for part, own in zip(item.reads, rates, strict=True):
                if own:  # what the optimizer does not train stays as it is
                    parameter = self.module.get_parameter(part.tensor)
                    parameter.mul_(part.spread(factor, parameter))


@contextmanager
def proximal_steps(penalty: Penalty) -> Iterator[None]:
    """Take a penalty's proximal step after every step of whatever optimizer trains its module.

    Optimizers that hold none of the module's parameters are left alone. The step's size is the learning rate that
    the optimizer has for the parameter at that time, as with decoupled weight decay.
    """

    def rates(optimizer: Optimizer) -> dict[int, float]:
        return {id(item): float(group["lr"]) for group in optimizer.param_groups for item in group["params"]}

    def is_ours(found: dict[int, float]) -> bool:
        return any(id(parameter) in found for parameter in penalty.module.parameters())

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if is_ours(rates(optimizer)):
            penalty.before()

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found = rates(optimizer)
        if is_ours(found):
            penalty.step(lambda parameter: found.get(id(parameter), 0.0))

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
