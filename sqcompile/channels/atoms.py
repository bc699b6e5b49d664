"""Atoms: the smallest things that a dimension can lose, and which of them are one and the same.

Every position along a dimension carries a *label*: the set of atoms without any one of which it cannot
exist. Output channel 5 of a convolution has one atom. Position (head 2, width 3) of a flattened attention
output has two, and goes when head 2 goes or when width 3 goes. Labels of a dimension of size n are an
array [n, k] of atom numbers, with -1 where a position has fewer than k.

Two dimensions that must stay equal are *unified*: their atoms become one, or an atom that nothing is
known about is bound to the product that it turns out to be. Atoms that may not go are *blocked*, with the
reason. Whatever cannot be expressed is blocked as well, so that a mistake can only ever remove too little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
"""Labels of one dimension, [n, k]: the atoms of each position, -1 where there are fewer than k."""

_NONE = -1


class Atoms:
    """All atoms of one program: a union-find structure whose members may be bound to products.

    Attributes:
        size: How many atoms there are.
    """

    def __init__(self) -> None:
        self.size = 0
        self._parent = np.empty(1024, dtype=np.int64)
        # An atom that is bound stands for these two together; -1 where it is not bound.
        self._left = np.full(1024, _NONE, dtype=np.int64)
        self._right = np.full(1024, _NONE, dtype=np.int64)
        self._blocked = np.zeros(1024, dtype=bool)
        self._axis = np.full(1024, _NONE, dtype=np.int64)
        # Why an atom is blocked, as an index of the reasons.
        self._why = np.full(1024, _NONE, dtype=np.int64)
        self._reasons: list[Any] = []

    # --- making ----------------------------------------------------------------------------------

    def fresh(self, count: int, axis: int = _NONE) -> Labels:
        """Return labels of `count` new atoms, one a position, made for the dimension number `axis`."""
        start, end = self.size, self.size + count
        while end > len(self._parent):
            self._grow()
        self._parent[start:end] = np.arange(start, end)
        self._axis[start:end] = axis
        self.size = end
        return np.arange(start, end, dtype=np.int64).reshape(count, 1)

    def fixed(self, count: int, reason: Any) -> Labels:
        """Return labels of a dimension that cannot shrink."""
        labels = self.fresh(1)
        self.block(labels, reason)
        return np.repeat(labels, count, axis=0)

    def _grow(self) -> None:
        extra = len(self._parent)
        self._parent = np.concatenate([self._parent, np.empty(extra, dtype=np.int64)])
        for name in ("_left", "_right", "_axis", "_why"):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.full(extra, _NONE, dtype=np.int64)]))
        self._blocked = np.concatenate([self._blocked, np.zeros(extra, dtype=bool)])

    # --- asking ----------------------------------------------------------------------------------

    def roots(self, ids: Labels) -> Labels:
        """Return what stands for each atom; -1 stays -1."""
        if ids.size == 0:
            return ids
        found = np.where(ids >= 0, self._parent[ids], _NONE)
        while True:
            further = np.where(found >= 0, self._parent[found], _NONE)
            if np.array_equal(further, found):
                break
            found = further
        present = ids >= 0
        self._parent[ids[present]] = found[present]  # the way is shorter the next time
        return found

    def resolve(self, labels: Labels) -> Labels:
        """Return labels in unbound atoms, without those that can never decide anything.

        A blocked atom decides nothing beside one that is free; alone it says that the position is fixed.
        """
        columns: list[Labels] = []
        pending = [labels[:, index] for index in range(labels.shape[1])]
        while pending:
            column = self.roots(pending.pop(0))
            bound = (column >= 0) & (self._left[column] >= 0)
            if bound.any():
                pending.insert(0, np.where(bound, self._right[column], _NONE))
                pending.insert(0, np.where(bound, self._left[column], column))
                continue
            columns.append(column)
        if len(columns) == 1:
            return columns[0][:, None]
        matrix = np.stack(columns, axis=1)
        return _compact(self._without_blocked(_without_repeats(matrix)))

    def _without_blocked(self, matrix: Labels) -> Labels:
        blocked = (matrix >= 0) & self._blocked[matrix]
        if not blocked.any():
            return matrix
        free = (matrix >= 0) & ~blocked
        first = np.cumsum(matrix >= 0, axis=1) == 1
        keep_one = ~free.any(axis=1, keepdims=True) & (matrix >= 0) & first
        return np.where(free | keep_one, matrix, _NONE)

    def is_blocked(self, roots: Labels) -> NDArray[np.bool_]:
        """Whether each atom, given by its root, may not go; -1 may not either."""
        return np.where(roots >= 0, self._blocked[roots], True)

    def is_bound(self, roots: Labels) -> NDArray[np.bool_]:
        """Whether each atom, given by its root, stands for a product."""
        return np.where(roots >= 0, self._left[roots] >= 0, False)

    def reason(self, root: int) -> Any:
        """Return why an atom is blocked, or None."""
        return self._reasons[self._why[root]] if self._blocked[root] else None

    def axes(self) -> tuple[Labels, Labels]:
        """Return (root, axis) of every atom that was made for a dimension."""
        everything = np.arange(self.size)
        made = everything[self._axis[: self.size] >= 0]
        return self.roots(made), self._axis[made]

    # --- relating --------------------------------------------------------------------------------

    def block(self, labels: Labels, reason: Any) -> None:
        """Say that no position of these labels may go."""
        resolved = self.resolve(labels)
        free = resolved[(resolved >= 0) & ~self._blocked[resolved]]
        if free.size:
            self._reasons.append(reason)
            self._blocked[free] = True
            self._why[free] = len(self._reasons) - 1

    def product(self, factors: Sequence[Labels]) -> Labels:
        """Return the labels of a dimension that merges others, the first one slowest."""
        result = factors[0]
        for factor in factors[1:]:
            outer = np.repeat(result, len(factor), axis=0)
            inner = np.tile(factor, (len(result), 1))
            result = np.concatenate([outer, inner], axis=1)
        return result

    def split(
        self, labels: Labels, sizes: Sequence[int], make: Callable[[int], Labels], reason: Any
    ) -> list[Labels]:
        """Return the labels of the dimensions that one is split into, the first one slowest.

        Args:
            labels: Labels of the dimension, [n, k].
            sizes: Sizes of the parts; their product is n.
            make: Makes new atoms for a part.
            reason: Why what cannot be split is blocked.
        """
        if len(sizes) == 1:
            return [labels]
        first, rest = sizes[0], int(np.prod(sizes[1:]))
        resolved = self.resolve(labels)
        grid = resolved.reshape(first, rest, -1)
        outer: list[Labels] = []
        inner: list[Labels] = []
        mixed: list[Labels] = []
        for index in range(grid.shape[2]):
            column = grid[:, :, index]
            if (column == column[:, :1]).all():
                outer.append(column[:, 0])
            elif (column == column[:1]).all():
                inner.append(column[0])
            else:
                mixed.append(column.reshape(-1))
        if mixed:
            left, right = make(first), make(rest)
            self.unify(np.stack(mixed, axis=1), self.product([left, right]), reason)
            outer.append(left[:, 0])
            inner.append(right[:, 0])
        # A part that no atom tells apart is as fixed as the whole is.
        rows = np.stack(outer, axis=1) if outer else self.fixed(first, reason)
        columns = np.stack(inner, axis=1) if inner else self.fixed(rest, reason)
        return [rows, *self.split(columns, sizes[1:], make, reason)]

    def unify(self, first: Labels, second: Labels, reason: Any) -> None:
        """Make two dimensions of the same size lose their positions together.

        Args:
            first: Labels of the one, [n, k].
            second: Labels of the other, [n, l].
            reason: Why what cannot be unified is blocked.
        """
        if first is second:
            return
        left, right = self.resolve(first), self.resolve(second)
        if left.shape == right.shape and np.array_equal(left, right):
            return
        if left.shape[1] == right.shape[1] == 1:
            self._unify_rows(left, right, reason)
            return
        # Rows with atoms in the same columns are alike; those of a concatenation may differ.
        present = np.concatenate([left >= 0, right >= 0], axis=1)
        for pattern in np.unique(present, axis=0):
            rows = (present == pattern).all(axis=1)
            split = left.shape[1]
            self._unify_rows(left[rows][:, pattern[:split]], right[rows][:, pattern[split:]], reason)

    def _unify_rows(self, left: Labels, right: Labels, reason: Any) -> None:
        """Unify rows that have an atom in every column."""
        left, right = self.roots(left), self.roots(right)
        if self.is_bound(left).any() or self.is_bound(right).any():  # by the rows before
            self.unify(left, right, reason)
            return
        fixed = self._fixed_rows(left) | self._fixed_rows(right)
        if fixed.any():
            self._block_beside(left[fixed], right[fixed], reason)
            left, right = left[~fixed], right[~fixed]
            if not len(left):
                return
        left, right = _without_common(left, right)
        if len(left) > 1:
            left, right = self._without_constant(left, right, reason)
        if left.shape[1] == 1 and right.shape[1] == 1:
            self._union(left[:, 0], right[:, 0])
        elif not left.shape[1] or not right.shape[1]:
            self._block_all(left, reason)
            self._block_all(right, reason)
        elif left.shape[1] == 1:
            self._bind(left[:, 0], right, reason)
        elif right.shape[1] == 1:
            self._bind(right[:, 0], left, reason)
        else:
            self._match_columns(left, right, reason)

    def _fixed_rows(self, matrix: Labels) -> NDArray[np.bool_]:
        return np.asarray(self.is_blocked(matrix).all(axis=1))

    def _block_beside(self, left: Labels, right: Labels, reason: Any) -> None:
        """Block what is tied to a fixed position, for the reason of that position."""
        for fixed, other in ((left, right), (right, left)):
            rows = self._fixed_rows(fixed)
            if not fixed.shape[1]:
                self._block_all(other[rows], reason)
                continue
            why = np.where(rows, self._why[fixed[:, 0]], _NONE)
            for number in np.unique(why[rows]):
                self._block_all(other[why == number], self._reasons[number])

    def _block_all(self, matrix: Labels, reason: Any) -> None:
        if matrix.size:
            self.block(matrix, reason)

    def _without_constant(self, left: Labels, right: Labels, reason: Any) -> tuple[Labels, Labels]:
        """Take out atoms that all rows share: where one side has none, they would remove everything."""
        shared_left = (left == left[:1]).all(axis=0)
        shared_right = (right == right[:1]).all(axis=0)
        both = min(shared_left.sum(), shared_right.sum())
        if both:
            self._union(left[:1, shared_left][0, :both], right[:1, shared_right][0, :both])
        self._block_all(left[:1, shared_left][:, both:], reason)
        self._block_all(right[:1, shared_right][:, both:], reason)
        return left[:, ~shared_left], right[:, ~shared_right]

    def _union(self, left: Labels, right: Labels) -> None:
        while True:
            left, right = self.roots(left), self.roots(right)
            differ = left != right
            if not differ.any():
                return
            left, right = left[differ], right[differ]
            blocked = self._blocked[left] | self._blocked[right]
            if blocked.any():
                self._block_beside(left[blocked][:, None], right[blocked][:, None], None)
                left, right = left[~blocked], right[~blocked]
            np.minimum.at(self._parent, np.maximum(left, right), np.minimum(left, right))

    def _bind(self, atoms: Labels, products: Labels, reason: Any) -> None:
        """Say that each atom stands for the product in its row, [n, k > 1]."""
        if np.intersect1d(atoms, products).size:  # an atom cannot be a part of itself
            self._block_all(np.concatenate([atoms[:, None], products], axis=1), reason)
            return
        unique, first, back = np.unique(atoms, return_index=True, return_inverse=True)
        representative = products[first]
        right = representative[:, -1]
        for index in range(products.shape[1] - 2, 0, -1):
            pair = self.fresh(len(right))[:, 0]
            self._left[pair], self._right[pair] = representative[:, index], right
            right = pair
        self._left[unique], self._right[unique] = representative[:, 0], right
        if len(unique) < len(atoms):  # the same atom in several rows: their products are one, too
            again = representative[back]
            for index in range(products.shape[1]):
                self._union(products[:, index], again[:, index])

    def _match_columns(self, left: Labels, right: Labels, reason: Any) -> None:
        """Unify products of several atoms: factors that run alike belong together."""
        rest_left = list(range(left.shape[1]))
        rest_right = list(range(right.shape[1]))
        for accept in (_same_runs, _nested_runs):
            for i in list(rest_left):
                j = next((j for j in rest_right if accept(left[:, i], right[:, j])), None)
                if j is not None:
                    self._union(left[:, i], right[:, j])
                    rest_left.remove(i)
                    rest_right.remove(j)
        if not rest_left and not rest_right:
            return
        if len(rest_left) < left.shape[1] and min(len(rest_left), len(rest_right)) == 1:
            self._unify_rows(left[:, rest_left], right[:, rest_right], reason)
            return
        self._block_all(left[:, rest_left], reason)
        self._block_all(right[:, rest_right], reason)


def _without_repeats(matrix: Labels) -> Labels:
    """Keep each atom once a row."""
    for index in range(1, matrix.shape[1]):
        repeated = (matrix[:, :index] == matrix[:, index : index + 1]).any(axis=1)
        if repeated.any():
            matrix = matrix.copy()
            matrix[repeated, index] = _NONE
    return matrix


def _compact(matrix: Labels) -> Labels:
    """Drop columns without atoms, but leave one."""
    used = (matrix >= 0).any(axis=0)
    return matrix[:, used] if used.any() else matrix[:, :1]


def _without_common(left: Labels, right: Labels) -> tuple[Labels, Labels]:
    """Drop columns that both have."""
    for i in reversed(range(left.shape[1])):
        for j in range(right.shape[1]):
            if np.array_equal(left[:, i], right[:, j]):
                left, right = np.delete(left, i, axis=1), np.delete(right, j, axis=1)
                break
    return left, right


def _runs(column: Labels) -> Labels:
    """Number the distinct atoms of a column in the order in which they come."""
    _, first, back = np.unique(column, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))
    return order[back]


def _same_runs(left: Labels, right: Labels) -> bool:
    return bool(np.array_equal(_runs(left), _runs(right)))


def _nested_runs(left: Labels, right: Labels) -> bool:
    """Whether one column says what the other is."""
    one, two = _runs(left), _runs(right)
    pairs = len(np.unique(one * (two.max() + 1) + two))
    return pairs == int(max(one.max(), two.max())) + 1
