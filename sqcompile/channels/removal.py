"""What the passes that remove channels, heads and neurons share: options, choice and removal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from sqcompile.channels.compensate import compensate, losses
from sqcompile.channels.cost import Costs
from sqcompile.channels.groups import Group, Groups, find_groups
from sqcompile.channels.importance import NEEDS_DATA, Importance, score_units
from sqcompile.channels.select import Choice, choose_by_budget, choose_by_ratio, without_overlap
from sqcompile.channels.shrink import Shrink
from sqcompile.errors import PassOptionError
from sqcompile.layers import layers_of, select_layers
from sqcompile.levels import Level
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter


class Removal(Pass, register=False):
    """Base of the passes that remove units of channel groups; it has no name of its own.

    Attributes:
        ratio: Fraction of units to remove.
        macs: Instead: fraction of the multiply-accumulates that may be left.
        parameters: Instead: fraction of the parameters that may be left.
        importance: What units are ranked by.
        scope: Whether every group loses alike.
        round_to: What is left of a group is a multiple of this.
        layers: Patterns of the layers that make what is removed.
        exclude: Patterns of layers to leave as they are.
        compensate: Whether the layers that read what is removed are refitted.
        max_bytes: Memory for the values of all batches at one place of the graph while they are.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.interface()

    ratio: float | None = None
    macs: float | None = None
    parameters: float | None = None
    importance: Importance = "l2"
    scope: Literal["layer", "global"] = "layer"
    round_to: int = 1
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    compensate: bool = False
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        self.check_options()

    def check_options(self) -> None:
        """Refuse options that are out of range or contradict each other.

        Raises:
            PassOptionError: If they do.
        """
        given = [name for name in ("ratio", "macs", "parameters") if getattr(self, name) is not None]
        if len(given) != 1:
            raise self.reject_option(given[-1] if given else "ratio", "one of ratio, macs and parameters")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise self.reject_option("ratio", "a fraction r of units to remove, 0 ≤ r < 1")
        for name in ("macs", "parameters"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise self.reject_option(name, "a fraction of what there is that may be left, 0 < f ≤ 1")
        if self.round_to < 1:
            raise self.reject_option("round_to", "1 or more")

    def kinds_of_units(self) -> tuple[str, ...]:
        """Return the kinds of groups that the pass takes from."""
        raise NotImplementedError

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Find groups, rank their units, and remove those that matter least."""
        groups = find_groups(program)
        chosen = self._chosen(program, groups, context)
        if not chosen:
            context.remark("program", f"has no {' or '.join(self.kinds_of_units())} that could go")
            return PassResult()
        costs = Costs(groups.flow)
        before = costs.macs()
        choice = self._choice(program, groups, chosen, costs, context)
        for group in chosen:
            if group.name not in choice.removed and self.ratio:
                context.remark(
                    group.node, f"keeps all its {len(group)} {group.kind}: {self._why_none(group)}"
                )
        edit = Rewriter(program, self.name)
        shrink = Shrink(groups.flow, edit, choice.atoms(chosen))
        after = costs.macs(shrink.factors)
        if choice.removed:
            dense = program.snapshot() if self.compensate else None
            lost = (
                []
                if dense is None
                else losses(dense, _losing(chosen, choice), _keep_of(shrink), context.remark)
            )
            shrink.run()
            if dense is not None:
                compensate(edit, dense, lost, context, max_bytes=self.max_bytes)
        facts: dict[str, Any] = {
            "kept": {name: _kept(chosen, name, gone) for name, gone in choice.removed.items()},
            "macs": {"before": before, "after": after},
        }
        return PassResult(changes=edit.finish(), facts=facts)

    def _chosen(self, program: Program, groups: Groups, context: PassContext) -> list[Group]:
        """Return the groups to take from; say why others that were asked for cannot shrink."""
        kinds = self.kinds_of_units()
        layers = layers_of(program)
        names = {
            layer.name
            for layer in select_layers(layers, self.layers, self.exclude, where=f"pass {self.name}")
        }
        recurrent = {name for group in groups for name in group.layers} - {layer.name for layer in layers}

        def is_wanted(group: Group) -> bool:
            made = set(group.layers)
            return group.kind in kinds and bool(made) and made <= names | recurrent

        for group in groups.blocked:
            if is_wanted(group):
                context.remark(group.node, f"keeps its {len(group)} {group.kind}: {group.blocked}")
        return without_overlap([group for group in groups if is_wanted(group)], self.ratio or 0.5)

    def _choice(
        self, program: Program, groups: Groups, chosen: Sequence[Group], costs: Costs, context: PassContext
    ) -> Choice:
        needs_data = self.importance in NEEDS_DATA

        def batches() -> Iterable[Sequence[Any]]:
            return context.batches(f"scoring {self.kinds_of_units()[0]}")

        program.recompile()
        scores, remarks = score_units(
            program,
            chosen,
            self.importance,
            batches=batches if needs_data else None,
            seed=context.seed,
        )
        for group, reason in remarks:
            context.remark(group.node, reason)
        together = self.scope == "global"
        if self.ratio is not None:
            return choose_by_ratio(chosen, scores, self.ratio, together=together, round_to=self.round_to)
        name, budget = ("macs", self.macs) if self.macs is not None else ("parameters", self.parameters)
        assert budget is not None
        measure = costs.macs if name == "macs" else costs.parameters

        def cost(choice: Choice) -> float:
            view = Shrink(groups.flow, Rewriter(program), choice.atoms(chosen))
            return measure(view.factors)

        whole = measure()
        choice = choose_by_budget(
            chosen, scores, cost, budget * whole, together=together, round_to=self.round_to
        )
        if choice is None:
            smallest = choose_by_ratio(chosen, scores, 1 - 1e-6, together=together, round_to=self.round_to)
            raise PassOptionError(
                f"{self.name} cannot bring the {name} down that far.",
                where=f"pass {self.name}",
                seen=f"{name}={budget:g}",
                expected=f"{cost(smallest) / whole:.3f} or more: so much is left with one unit of each group",
                next_step="ask for less, or remove other kinds of units as well",
            )
        return choice

    def _why_none(self, group: Group) -> str:
        if self.scope == "global":
            return "they matter more than others"
        if self.round_to > 1:
            return f"what is left is a multiple of {self.round_to}"
        return "they are too few for a part of them to go"


def _losing(chosen: Sequence[Group], choice: Choice) -> list[Group]:
    return [group for group in chosen if group.name in choice.removed]


def _kept(chosen: Sequence[Group], name: str, gone: NDArray[np.int64]) -> list[int]:
    group = next(group for group in chosen if group.name == name)
    return [int(number) for number in np.setdiff1d(np.arange(len(group)), gone)]


def _keep_of(shrink: Shrink) -> Any:
    def keep(name: str, axis: int) -> NDArray[np.bool_]:
        return shrink.keep(shrink.flow.tensors[name][axis])

    return keep
