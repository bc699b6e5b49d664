"""Choosing which units go: so many of every group, or of all together, or as many as a budget asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sqcompile.channels.groups import Group
from sqcompile.sparsity import removed_count

Scores = Mapping[str, NDArray[np.float64]]
"""Importance of every unit, by name of the group."""

Scope = Literal["layer", "global", "cost"]
"""Which units are compared: those of one group; of all, relative to their group's mean; of all, as they are."""


@dataclass(frozen=True)
class Choice:
    """Which units of which groups go.

    Attributes:
        removed: Numbers of the units that go, sorted, by name of the group.
    """

    removed: Mapping[str, NDArray[np.int64]]

    def atoms(self, groups: Sequence[Group]) -> NDArray[np.int64]:
        """Return the atoms that go."""
        chosen = [group.units[self.removed[group.name]] for group in groups if group.name in self.removed]
        return np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)


def choose_by_ratio(
    groups: Sequence[Group], scores: Scores, ratio: float, *, scope: Scope = "layer", round_to: int = 1
) -> Choice:
    """Choose the least important units.

    Args:
        groups: Groups to take from.
        scores: Importance of each unit; larger is kept. Ties go by position, the later first kept.
        ratio: Fraction of units to remove, 0 ≤ ratio < 1, rounded down.
        scope: `layer` ranks the units of each group by themselves, the others those of all groups together:
            `global` with scores divided by their group's mean, `cost` with scores that compare as they are.
        round_to: What is left of a group is a multiple of this, where the group has that many.
    """
    if scope == "layer":
        counts = {group.name: removed_count(len(group), ratio) for group in groups}
    else:
        counts = _common_counts(groups, scores, ratio, relative=scope == "global")
    removed = {}
    for group in groups:
        count = _rounded(len(group), counts[group.name], round_to)
        if count:
            order = np.argsort(scores[group.name], kind="stable")
            removed[group.name] = np.sort(order[:count])
    return Choice(removed)


def choose_by_budget(
    groups: Sequence[Group],
    scores: Scores,
    cost: Callable[[Choice], float],
    budget: float,
    *,
    scope: Scope = "layer",
    round_to: int = 1,
) -> Choice | None:
    """Choose as few units as bring the cost down to a budget.

    Args:
        groups: Groups to take from.
        scores: Importance of each unit.
        cost: What the program costs without the units of a choice.
        budget: What it may cost.
        scope: As in `choose_by_ratio`.
        round_to: As in `choose_by_ratio`.

    Returns:
        The choice, or None if even the largest costs more.
    """

    def at(ratio: float) -> Choice:
        return choose_by_ratio(groups, scores, ratio, scope=scope, round_to=round_to)

    low, high = 0.0, 1.0 - 1e-6
    best = at(low)
    if cost(best) <= budget:
        return best
    best = at(high)
    if cost(best) > budget:
        return None
    for _ in range(16):  # a change of 1 / 65536 of the units is none
        middle = (low + high) / 2
        choice = at(middle)
        if cost(choice) <= budget:
            best, high = choice, middle
        else:
            low = middle
    return best


def without_overlap(groups: Sequence[Group], ratio: float = 0.5) -> list[Group]:
    """Return groups of which no two take from the same positions.

    Where a dimension is a product, as heads × width or groups × channels, each factor is a group. Taking
    from both would remove more than was asked for; the one stays whose units come nearest to the ratio,
    and of equal ones that with more units.
    """

    def rank(group: Group) -> tuple[float, int]:
        return removed_count(len(group), ratio) / len(group), len(group)

    taken: set[tuple[str, int, int]] = set()
    chosen = set()
    for group in sorted(groups, key=rank, reverse=True):
        places = {
            (member.tensor, member.axis, position)
            for member in group.members
            for position in member.positions.tolist()
        }
        if not places & taken:
            taken |= places
            chosen.add(group.name)
    return [group for group in groups if group.name in chosen]


def _rounded(size: int, count: int, round_to: int) -> int:
    """Return how many go, so that a multiple of `round_to` is left, and at least one unit."""
    left = max(1, size - count)
    if round_to > 1 and size >= round_to:
        left = min(size, math.ceil(left / round_to) * round_to)
    return size - left


def _common_counts(
    groups: Sequence[Group], scores: Scores, ratio: float, *, relative: bool
) -> dict[str, int]:
    """Return how many units of each group are among the least important of all."""
    if not groups:
        return {}
    ranked = [scores[group.name] for group in groups]
    if relative:
        ranked = [values / max(float(values.mean()), 1e-30) for values in ranked]
    owner = np.concatenate([np.full(len(group), index) for index, group in enumerate(groups)])
    # The most important unit of each group stays, so it is not in the ranking.
    values = np.concatenate(ranked)
    for index, group in enumerate(groups):
        start = int(np.flatnonzero(owner == index)[0])
        values[start + int(np.argmax(ranked[index]))] = math.inf
        assert len(group)
    order = np.argsort(values, kind="stable")[: removed_count(len(values), ratio)]
    order = order[np.isfinite(values[order])]
    counts = np.bincount(owner[order], minlength=len(groups))
    return {group.name: int(count) for group, count in zip(groups, counts, strict=True)}
