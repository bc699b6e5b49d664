"""Training with a penalty that drives weights or units of channels to zero."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn

from sqcompile.channels.groups import Group, find_groups
from sqcompile.gates import ExpectedL0, TrainableGated
from sqcompile.layers import layers_of, select_layers
from sqcompile.levels import Level
from sqcompile.operators.table import argument
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.pruning import choose_layers, prunable_weights, set_mask
from sqcompile.regularization import L1, GroupLasso, Penalty, Units, proximal_steps
from sqcompile.rewrite import Rewriter
from sqcompile.sparsity import Pattern
from sqcompile.training import Trainable, TrainFunction, check_function, train_program

Kind = Literal["l1", "group-lasso", "batch-norm", "l0"]
# Under a norm over the whole width a unit is never without effect.
_KINDS = ("channels", "neurons", "heads")


class TrainSparse(Pass):
    """Train with a penalty under which weights, or whole channels, neurons and heads, become exactly zero.

    Your function trains as for `FineTune`, with any optimizer and without knowing of the penalty: behind each of
    the optimizer's steps stands a proximal step of the learning rate times the strength. What is zero at the end is
    masked, so that it stays zero in later training; units that nothing reads any more have all their weights
    zero, and `RemoveChannels` finds them first and changes nothing by removing them.

    Rewrites: parameters and running statistics get new values; layer(x, @weight)  ==>  layer(x,
        mask(@weight, @weight_mask)) where weights became zero.
    Keeps: interface(): training changes the numbers.
    Rejects: with units, groups that no weight reads, or whose units share weights that read them (remark).
    Raises: TrainingError as `FineTune`; SelectionError for patterns that match no layer.
    Source: Liu et al. 2017 (batch-norm); Wen et al. 2016 (group-lasso); Louizos et al. 2018 (l0).

    Attributes:
        train: The function, or its name: `module.py:function`; as `FineTune` takes it.
        penalty: `l1` of single weights; `group-lasso` of all weights that read a unit of a channel group;
            `batch-norm`, l1 of batch norms' scales (then `remove-channels{importance=batch-norm}`); `l0`, the
            expected number of units that are read, by random gates in training (hard concrete).
        strength: What the penalty is multiplied with, beside the loss.
        layers: Patterns of layers whose weights are penalized; of batch norms by the norm's own name, of units
            by the layers that make them.
        exclude: Patterns of those to leave as they are.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.interface()

    train: TrainFunction | None = None
    penalty: Kind = "l1"
    strength: float = 1e-4
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", check_function(self.train))
        if self.train is None:
            raise self.reject_option("train", "a function of the module to train, or module.py:function")
        if not 0 < self.strength < float("inf"):
            raise self.reject_option("strength", "a positive number")

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Train under the penalty, then keep the zeros."""
        assert self.train is not None
        units = self._units(program, context) if self.penalty in ("group-lasso", "l0") else {}
        module = TrainableGated(program, list(units.values())) if self.penalty == "l0" else Trainable(program)
        penalty = self._penalty(program, module, list(units.values()), context)
        if penalty is None:
            context.remark("program", f"has nothing that '{self.penalty}' could be a penalty of")
        with ExitStack() as stack:
            if penalty is not None:
                stack.enter_context(proximal_steps(penalty))
            changes, facts = train_program(
                program, self.train, seed=context.seed, where=f"pass {self.name}", module=module
            )
        edit = Rewriter(program, self.name)
        zeros: dict[str, Any] = {}
        if isinstance(module, TrainableGated):
            _fold_gates(edit, module.factors(), units)
        if isinstance(penalty, L1):
            zeros = {name: float((program.tensor(name) == 0).float().mean()) for name in penalty.names}
            if self.penalty == "l1":
                _mask_zeros(edit, set(penalty.names), context)
        elif units:
            zeros = {
                name: _silence(edit, group, units[name])
                for name, group in self._groups(program).items()
                if name in units
            }
            names = {member.tensor for name in units for member in self._groups(program)[name].members}
            _mask_zeros(edit, names, context)
        return PassResult(changes + edit.finish(), facts={**facts, "zero": zeros})

    def _groups(self, program: Program) -> dict[str, Group]:
        return {group.name: group for group in find_groups(program) if group.kind in _KINDS}

    def _units(self, program: Program, context: PassContext) -> dict[str, Units]:
        """Return the readers of the groups to penalize, by name of the group."""
        layers = layers_of(program)
        chosen = {
            layer.name
            for layer in select_layers(layers, self.layers, self.exclude, where=f"pass {self.name}")
        }
        found = {}
        for name, group in self._groups(program).items():
            if not set(group.layers) <= chosen:
                continue
            units = Units.of(program, group)
            if isinstance(units, str):
                context.remark(group.node, f"has no penalty: {units}")
            else:
                found[name] = units
        return found

    def _penalty(
        self, program: Program, module: Trainable, units: list[Units], context: PassContext
    ) -> Penalty | None:
        where = f"pass {self.name}"
        if isinstance(module, TrainableGated):
            return ExpectedL0(module, self.strength) if units else None
        if self.penalty == "group-lasso":
            return GroupLasso(module, units, self.strength) if units else None
        if self.penalty == "l1":
            chosen = choose_layers(program, self.layers, self.exclude, (), where=where)
            names = [item.name for item in prunable_weights(program, chosen, Pattern(), context.remark)]
        else:
            names = self._scales(program)
        trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        names = [name for name in names if name in trained]
        return L1(module, names, self.strength) if names else None

    def _scales(self, program: Program) -> list[str]:
        """Return the scales of batch norms, by the names that users know the norms by."""
        found = {}
        for node in program.compute_nodes():
            stored = argument(node, 1) if node.target is torch.ops.aten.batch_norm.default else None
            if isinstance(stored, fx.Node) and stored.op == "get_attr":
                name = str(stored.target)
                found[name] = _Named(name.rpartition(".")[0] or name, "batch_norm", name)
        chosen = select_layers(list(found.values()), self.layers, self.exclude, where=f"pass {self.name}")
        return [item.tensor for item in chosen]


class _Named:
    """A batch norm, for selections."""

    def __init__(self, name: str, kind: str, tensor: str) -> None:
        self.name, self.kind, self.tensor = name, kind, tensor


def _readers(program: Program) -> dict[str, fx.Node]:
    return {str(node.target): node for node in program.graph.nodes if node.op == "get_attr"}


def _fold_gates(edit: Rewriter, factors: dict[str, Tensor], units: dict[str, Units]) -> None:
    """Multiply the weights that read units with the gates that training left."""
    readers = _readers(edit.program)
    for name, factor in factors.items():
        for part in units[name].reads:
            weight = edit.program.tensor(part.tensor).detach()
            _store(edit, readers[part.tensor], weight * part.spread(factor.detach(), weight))


def _silence(edit: Rewriter, group: Group, units: Units) -> int:
    """Zero what makes units that nothing reads, so that every ranking finds them; return how many there are."""
    program, readers = edit.program, _readers(edit.program)
    with torch.no_grad():
        silent = units.norms(lambda name: program.tensor(name)) == 0
    if not bool(silent.any()):
        return 0
    for member in group.members:
        weight = program.tensor(member.tensor).detach()
        if member.role != "makes" or not weight.is_floating_point():
            continue
        positions = torch.from_numpy(member.positions)[silent[torch.from_numpy(member.unit)]]
        _store(edit, readers[member.tensor], weight.index_fill(member.axis, positions, 0.0))
    return int(silent.sum())


def _store(edit: Rewriter, reader: fx.Node, value: Tensor) -> None:
    old = edit.program.tensor(reader)
    if not torch.equal(old, value):
        edit.replace_tensor(reader, nn.Parameter(value, requires_grad=old.requires_grad))


def _mask_zeros(edit: Rewriter, names: set[str], context: PassContext) -> None:
    """Mask what is zero in some weights."""
    program = edit.program
    chosen = [layer for layer in layers_of(program) if layer.weight_name in names]
    for weight in prunable_weights(program, chosen, Pattern(), context.remark):
        set_mask(edit, weight, weight.dense != 0, Pattern())
