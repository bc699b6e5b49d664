"""What is known of positions, against NumPy on the indices themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sqcompile.positions import (
    Affine,
    Band,
    Known,
    affine,
    as_boolean,
    both,
    combined,
    compared,
    cumulated,
    indexed,
    joined,
    match_dimensions,
    match_groups,
    moved,
    multiplied,
    negated,
    raised,
    sliced,
    without_ones,
)

SHAPE = (3, 5, 4)
Array = NDArray[np.int64]


def grid(known: Known, shape: Sequence[int] = SHAPE) -> Array:
    """The elements themselves."""
    index = np.indices(shape)
    if isinstance(known, Affine):
        total = np.full(shape, known.offset)
        for dimension, slope in known.slopes:
            total = total + slope * index[dimension]
        return total
    distance = index[known.key] - index[known.query]
    holds = np.ones(shape, bool)
    if known.low is not None:
        holds &= distance >= known.low
    if known.high is not None:
        holds &= distance <= known.high
    return holds.astype(np.int64)


def same(known: Known | None, wanted: Any) -> bool:
    assert known is not None
    return np.array_equal(grid(known, np.shape(wanted)), wanted)


SLOPES = st.dictionaries(st.integers(0, 2), st.integers(-3, 3), max_size=3)
AFFINE = st.builds(affine, SLOPES, st.integers(-9, 9))
BOUND = st.none() | st.integers(-4, 4)
BAND = st.builds(Band, st.just(0), st.just(1), BOUND, BOUND)


@given(AFFINE, AFFINE)
def test_sums_and_differences(a: Affine, b: Affine) -> None:
    assert same(combined(a, b, 1), grid(a) + grid(b))
    assert same(combined(a, b, -1), grid(a) - grid(b))
    assert (combined(a, a, -1)).number == 0


@given(AFFINE, AFFINE)
def test_products_of_which_one_is_a_number(a: Affine, b: Affine) -> None:
    found = multiplied(a, b)
    if a.number is None and b.number is None:
        assert found is None  # a square of indices is no sum of them
    else:
        assert same(found, grid(a) * grid(b))


@pytest.mark.parametrize(
    ("operator", "function"),
    [("eq", np.equal), ("ne", np.not_equal), ("lt", np.less), ("le", np.less_equal)],
)
@given(a=AFFINE, b=AFFINE)
def test_comparisons(operator: str, function: Callable[..., Any], a: Affine, b: Affine) -> None:
    found = compared(operator, a, b)
    if found is not None:  # whatever is known is true
        assert same(found, function(grid(a), grid(b)).astype(int))


@pytest.mark.parametrize("slack", [-2, 0, 3])
def test_masks_are_bands(slack: int) -> None:
    query, key = affine({0: 1}, slack), affine({1: 1}, 0)
    assert compared("le", key, query) == Band(0, 1, None, slack)
    assert compared("lt", key, query) == Band(0, 1, None, slack - 1)
    assert compared("lt", query, key) == Band(0, 1, slack + 1, None)
    assert compared("le", query, key) == Band(0, 1, slack, None)
    assert compared("eq", query, key) is None and compared("lt", query, affine({0: 1, 1: 1}, 0)) is None
    assert compared("lt", affine({0: 2}, 0), key) is None


@given(st.sampled_from([0, 1]), BAND, BAND)
def test_windows_are_masks_that_both_hold(number: int, a: Band, b: Band) -> None:
    assert same(both(a, b), grid(a) * grid(b))
    assert both(a, Affine((), number)) == (a if number else Affine((), 0))
    assert both(Affine((), number), a) == both(a, Affine((), number))
    assert both(a, None) is None and both(a, Band(0, 2, None, 0)) is None


@given(BAND)
def test_what_a_mask_hides(band: Band) -> None:
    found = negated(band)
    if band.low is None and band.high is None:
        assert found is None
    elif found is None:
        assert band.low is not None and band.high is not None  # two pieces
    else:
        assert same(found, 1 - grid(band))
    assert negated(Affine((), 3)) == Affine((), 0) and negated(affine({0: 1}, 0)) is None


@given(AFFINE)
def test_booleans_and_sums_of_equal_elements(known: Affine) -> None:
    truth, total = as_boolean(known), cumulated(known, 1)
    if known.number is None:
        assert truth is None and total is None
    else:
        assert same(truth, (grid(known) != 0).astype(int))
        assert same(total, np.cumsum(grid(known), 1))
    assert as_boolean(Band(0, 1, None, 0)) == Band(0, 1, None, 0)


@given(AFFINE | BAND, st.permutations([0, 1, 2]))
def test_dimensions_change_places(known: Known, order: list[int]) -> None:
    places = {old: new for new, old in enumerate(order)}
    assert same(moved(known, places), grid(known).transpose(order))


@given(AFFINE | BAND)
def test_broadcasting_puts_dimensions_in_front(known: Known) -> None:
    wanted = np.broadcast_to(grid(known), (2, *SHAPE))
    assert same(raised(known, 3, 4), wanted)
    assert moved(known, {}) == (known if isinstance(known, Affine) and not known.slopes else None)


@given(AFFINE)
def test_dimensions_of_one_index_say_nothing(known: Affine) -> None:
    found = without_ones(known, (3, 1, 4))
    assert isinstance(found, Affine) and not found.slope(1) and same(found, grid(known, (3, 1, 4)))
    assert without_ones(Band(0, 1, None, 0), (1, 1)) == Band(0, 1, None, 0)


@given(AFFINE | BAND, st.integers(0, 2), st.integers(0, 2), st.integers(1, 2))
def test_slices(known: Known, axis: int, first: int, stride: int) -> None:
    found = sliced(known, axis, first, stride)
    wanted = np.take(grid(known), range(first, SHAPE[axis], stride), axis)
    if found is not None:
        assert same(found, wanted)
    else:
        assert isinstance(known, Band) and axis < 2
    unknown = sliced(known, axis, sympy.Symbol("s"), 1)
    assert unknown is None or (isinstance(unknown, Affine) and not unknown.slope(axis))


@given(AFFINE, st.integers(1, 4))
def test_pieces_that_go_on_are_one(known: Affine, at: int) -> None:
    whole = grid(known)
    pieces = np.split(whole, [at], 1)
    first, second = sliced(known, 1, 0, 1), sliced(known, 1, at, 1)
    assert same(joined([(first, at), (second, SHAPE[1] - at)], 1), np.concatenate(pieces, 1))
    ahead = combined(known, Affine((), 1), 1)
    assert joined([(ahead, at), (second, SHAPE[1] - at)], 1) is None
    assert joined([(None, at), (second, 2)], 1) is None
    assert joined([(first, sympy.Symbol("s")), (second, 2)], 1) is None


@given(AFFINE, st.integers(0, 2), st.integers(0, 1))
def test_looking_indices_up(known: Affine, first: int, start: int) -> None:
    index = affine({0: 1}, start)
    count = SHAPE[first] - start
    places = grid(index, (count,))
    assert same(indexed(known, first, [(index, 1)]), np.take(grid(known), places, first))
    assert indexed(None, first, [(index, 1)]) is None
    if known.slope(first):
        assert indexed(known, first, [(None, 1)]) is None
        assert indexed(known, first, [(affine({0: -1}, 3), 1)]) is None  # it would count from the end


def test_looking_up_pairs_of_indices() -> None:
    known = affine({0: 10, 1: 1, 2: 100}, 7)
    rows, columns = affine({0: 1}, 0), affine({1: 2}, 0)
    found = indexed(known, 0, [(rows, 2), (columns, 2)])
    i, j = np.indices((3, 2))
    assert same(found, grid(known)[i, 2 * j])


SEQUENCE, BATCH = (
    sympy.Symbol("s", positive=True, integer=True),
    sympy.Symbol("b", positive=True, integer=True),
)


@pytest.mark.parametrize(
    ("before", "after", "groups"),
    [
        ((2, 3, 4), (6, 4), [([0, 1], [0]), ([2], [1])]),
        ((6, 4), (2, 3, 1, 4), [([0], [0, 1]), ([1], [3])]),
        ((BATCH, SEQUENCE, 32), (BATCH * SEQUENCE, 32), [([0, 1], [0]), ([2], [1])]),
        ((BATCH, SEQUENCE, 32), (BATCH, SEQUENCE, 4, 8), [([0], [0]), ([1], [1]), ([2], [2, 3])]),
        ((BATCH * SEQUENCE, 8), (BATCH, SEQUENCE, 8), [([0], [0, 1]), ([1], [2])]),
        ((1, SEQUENCE), (SEQUENCE, 1, 1), [([1], [0])]),
    ],
)
def test_reshapes_are_followed(before: Any, after: Any, groups: Any) -> None:
    assert match_groups(before, after) == groups
    kept = {b[0]: a[0] for a, b in groups if len(a) == len(b) == 1}
    assert match_dimensions(before, after) == kept


def test_reshapes_that_cannot_be_followed() -> None:
    other = sympy.Symbol("t", positive=True, integer=True)
    assert match_dimensions((SEQUENCE, 6), (other, 6)) is None
    assert match_groups((2, 3), (2, 4)) is None
