"""What is known of values that depend on positions only: indices, and comparisons of indices.

Language models compute masks and positions from ranges in a dozen ways. Here they become what they are: a sum
of multiples of indices, or "the key lies within a window before the query". Every rule is exact, so that what
is found is proven; where there is no rule, nothing is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy

from sqcompile.backends.native.plan import Plan, Shape, Size, Step, Value

LOW = -1e30
"""Scores below this have no weight: exp(score - largest) is 0 in float32."""

_INTEGERS = ("i64", "i32", "boolean")


@dataclass(frozen=True)
class Affine:
    """Element [i, j, ..] is `offset` plus `slope` times the index, for each (dimension, slope)."""

    slopes: tuple[tuple[int, int], ...]
    offset: int

    @property
    def number(self) -> int | None:
        """The one number that all elements are, if they are."""
        return None if self.slopes else self.offset

    def slope(self, dimension: int) -> int:
        """Return how much an element grows with an index."""
        return dict(self.slopes).get(dimension, 0)


@dataclass(frozen=True)
class Band:
    """True where low <= key - query <= high, the indices of two dimensions; None: no bound."""

    query: int
    key: int
    low: int | None
    high: int | None


Known: TypeAlias = Affine | Band


def affine(slopes: Mapping[int, int], offset: int) -> Affine:
    """Return a sum without the terms that are zero."""
    return Affine(tuple(sorted((d, slope) for d, slope in slopes.items() if slope)), offset)


def match_groups(before: Shape, after: Shape) -> list[tuple[list[int], list[int]]] | None:
    """Return which dimensions of a tensor become which when it is reshaped, in the smallest groups.

    Dimensions of size 1 are in no group. None if the sizes cannot be followed.
    """
    left = [(d, size) for d, size in enumerate(before) if size != 1]
    right = [(d, size) for d, size in enumerate(after) if size != 1]
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        a, b, first_i, first_j = left[i][1], right[j][1], i, j
        i, j = i + 1, j + 1
        while sympy.simplify(a - b) != 0:
            smaller_first = _divides(a, b)
            if smaller_first and i < len(left):
                a, i = a * left[i][1], i + 1
            elif not smaller_first and j < len(right):
                b, j = b * right[j][1], j + 1
            else:
                return None
        found.append(([d for d, _ in left[first_i:i]], [d for d, _ in right[first_j:j]]))
    return found if i == len(left) and j == len(right) else None


def match_dimensions(before: Shape, after: Shape) -> dict[int, int] | None:
    """Return which dimension of a reshaped tensor is which one before, as {after: before}.

    Those that are split or merged are left out. None if the sizes cannot be followed.
    """
    groups = match_groups(before, after)
    return None if groups is None else {b[0]: a[0] for a, b in groups if len(a) == len(b) == 1}


def _divides(a: Size, b: Size) -> bool:
    """Whether `a` is the smaller of two products, as far as that can be told."""
    ratio = sympy.simplify(sympy.sympify(b) / sympy.sympify(a))
    if ratio.is_number:
        return bool(ratio > 1)
    return not sympy.fraction(ratio)[1].free_symbols


class Positions:
    """What is known of the values of a plan.

    Args:
        plan: The plan.
        shapes: The shape of each value, by its number.
        inputs: What is known of inputs, by value.
    """

    def __init__(self, plan: Plan, shapes: Mapping[int, Shape], inputs: Mapping[Value, Known]) -> None:
        self.plan = plan
        self.shapes = shapes
        self._known: dict[int, Known] = {}
        self._makers: dict[int, Step] = {}
        self._late: dict[int, float | None] = {}
        for value in plan.values:
            if value.kind == "constant" and value.dtype in _INTEGERS and value.layout == "plain":
                array = plan.tensors[value.source]
                if array.size and (array == array.flat[0]).all():
                    self._known[value.index] = Affine((), int(array.flat[0]))
        for value, known in inputs.items():
            self._known[value.index] = known
        for step in plan.steps:
            for output in step.outputs:
                self._makers[output.index] = step
            rule = _RULES.get(step.operator)
            if rule is None or len(step.outputs) != 1 or step.outputs[0].dtype not in _INTEGERS:
                continue
            found = rule(self, step)
            if isinstance(found, Affine):
                shape = shapes[step.outputs[0].index]
                found = affine({d: slope for d, slope in found.slopes if shape[d] != 1}, found.offset)
            if found is not None:
                self._known[step.outputs[0].index] = found

    def of(self, value: Value | None) -> Known | None:
        """Return what is known of a value, or None."""
        return None if value is None else self._known.get(value.index)

    def late(self, value: Value) -> float | None:
        """Return the number that all elements [.., query, key] with key > query are, or are below, or None."""
        if value.index not in self._late:
            self._late[value.index] = self._find_late(value)
        return self._late[value.index]

    def _find_late(self, value: Value) -> float | None:
        known = self.of(value)
        if isinstance(known, Affine):
            return known.number
        if isinstance(known, Band):
            if (known.query, known.key) != (value.rank - 2, value.rank - 1):
                return None
            if known.high is None:
                return 1 if known.low is not None and known.low <= 1 else None
            return 0 if known.high <= 0 else None
        if value.kind == "constant":
            array = self.plan.tensors[value.source]
            return float(array.flat[0]) if array.size == 1 and value.layout == "plain" else None
        step = self._makers.get(value.index)
        if step is None or any(item is None for item in step.inputs):
            return None
        items = [item for item in step.inputs if item is not None]
        match step.operator:
            case "cast" | "contiguous" | "dense_rows":
                return self.late(items[0])
            case "reshape" | "expand":
                shape = self.shapes[items[0].index]
                same = shape[-2:] == self.shapes[value.index][-2:] and value.rank >= 2
                return self.late(items[0]) if same or all(size == 1 for size in shape) else None
            case "logical_not":
                inner = self.late(items[0])
                return None if inner is None else float(not inner)
            case "bit_and":
                found = [self.late(item) for item in items]
                return 0 if 0 in found else None if None in found else 1
            case "where":
                condition = self.late(items[0])
                return None if condition is None else self.late(items[1 if condition else 2])
            case "add":
                found = [self.late(item) for item in items]
                low = [number for number in found if number is not None and number <= LOW]
                return min(low) if low else None
            case "softmax":
                inner = self.late(items[0])
                return 0 if inner is not None and inner <= LOW else None
        return None

    # --- one rule a kind of operator --------------------------------------------------------------

    def _iota(self, step: Step) -> Known | None:
        first, slope = step.ints
        return affine({0: slope}, first) if isinstance(first, int) and isinstance(slope, int) else None

    def _moved(self, known: Known | None, places: Mapping[int, int]) -> Known | None:
        """Follow dimensions to new places, as {old: new}."""
        if isinstance(known, Affine) and all(d in places for d, _ in known.slopes):
            return affine({places[d]: slope for d, slope in known.slopes}, known.offset)
        if isinstance(known, Band) and known.query in places and known.key in places:
            return Band(places[known.query], places[known.key], known.low, known.high)
        return None

    def _same(self, step: Step) -> Known | None:
        return self.of(step.inputs[0])

    def _reshape(self, step: Step) -> Known | None:
        source = step.inputs[0]
        assert source is not None
        found = match_dimensions(self.shapes[source.index], self.shapes[step.outputs[0].index])
        return self._moved(self.of(source), {old: new for new, old in (found or {}).items()})

    def _permute(self, step: Step) -> Known | None:
        return self._moved(self.of(step.inputs[0]), {int(old): new for new, old in enumerate(step.ints)})

    def _expand(self, step: Step) -> Known | None:
        source = step.inputs[0]
        assert source is not None
        added = step.outputs[0].rank - source.rank
        return self._moved(self.of(source), {d: d + added for d in range(source.rank)})

    def _slice(self, step: Step) -> Known | None:
        axis, first, stride = step.ints
        known = self.of(step.inputs[0])
        if not isinstance(axis, int) or known is None:
            return None
        if isinstance(known, Affine) and not known.slope(axis):
            return known
        if not isinstance(first, int) or not isinstance(stride, int):
            return None
        if isinstance(known, Band):
            whole = axis not in (known.query, known.key) or (first, stride) == (0, 1)
            return known if whole else None
        slope = known.slope(axis)
        return affine({**dict(known.slopes), axis: slope * stride}, known.offset + slope * first)

    def _cast(self, step: Step) -> Known | None:
        known = self.of(step.inputs[0])
        if step.outputs[0].dtype != "boolean" or isinstance(known, Band):
            return known if isinstance(known, Affine) or step.outputs[0].dtype == "boolean" else None
        return None if known is None or known.number is None else Affine((), int(known.number != 0))

    def _operands(self, step: Step) -> tuple[Affine, Affine] | None:
        """Return both operands with the dimensions of the result."""
        found = []
        for item in step.inputs:
            known = self.of(item)
            if item is None or not isinstance(known, Affine):
                return None
            added = step.outputs[0].rank - item.rank
            found.append(affine({d + added: slope for d, slope in known.slopes}, known.offset))
        return found[0], found[1]

    def _sum(self, step: Step) -> Known | None:
        operands = self._operands(step)
        return None if operands is None else _combine(*operands, 1 if step.operator == "add" else -1)

    def _product(self, step: Step) -> Known | None:
        operands = self._operands(step)
        if operands is None:
            return None
        for one, other in (operands, operands[::-1]):
            if one.number is not None:
                factor = one.number
                return affine({d: s * factor for d, s in other.slopes}, other.offset * factor)
        return None

    def _compare(self, step: Step) -> Known | None:
        operands = self._operands(step)
        if operands is None:
            return None
        difference = _combine(*operands, -1)
        offset = difference.offset
        if difference.number is not None:
            holds = {"eq": offset == 0, "ne": offset != 0, "lt": offset < 0, "le": offset <= 0}
            return Affine((), int(holds[step.operator]))
        if step.operator not in ("lt", "le") or len(difference.slopes) != 2:
            return None
        (query, down), (key, up) = difference.slopes
        strict = int(step.operator == "lt")
        if (down, up) == (-1, 1):
            return Band(query, key, None, -offset - strict)
        return Band(query, key, offset + strict, None) if (down, up) == (1, -1) else None

    def _and(self, step: Step) -> Known | None:
        items = []
        for item in step.inputs:
            known = self.of(item)
            if item is None or known is None:
                return None
            added = step.outputs[0].rank - item.rank
            items.append(self._moved(known, {d: d + added for d in range(item.rank)}))
        if step.outputs[0].dtype != "boolean":
            return None
        for one, other in (items, items[::-1]):
            if isinstance(one, Affine) and one.number is not None:
                return other if one.number else one
        a, b = items
        if not isinstance(a, Band) or not isinstance(b, Band) or (a.query, a.key) != (b.query, b.key):
            return None
        low = [bound for bound in (a.low, b.low) if bound is not None]
        high = [bound for bound in (a.high, b.high) if bound is not None]
        return Band(a.query, a.key, max(low, default=None), min(high, default=None))

    def _not(self, step: Step) -> Known | None:
        known = self.of(step.inputs[0])
        if isinstance(known, Band):
            if known.low is None and known.high is not None:
                return Band(known.query, known.key, known.high + 1, None)
            if known.high is None and known.low is not None:
                return Band(known.query, known.key, None, known.low - 1)
            return None
        number = known.number if isinstance(known, Affine) else None
        return None if number is None else Affine((), int(not number))

    def _where(self, step: Step) -> Known | None:
        condition = self.of(step.inputs[0])
        if not isinstance(condition, Affine) or condition.number is None:
            return None
        chosen = step.inputs[1 if condition.number else 2]
        assert chosen is not None
        added = step.outputs[0].rank - chosen.rank
        return self._moved(self.of(chosen), {d: d + added for d in range(chosen.rank)})

    def _cat(self, step: Step) -> Known | None:
        """Pieces that go on as the last one does."""
        axis, start, starts = step.ints[0], 0, []
        for item in step.inputs[:-1]:
            assert item is not None and isinstance(axis, int)
            size = self.shapes[item.index][axis]
            if not isinstance(size, int):
                return None
            starts.append(start)
            start += size
        pieces = [self.of(item) for item in step.inputs]
        last = pieces[-1]
        if not isinstance(last, Affine) or not isinstance(axis, int):
            return None
        slope = last.slope(axis)
        whole = affine(dict(last.slopes), last.offset - slope * start)
        for item, piece, at in zip(step.inputs, pieces, starts, strict=False):
            assert item is not None
            if not isinstance(piece, Affine):
                return None
            slopes = (
                {**dict(piece.slopes), axis: slope}
                if self.shapes[item.index][axis] == 1
                else dict(piece.slopes)
            )
            if affine(slopes, piece.offset - slope * at) != whole:
                return None
        return whole

    def _cumsum(self, step: Step) -> Known | None:
        known = self.of(step.inputs[0])
        number = known.number if isinstance(known, Affine) else None
        return None if number is None else affine({step.outputs[0].rank - 1: number}, number)

    def _index(self, step: Step) -> Known | None:
        known, first = self.of(step.inputs[0]), step.ints[0]
        indices = step.inputs[1:]
        if not isinstance(known, Affine) or not isinstance(first, int):
            return None
        rank = max((item.rank for item in indices if item is not None), default=0)
        offset = known.offset
        slopes: dict[int, int] = {}
        for d, slope in known.slopes:
            if first <= d < first + len(indices):
                item = indices[d - first]
                index = self.of(item)
                if item is None or not isinstance(index, Affine):
                    return None
                if index.offset < 0 or any(factor < 0 for _, factor in index.slopes):
                    return None  # negative indices count from the end
                offset += slope * index.offset
                for own, factor in index.slopes:
                    place = first + rank - item.rank + own
                    slopes[place] = slopes.get(place, 0) + slope * factor
            else:
                slopes[d if d < first else d - len(indices) + rank] = slope
        return affine(slopes, offset)

    def _any(self, step: Step) -> Known | None:
        """Of equal elements, and there is at least one."""
        known = self.of(step.inputs[0])
        return known if isinstance(known, Affine) and known.number is not None else None


def _combine(a: Affine, b: Affine, sign: int) -> Affine:
    slopes = dict(a.slopes)
    for d, slope in b.slopes:
        slopes[d] = slopes.get(d, 0) + sign * slope
    return affine(slopes, a.offset + sign * b.offset)


_RULES: dict[str, Any] = {
    "iota": Positions._iota,
    "contiguous": Positions._same,
    "dense_rows": Positions._same,
    "reshape": Positions._reshape,
    "permute": Positions._permute,
    "expand": Positions._expand,
    "slice": Positions._slice,
    "cast": Positions._cast,
    "add": Positions._sum,
    "sub": Positions._sum,
    "mul": Positions._product,
    "eq": Positions._compare,
    "ne": Positions._compare,
    "lt": Positions._compare,
    "le": Positions._compare,
    "bit_and": Positions._and,
    "logical_not": Positions._not,
    "where": Positions._where,
    "cat": Positions._cat,
    "cumsum": Positions._cumsum,
    "index": Positions._index,
    "reduce_any": Positions._any,
    "reduce_all": Positions._any,
    "reduce_max": Positions._any,
    "reduce_min": Positions._any,
}
