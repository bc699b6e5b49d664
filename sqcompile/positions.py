"""What is known of values that depend on positions only: indices, and comparisons of indices.

Language models compute masks and positions from ranges in a dozen ways. Here they become what they are: a sum
of multiples of indices, or "the key lies within a window before the query". Every rule is exact, so that what
is found is proven; where there is no rule, nothing is known. A backend that lets a model continue texts piece by
piece follows its own operators with these rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy

Size: TypeAlias = Any
"""A number, or an expression of symbols."""

LOW = -1e30
"""Scores below this have no weight: exp(score - largest) is 0 in float32."""


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


# --- rules -------------------------------------------------------------------------------------------


def moved(known: Known | None, places: Mapping[int, int]) -> Known | None:
    """Follow dimensions to new places, as {old: new}."""
    if isinstance(known, Affine) and all(d in places for d, _ in known.slopes):
        return affine({places[d]: slope for d, slope in known.slopes}, known.offset)
    if isinstance(known, Band) and known.query in places and known.key in places:
        return Band(places[known.query], places[known.key], known.low, known.high)
    return None


def raised(known: Known | None, rank: int, result: int) -> Known | None:
    """Follow a value of one rank to a greater one, as broadcasting does."""
    return moved(known, {d: d + result - rank for d in range(rank)})


def without_ones(known: Known | None, shape: Sequence[Size]) -> Known | None:
    """Leave out what grows along dimensions that have one index."""
    if not isinstance(known, Affine):
        return known
    return affine({d: slope for d, slope in known.slopes if shape[d] != 1}, known.offset)


def sliced(known: Known | None, axis: int, first: Size, stride: Size) -> Known | None:
    """Return what is known of every `stride`-th element of a dimension, from `first` on."""
    if known is None or (isinstance(known, Affine) and not known.slope(axis)):
        return known
    if not isinstance(first, int) or not isinstance(stride, int):
        return None
    if isinstance(known, Band):
        whole = axis not in (known.query, known.key) or (first, stride) == (0, 1)
        return known if whole else None
    slope = known.slope(axis)
    return affine({**dict(known.slopes), axis: slope * stride}, known.offset + slope * first)


def combined(a: Affine, b: Affine, sign: int) -> Affine:
    """Return a + sign · b, for operands of one rank."""
    slopes = dict(a.slopes)
    for d, slope in b.slopes:
        slopes[d] = slopes.get(d, 0) + sign * slope
    return affine(slopes, a.offset + sign * b.offset)


def multiplied(a: Affine, b: Affine) -> Affine | None:
    """Return a · b, for operands of one rank, one of them a number."""
    for one, other in ((a, b), (b, a)):
        if one.number is not None:
            factor = one.number
            return affine({d: s * factor for d, s in other.slopes}, other.offset * factor)
    return None


def compared(operator: str, a: Affine, b: Affine) -> Known | None:
    """Return a < b and the like, for operands of one rank; the operators are eq, ne, lt and le."""
    difference = combined(a, b, -1)
    offset = difference.offset
    if difference.number is not None:
        holds = {"eq": offset == 0, "ne": offset != 0, "lt": offset < 0, "le": offset <= 0}
        return Affine((), int(holds[operator]))
    if operator not in ("lt", "le") or len(difference.slopes) != 2:
        return None
    (query, down), (key, up) = difference.slopes
    strict = int(operator == "lt")
    if (down, up) == (-1, 1):
        return Band(query, key, None, -offset - strict)
    return Band(query, key, offset + strict, None) if (down, up) == (1, -1) else None


def both(a: Known | None, b: Known | None) -> Known | None:
    """Return a and b, for booleans of one rank."""
    if a is None or b is None:
        return None
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Affine) and one.number is not None:
            return other if one.number else one
    if not isinstance(a, Band) or not isinstance(b, Band) or (a.query, a.key) != (b.query, b.key):
        return None
    low = [bound for bound in (a.low, b.low) if bound is not None]
    high = [bound for bound in (a.high, b.high) if bound is not None]
    return Band(a.query, a.key, max(low, default=None), min(high, default=None))


def negated(known: Known | None) -> Known | None:
    """Return what is true where this is not."""
    if isinstance(known, Band):
        if known.low is None and known.high is not None:
            return Band(known.query, known.key, known.high + 1, None)
        if known.high is None and known.low is not None:
            return Band(known.query, known.key, None, known.low - 1)
        return None
    number = known.number if isinstance(known, Affine) else None
    return None if number is None else Affine((), int(not number))


def as_boolean(known: Known | None) -> Known | None:
    """Return whether elements are other than zero."""
    if known is None or isinstance(known, Band):
        return known
    return None if known.number is None else Affine((), int(known.number != 0))


def cumulated(known: Known | None, axis: int) -> Known | None:
    """Return the sums of equal elements up to each one of a dimension, itself included."""
    number = known.number if isinstance(known, Affine) else None
    return None if number is None else affine({axis: number}, number)


def joined(pieces: Sequence[tuple[Known | None, Size]], axis: int) -> Known | None:
    """Return what is known of pieces behind each other, if they go on as the last one does.

    Args:
        pieces: What is known of each, and its size along the dimension.
        axis: The dimension.
    """
    start, starts = 0, []
    for _, size in pieces[:-1]:
        if not isinstance(size, int):
            return None
        starts.append(start)
        start += size
    last = pieces[-1][0]
    if not isinstance(last, Affine):
        return None
    slope = last.slope(axis)
    whole = affine(dict(last.slopes), last.offset - slope * start)
    for (piece, size), at in zip(pieces, starts, strict=False):
        if not isinstance(piece, Affine):
            return None
        slopes = {**dict(piece.slopes), axis: slope} if size == 1 else dict(piece.slopes)
        if affine(slopes, piece.offset - slope * at) != whole:
            return None
    return whole


def indexed(known: Known | None, first: int, indices: Sequence[tuple[Known | None, int]]) -> Known | None:
    """Return what is known of elements that are looked up by indices of adjacent dimensions.

    Args:
        known: What is known of the value.
        first: The first dimension that has indices.
        indices: What is known of each tensor of indices, and its rank.
    """
    if not isinstance(known, Affine):
        return None
    rank = max((own for _, own in indices), default=0)
    offset = known.offset
    slopes: dict[int, int] = {}
    for d, slope in known.slopes:
        if first <= d < first + len(indices):
            index, own_rank = indices[d - first]
            if not isinstance(index, Affine):
                return None
            if index.offset < 0 or any(factor < 0 for _, factor in index.slopes):
                return None  # negative indices count from the end
            offset += slope * index.offset
            for own, factor in index.slopes:
                place = first + rank - own_rank + own
                slopes[place] = slopes.get(place, 0) + slope * factor
        else:
            slopes[d if d < first else d - len(indices) + rank] = slope
    return affine(slopes, offset)


# --- reshapes ----------------------------------------------------------------------------------------


def match_groups(before: Sequence[Size], after: Sequence[Size]) -> list[tuple[list[int], list[int]]] | None:
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


def match_dimensions(before: Sequence[Size], after: Sequence[Size]) -> dict[int, int] | None:
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
