"""What the passes that remove channels, heads and neurons share: options, choice and removal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from sqcompile.channels.budget import BUDGETS, Budgeted
from sqcompile.channels.compensate import compensate, losses
from sqcompile.channels.cost import Costs
from sqcompile.channels.flow import Flow, flow_of
from sqcompile.channels.groups import Group, Groups, find_groups
from sqcompile.channels.importance import NEEDS_DATA, Importance, score_units
from sqcompile.channels.select import (
    Choice,
    Scope,
    Scores,
    choose_by_budget,
    choose_by_ratio,
    without_overlap,
)
from sqcompile.channels.shrink import Shrink
from sqcompile.errors import ChannelGroupError
from sqcompile.evaluate import run_watched
from sqcompile.layers import layers_of, select_layers
from sqcompile.levels import Level
from sqcompile.metrics import DistanceMeter
from sqcompile.pipeline import Keeps, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.rewrite import Rewriter
from sqcompile.text import locate


class Removal(Budgeted, register=False):
    """Base of the passes that remove units of channel groups; it has no name of its own.

    Attributes:
        importance: What units are ranked by.
        scope: Whether every group loses alike, and if not, how their units compare.
        round_to: What is left of a group is a multiple of this.
        layers: Patterns of the layers that make what is removed.
        exclude: Patterns of layers to leave as they are.
        compensate: Whether the layers that read what is removed are refitted.
        compensate_behind: Whether those that read what these make are, too.
        max_bytes: Memory for the values of all batches at one place of the graph while they are.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.interface()

    importance: Importance = "l2"
    scope: Scope = "layer"
    round_to: int = 1
    layers: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    compensate: bool = False
    compensate_behind: bool = False
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        self.check_options()

    def check_options(self) -> None:
        """Refuse options that are out of range or contradict each other.

        Raises:
            PassOptionError: If they do.
        """
        if self.budget is None:
            raise self.reject_option("ratio", f"one of {', '.join(BUDGETS)}")
        self.check_budget()
        if self.compensate_behind and not self.compensate:
            raise self.reject_option("compensate_behind", "nothing without compensate, which it extends")
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
        choice, facts = self._choice(program, groups, chosen, costs, context)
        for group in chosen:
            if group.name not in choice.removed and self.ratio:
                context.remark(
                    group.node, f"keeps all its {len(group)} {group.kind}: {self._why_none(group)}"
                )
        edit = Rewriter(program, self.name)
        shrink = Shrink(groups.flow, edit, choice.atoms(chosen))
        after = costs.macs(shrink.factors)
        if choice.removed:
            self._take(
                edit, shrink, _losing(chosen, choice), context, context.remark, behind=self.compensate_behind
            )
        facts |= {
            "kept": {name: _kept(chosen, name, gone) for name, gone in choice.removed.items()},
            "macs": {"before": before, "after": after},
        }
        return PassResult(changes=edit.finish(), facts=facts)

    def _take(
        self,
        edit: Rewriter,
        shrink: Shrink,
        losing: Sequence[Group],
        context: PassContext,
        remark: Callable[[fx.Node, str], None],
        *,
        behind: bool = False,
    ) -> None:
        """Remove the units, and refit what read them if that is asked for."""
        if not self.compensate:
            shrink.run()
            return
        dense = edit.program.snapshot()
        lost = losses(dense, losing, _keep_of(shrink), remark, behind=behind)
        shrink.run()
        compensate(edit, dense, lost, context, max_bytes=self.max_bytes)

    def _chosen(self, program: Program, groups: Groups, context: PassContext) -> list[Group]:
        """Return the groups to take from; say why others that were asked for cannot shrink."""
        kinds = self.kinds_of_units()
        layers = layers_of(program)
        names = {
            layer.name
            for layer in select_layers(layers, self.layers, self.exclude, where=f"pass {self.name}")
        }
        recurrent = {name for group in groups for name in group.layers} - {layer.name for layer in layers}

        def is_named(group: Group) -> bool:
            made = set(group.layers)
            return bool(made) and made <= names | recurrent

        def is_wanted(group: Group) -> bool:
            return group.kind in kinds and is_named(group)

        blocked = [group for group in groups.blocked if is_wanted(group)]
        found = [group for group in groups if is_wanted(group)]
        if not found and self.layers != ("*",):
            others = [group for group in (*groups.blocked, *groups) if is_named(group)]
            if blocked or others:
                raise _named_in_vain(self.name, blocked or others)
        for group in blocked:
            context.remark(group.node, f"keeps its {len(group)} {group.kind}: {group.blocked}")
        return without_overlap(found, self.ratio or 0.5)

    def _choice(
        self, program: Program, groups: Groups, chosen: Sequence[Group], costs: Costs, context: PassContext
    ) -> tuple[Choice, dict[str, Any]]:
        """Return which units go, and what was measured to find that out."""
        scores = self._scores(program, chosen, context)
        measure = costs.parameters if self.parameters is not None else costs.macs
        whole = measure()
        facts: dict[str, Any] = {}
        if self.scope == "cost":
            scores, facts = self._per_cost(program, groups.flow, chosen, scores, measure, context)

        def by_ratio(ratio: float) -> Choice:
            return choose_by_ratio(chosen, scores, ratio, scope=self.scope, round_to=self.round_to)

        if self.ratio is not None:
            return by_ratio(self.ratio), facts
        smallest = by_ratio(1 - 1e-6)

        def share(choice: Choice) -> float:
            view = Shrink(groups.flow, Rewriter(program), choice.atoms(chosen))
            return measure(view.factors) / whole

        def by_share(budget: float) -> Choice | None:
            return choose_by_budget(chosen, scores, share, budget, scope=self.scope, round_to=self.round_to)

        if self.budget in ("macs", "parameters"):
            within = by_share(getattr(self, self.budget))
            if within is None:
                raise self.unreachable(self.budget, share(smallest), "with one unit of each group")
            return within, facts

        def candidate(budget: float) -> tuple[Choice, float]:
            found = by_share(budget) or smallest
            return found, share(found)

        def shrunk(choice: Choice) -> Program:
            copy = program.snapshot()
            edit = Rewriter(copy, self.name)
            # The same graph has the same atoms.
            Shrink(flow_of(copy), edit, choice.atoms(chosen)).run()
            edit.finish()
            return copy

        choice, measured = self.meet_latency(program, Choice({}), candidate, shrunk, context)
        return choice, {**facts, "latency": measured}

    def _per_cost(
        self,
        program: Program,
        flow: Flow,
        chosen: Sequence[Group],
        scores: Scores,
        measure: Callable[..., int],
        context: PassContext,
    ) -> tuple[Scores, dict[str, Any]]:
        """Return for every unit what the outputs lose with it, per multiply-accumulate or parameter that it saves.

        Half of each group goes by itself, and the outputs are compared. What they lose is shared out among the
        units by their squared scores; a unit saves the same wherever it stands in the ranking.
        """
        whole, trials, halves = measure(), dict[str, Program](), dict[str, Choice]()
        for group in context.progress.track(chosen, "removing half of each group"):
            half = choose_by_ratio([group], scores, 0.5)
            if half.removed:
                halves[group.name] = half
                trials[group.name] = self._trial(program, group, half, context)
        meters = {name: DistanceMeter() for name in trials}
        for batch in context.batches("comparing outputs"):
            wanted = _outputs(program, batch)
            for name, trial in trials.items():
                for before, after in zip(wanted, _outputs(trial, batch), strict=True):
                    meters[name].add(before, after)
        found, noise = {}, {}
        for group in chosen:
            squares = scores[group.name] ** 2
            found[group.name] = squares
            if group.name not in trials:  # a single unit, which stays
                continue
            choice = halves[group.name]
            gone = choice.removed[group.name]
            view = Shrink(flow, Rewriter(program), choice.atoms([group]))
            saved = max(whole - measure(view.factors), 1) / len(gone)
            noise[group.name] = meters[group.name].result().noise
            found[group.name] = squares * (noise[group.name] / max(float(squares[gone].sum()), 1e-30) / saved)
        return found, {"noise without half": noise}

    def _trial(self, program: Program, group: Group, choice: Choice, context: PassContext) -> Program:
        """Return a copy of the program that has lost units of one group."""
        copy = program.snapshot()
        edit = Rewriter(copy, self.name)
        # The same graph has the same atoms.
        shrink = Shrink(flow_of(copy), edit, choice.atoms([group]))
        self._take(edit, shrink, [group], context, lambda node, reason: None)
        edit.finish()
        return copy

    def _scores(self, program: Program, chosen: Sequence[Group], context: PassContext) -> Scores:
        def batches() -> Iterable[Sequence[Any]]:
            return context.batches(f"scoring {self.kinds_of_units()[0]}")

        program.recompile()
        scores, remarks = score_units(
            program,
            chosen,
            self.importance,
            batches=batches if self.importance in NEEDS_DATA else None,
            seed=context.seed,
        )
        for group, reason in remarks:
            context.remark(group.node, reason)
        return scores

    def _why_none(self, group: Group) -> str:
        if self.scope != "layer":
            return "they matter more than others"
        if self.round_to > 1:
            return f"what is left is a multiple of {self.round_to}"
        return "they are too few for a part of them to go"


def _named_in_vain(name: str, groups: Sequence[Group]) -> ChannelGroupError:
    first = groups[0]
    listed = [
        f"{group.name}, {len(group)} units of {group.kind}" + (f": {group.blocked}" if group.blocked else "")
        for group in groups[:3]
    ]
    return ChannelGroupError(
        f"{name} cannot take anything from the layers that were named.",
        where=locate(first.node if first.blocked is None else first.blocked.node),
        seen="; ".join(listed),
        expected="layers of whose outputs a part can go, of the kind that the pass removes",
        next_step="name other layers, or kinds (RemoveChannels); or change the line that ties the size",
    )


def _outputs(program: Program, batch: Sequence[Any]) -> list[Tensor]:
    values = run_watched(program, batch, (), lambda node, value: None)
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _losing(chosen: Sequence[Group], choice: Choice) -> list[Group]:
    return [group for group in chosen if group.name in choice.removed]


def _kept(chosen: Sequence[Group], name: str, gone: NDArray[np.int64]) -> list[int]:
    group = next(group for group in chosen if group.name == name)
    return [int(number) for number in np.setdiff1d(np.arange(len(group)), gone)]


def _keep_of(shrink: Shrink) -> Any:
    def keep(name: str, axis: int) -> NDArray[np.bool_]:
        return shrink.keep(shrink.flow.tensors[name][axis])

    return keep
