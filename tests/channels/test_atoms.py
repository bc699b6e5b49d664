"""Labels of dimensions: what unifying, merging and splitting makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqcompile.channels.atoms import Atoms, Labels


def removed_positions(atoms: Atoms, labels: Labels, gone: Labels) -> list[int]:
    """Which positions go when all atoms of `gone` go."""
    roots = np.unique(atoms.resolve(gone))
    return np.flatnonzero(np.isin(atoms.resolve(labels), roots[roots >= 0]).any(axis=1)).tolist()


def split(atoms: Atoms, labels: Labels, *sizes: int) -> list[Labels]:
    return atoms.split(labels, sizes, atoms.fresh, "split")


def test_unified_dimensions_lose_the_same_positions() -> None:
    atoms = Atoms()
    first, second, third = atoms.fresh(4), atoms.fresh(4), atoms.fresh(4)
    atoms.unify(first, second, "one")
    atoms.unify(third, second, "two")
    assert removed_positions(atoms, third, first[1:3]) == [1, 2]


def test_a_split_dimension_loses_whole_rows_or_columns() -> None:
    atoms = Atoms()
    flat = atoms.fresh(6)
    rows, columns = split(atoms, flat, 2, 3)
    assert removed_positions(atoms, flat, rows[1:]) == [3, 4, 5]
    assert removed_positions(atoms, flat, columns[:1]) == [0, 3]
    assert atoms.is_bound(atoms.roots(flat[:, 0])).all()


def test_a_merged_dimension_splits_into_what_it_was_merged_from() -> None:
    atoms = Atoms()
    heads, width = atoms.fresh(4), atoms.fresh(8)
    again = split(atoms, atoms.product([heads, width]), 4, 8)
    for old, new in zip((heads, width), again, strict=True):
        assert np.array_equal(atoms.resolve(old), atoms.resolve(new))


def test_a_product_of_three_splits_at_any_boundary() -> None:
    atoms = Atoms()
    flat = atoms.fresh(24)
    a, b, c = split(atoms, flat, 2, 3, 4)
    outer, inner = split(atoms, flat, 6, 4)
    assert removed_positions(atoms, outer, a[:1]) == [0, 1, 2]
    assert removed_positions(atoms, outer, b[:1]) == [0, 3]
    assert removed_positions(atoms, inner, c[3:]) == [3]


def test_repeated_heads_tie_the_queries_that_they_serve() -> None:
    atoms = Atoms()
    queries, keys, repeated = atoms.fresh(4), atoms.fresh(2), atoms.fresh(2)
    atoms.unify(queries, atoms.product([keys, repeated]), "grouped")
    assert removed_positions(atoms, queries, keys[1:]) == [2, 3]
    assert removed_positions(atoms, queries, repeated[:1]) == [0, 2]


def test_two_halves_that_are_stacked_lose_the_same_positions() -> None:
    atoms = Atoms()
    left, right = atoms.fresh(3), atoms.fresh(3)
    split(atoms, np.concatenate([left, right]), 2, 3)
    assert removed_positions(atoms, right, left[1:2]) == [1]


def test_what_is_tied_to_a_fixed_position_is_blocked_for_its_reason() -> None:
    atoms = Atoms()
    fixed, free, further = atoms.fixed(2, "an input"), atoms.fresh(2), atoms.fresh(2)
    atoms.unify(free, further, "sum")
    atoms.unify(further, fixed, "another")
    roots = atoms.roots(free[:, 0])
    assert atoms.is_blocked(roots).all()
    assert [atoms.reason(root) for root in roots] == ["an input"] * 2


def test_a_factor_beside_a_blocked_one_stays_free() -> None:
    atoms = Atoms()
    flat = atoms.fresh(6)
    rows, columns = split(atoms, flat, 2, 3)
    atoms.block(rows, "groups")
    assert removed_positions(atoms, flat, columns[2:]) == [2, 5]
    assert not atoms.is_blocked(atoms.roots(columns[:, 0])).any()


def test_an_atom_is_no_part_of_itself() -> None:
    atoms = Atoms()
    single, other = atoms.fresh(2), atoms.fresh(2)
    atoms.unify(single, np.concatenate([single[::-1], other], axis=1), "circle")
    assert atoms.is_blocked(atoms.roots(single[:, 0])).all()


@pytest.mark.parametrize("sizes", [(4, 6), (6, 4), (3, 8), (8, 3)])
def test_two_ways_to_split_never_disagree(sizes: tuple[int, int]) -> None:
    """A removal through one split is a removal of whole rows and columns through the other as well."""
    atoms = Atoms()
    flat = atoms.fresh(24)
    parts = [split(atoms, flat, 2, 12), split(atoms, flat, *sizes)]
    for rows, columns in parts:
        for labels in (*rows, *columns):
            if atoms.is_blocked(atoms.resolve(labels[None])[0]).all():
                continue
            gone = set(removed_positions(atoms, flat, labels[None]))
            for other_rows, other_columns in parts:
                lost_rows = removed_positions(atoms, other_rows, labels[None])
                lost_columns = removed_positions(atoms, other_columns, labels[None])
                width = len(other_columns)
                expected = {
                    index
                    for index in range(24)
                    if index // width in lost_rows or index % width in lost_columns
                }
                assert gone == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_unified_dimensions_always_agree(data: st.DataObject) -> None:
    """Whatever is unified in whatever order: equal dimensions lose equal positions, for any atom."""
    atoms = Atoms()
    dims = [atoms.fresh(12) for _ in range(3)]
    for sizes in data.draw(
        st.lists(st.sampled_from([(2, 6), (3, 4), (4, 3), (6, 2), (2, 2, 3)]), max_size=3)
    ):
        parts = split(atoms, data.draw(st.sampled_from(dims)), *sizes)
        dims.append(atoms.product(parts))
    pairs = data.draw(
        st.lists(st.tuples(st.sampled_from(range(len(dims))), st.sampled_from(range(len(dims)))), max_size=5)
    )
    for first, second in pairs:
        atoms.unify(dims[first], dims[second], "tie")
    labels = [atoms.resolve(dim) for dim in dims]
    everything = np.unique(np.concatenate([item.reshape(-1) for item in labels]))
    for atom in everything[everything >= 0]:
        if atoms.is_blocked(np.array([atom]))[0]:
            continue
        for first, second in pairs:
            lost = [(labels[index] == atom).any(axis=1).tolist() for index in (first, second)]
            assert lost[0] == lost[1]
