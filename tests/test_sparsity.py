"""Sparse patterns, against a plain implementation in NumPy and loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.programs import data

from sqcompile.errors import FormatError
from sqcompile.sparsity import Cut, Pattern, Sparsity, as_matrix, from_matrix, removed_count

# --- the plain implementation -------------------------------------------------------------------------


def plain_blocks(pattern: Pattern, scores: np.ndarray) -> list[tuple[float, list[tuple[int, int]]]]:
    """Return (score, weights in it) of every block, in row-major order."""
    rows, depth = scores.shape
    blocks = []
    for row in range(0, rows, pattern.rows):
        for column in range(0, depth, pattern.columns):
            inside = [(row + r, column + c) for r in range(pattern.rows) for c in range(pattern.columns)]
            blocks.append((float(sum(scores[place] for place in inside)), inside))
    return blocks


def plain_mask(pattern: Pattern, scores: np.ndarray, sparsity: float) -> np.ndarray:
    """Remove the smallest, first come first."""
    mask = np.ones(scores.shape, dtype=bool)
    if pattern.m:
        mask[:] = False
        for row in range(scores.shape[0]):
            for start in range(0, scores.shape[1], pattern.m):
                columns = range(start, start + pattern.m)
                best = sorted(columns, key=lambda column: (-scores[row, column], column))[: pattern.n]
                mask[row, best] = True
        return mask
    blocks = plain_blocks(pattern, scores)
    count = math.floor(sparsity * len(blocks) + 1e-9)
    for _, inside in sorted(blocks, key=lambda block: block[0])[:count]:  # a stable sort
        for place in inside:
            mask[place] = False
    return mask


PATTERNS = ["unstructured", "2:4", "1:4", "3:4", "4:8", "1:2", "1x4", "4x1", "2x2", "16x4"]


@st.composite
def matrices(draw: st.DrawFn) -> tuple[Pattern, torch.Tensor]:
    """Draw a pattern and scores that it fits; small whole numbers, so that there are many ties."""
    pattern = Pattern.parse(draw(st.sampled_from(PATTERNS)))
    rows = draw(st.integers(1, 4)) * pattern.rows
    depth = draw(st.integers(1, 4)) * max(pattern.m, pattern.columns)
    values = draw(st.lists(st.integers(0, 3), min_size=rows * depth, max_size=rows * depth))
    return pattern, torch.tensor(values, dtype=torch.float32).reshape(rows, depth)


class TestMasks:
    @settings(deadline=None, max_examples=50)
    @given(matrices(), st.floats(0, 1, exclude_max=True))
    def test_equal_the_plain_implementation(
        self, case: tuple[Pattern, torch.Tensor], sparsity: float
    ) -> None:
        pattern, scores = case
        mask = pattern.mask(scores, sparsity)
        assert mask.dtype is torch.bool and mask.shape == scores.shape
        assert np.array_equal(mask.numpy(), plain_mask(pattern, scores.numpy(), sparsity))
        assert pattern.holds(mask)

    @settings(deadline=None, max_examples=50)
    @given(matrices(), st.floats(0, 1, exclude_max=True))
    def test_remove_exactly_so_many(self, case: tuple[Pattern, torch.Tensor], sparsity: float) -> None:
        pattern, scores = case
        removed = int((~pattern.mask(scores, sparsity)).sum())
        if pattern.m:
            assert removed == scores.numel() * (pattern.m - pattern.n) // pattern.m
            assert pattern.fixed_sparsity == pytest.approx(removed / scores.numel())
        else:
            size = pattern.rows * pattern.columns
            assert removed == removed_count(scores.numel() // size, sparsity) * size

    @settings(deadline=None, max_examples=50)
    @given(matrices(), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
    def test_what_is_gone_goes_first_again(
        self, case: tuple[Pattern, torch.Tensor], first: float, second: float
    ) -> None:
        """Pruning twice is pruning once to the higher sparsity; nothing comes back by being zero."""
        pattern, scores = case
        low, high = sorted((first, second))
        kept = pattern.mask(scores, low)
        again = pattern.mask(scores, high, kept)
        assert not bool((again & ~kept).any()) or pattern.m > 0
        assert torch.equal(again & kept, pattern.mask(scores, high) & kept)

    @settings(deadline=None, max_examples=50)
    @given(matrices(), st.integers(0, 9), st.integers(0, 9), st.integers(0, 999))
    def test_together_with_any_earlier_mask(
        self, case: tuple[Pattern, torch.Tensor], first: int, second: int, seed: int
    ) -> None:
        """What an earlier mask removed, by whatever score, counts: exactly so many are gone in the end."""
        pattern, scores = case
        if pattern.m:
            return
        kept = pattern.mask(data(*scores.shape, seed=seed).abs(), first / 10)
        size = pattern.rows * pattern.columns
        total = scores.numel() // size
        gone = int((~(pattern.mask(scores, second / 10, kept) & kept)).sum()) // size
        assert gone == max(removed_count(total, first / 10), removed_count(total, second / 10))

    @settings(deadline=None, max_examples=50)
    @given(matrices(), st.floats(0, 12))
    def test_thresholds(self, case: tuple[Pattern, torch.Tensor], threshold: float) -> None:
        pattern, scores = case
        mask = pattern.mask_by_threshold(scores, threshold)
        if pattern.m:
            assert torch.equal(mask, pattern.mask(scores, 0.0))
            return
        expected = np.zeros(scores.shape, dtype=bool)
        for total, inside in plain_blocks(pattern, scores.numpy()):
            for place in inside:
                expected[place] = np.float32(total) / np.float32(len(inside)) > threshold
        assert np.array_equal(mask.numpy(), expected)

    def test_three_tenths_of_ten_are_three(self) -> None:
        """In binary 0.3 · 10 is a little less than three."""
        assert [removed_count(10, tenths / 10) for tenths in range(10)] == list(range(10))
        assert removed_count(1000, 0.999) == 999 and removed_count(3, 0.5) == 1

    def test_ties_go_first_come_first(self) -> None:
        mask = Pattern().mask(torch.ones(2, 3), 0.5)
        assert mask.tolist() == [[False] * 3, [True] * 3]
        assert Pattern.parse("2:4").mask(torch.ones(1, 8), 0.0).tolist() == [[True, True, False, False] * 2]


class TestScores:
    @settings(deadline=None, max_examples=50)
    @given(matrices())
    def test_are_sums_over_blocks(self, case: tuple[Pattern, torch.Tensor]) -> None:
        pattern, scores = case
        found = pattern.scores(scores).reshape(-1).tolist()
        assert found == [total for total, _ in plain_blocks(pattern, scores.numpy())]

    @settings(deadline=None, max_examples=50)
    @given(matrices())
    def test_expand_undoes_the_change_of_shape(self, case: tuple[Pattern, torch.Tensor]) -> None:
        pattern, scores = case
        blocks = pattern.scores(scores) > 2
        wide = pattern.expand(blocks)
        assert wide.shape == scores.shape and (pattern.m or pattern.holds(wide))
        size = pattern.rows * pattern.columns
        assert torch.equal(pattern.scores(wide.float()), blocks.float() * size)


class TestHolds:
    @settings(deadline=None, max_examples=50)
    @given(matrices(), st.data())
    def test_equals_the_plain_implementation(
        self, case: tuple[Pattern, torch.Tensor], draw: st.DataObject
    ) -> None:
        pattern, scores = case
        mask = pattern.mask(scores, 0.5)
        for _ in range(draw.draw(st.integers(0, 2))):
            row = draw.draw(st.integers(0, mask.shape[0] - 1))
            column = draw.draw(st.integers(0, mask.shape[1] - 1))
            mask[row, column] = ~mask[row, column]
        array = mask.numpy()
        if pattern.m:
            groups = array.reshape(array.shape[0], -1, pattern.m).sum(-1)
            expected = bool((groups <= pattern.n).all())
        else:
            counts = [
                sum(bool(array[place]) for place in inside) for _, inside in plain_blocks(pattern, array)
            ]
            expected = all(count in (0, pattern.rows * pattern.columns) for count in counts)
        assert pattern.holds(mask) == expected


# --- the cut that needs no sorting --------------------------------------------------------------------


class TestCut:
    @settings(deadline=None, max_examples=20)
    @given(
        st.lists(
            st.lists(st.sampled_from([0.0, -0.0, 1e-40, 1.0, -1.0, 2.5, math.inf, -math.inf]), max_size=8),
            min_size=1,
        ),
        st.data(),
    )
    def test_removes_what_a_stable_sort_would(self, chunks: list[list[float]], draw: st.DataObject) -> None:
        tensors = [torch.tensor(chunk, dtype=torch.float32) for chunk in chunks]
        everything = list(itertools.chain(*chunks))
        count = draw.draw(st.integers(0, len(everything)))
        cut = Cut.find(lambda: tensors, count)
        found: list[bool] = []
        for tensor in tensors:
            gone, cut = cut.removed(tensor)
            found += gone.tolist()
        expected = [False] * len(everything)
        for place in sorted(range(len(everything)), key=lambda place: everything[place])[:count]:
            expected[place] = True
        assert found == expected

    def test_of_large_random_scores(self) -> None:
        scores = data(100_000).abs()
        gone, _ = Cut.find(lambda: scores.split(7919), 33_333).removed(scores)
        order = scores.argsort(stable=True)
        assert gone.sum() == 33_333 and bool(gone[order[:33_333]].all())

    def test_of_scores_that_are_not_contiguous(self) -> None:
        scores = data(40, 50).t()
        gone, _ = Cut.find(lambda: [scores], 1000).removed(scores)
        assert gone.sum() == 1000 and scores[gone].max() < scores[~gone].min()


# --- texts and shapes -----------------------------------------------------------------------------------


class TestTexts:
    @pytest.mark.parametrize("text", PATTERNS)
    def test_round_trip(self, text: str) -> None:
        pattern = Pattern.parse(text)
        assert str(pattern) == text and Pattern.parse(f" {text.upper()} ") == pattern
        assert pattern.is_unstructured == (text == "unstructured")

    def test_one_by_one_is_unstructured(self) -> None:
        assert Pattern.parse("1x1") == Pattern() and str(Pattern.parse("1x1")) == "unstructured"

    @pytest.mark.parametrize(
        "text", ["", "2/4", "2:4:8", "x4", "4x", "-1x4", "1.5x4", "dense", "2 : 4", "0:0"]
    )
    def test_what_is_no_pattern(self, text: str) -> None:
        with pytest.raises(FormatError, match="is no sparse pattern") as caught:
            Pattern.parse(text)
        assert caught.value.seen is not None and caught.value.expected and caught.value.next_step

    @pytest.mark.parametrize("text", ["4:2", "4:4", "0:4", "0x4", "4x0"])
    def test_patterns_that_cannot_be(self, text: str) -> None:
        with pytest.raises(FormatError) as caught:
            Pattern.parse(text)
        assert text in str(caught.value.seen) and caught.value.expected and caught.value.next_step

    def test_a_pattern_is_either_groups_or_blocks(self) -> None:
        for pattern in ({"n": 2, "m": 4, "rows": 2}, {"n": 2}, {"m": 4, "n": 2, "columns": 4}):
            with pytest.raises(FormatError):
                Pattern(**pattern)


class TestObstacles:
    @pytest.mark.parametrize(
        ("pattern", "shape", "axes", "groups", "reason"),
        [
            ("2:4", (8, 8), (0, 1), 1, None),
            ("2:4", (7, 8), (0, 1), 1, None),
            ("2:4", (8, 6), (0, 1), 1, "6 input channels are not a multiple of 4"),
            ("16x4", (8, 8), (0, 1), 1, "8 output channels are not a multiple of 16"),
            ("1x4", (8, 3, 3, 3), (0, 1), 1, "3 input channels are not a multiple of 4"),
            ("4x1", (8, 4, 3, 3), (0, 1), 4, "2 output channels per group are not a multiple of 4"),
            ("2x1", (8, 4, 3, 3), (0, 1), 4, None),
            ("1x4", (8, 6, 3, 3), (1, 0), 1, None),
            ("1x4", (8, 6, 3, 3), (1, 0), 4, "2 input channels per group are not a multiple of 4"),
            ("2:4", (64, 32), (-1, -2), 1, None),
            ("unstructured", (7, 5), (0, 1), 1, None),
        ],
    )
    def test_says_why_not(
        self, pattern: str, shape: tuple[int, ...], axes: tuple[int, int], groups: int, reason: str | None
    ) -> None:
        found = Pattern.parse(pattern).obstacle(shape, *axes, groups)
        assert found is None if reason is None else reason in str(found)


class TestMatrices:
    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.integers(1, 4), min_size=2, max_size=5), st.data())
    def test_round_trip(self, shape: Sequence[int], draw: st.DataObject) -> None:
        """Linear, convolutions of one to three dimensions, and their transposed forms."""
        rank = len(shape)
        out_axis, in_axis = draw.draw(st.sampled_from([(0, 1), (1, 0), (-1, -2), (-2, -1), (0, rank - 1)]))
        weight = torch.arange(math.prod(shape)).reshape(*shape)
        matrix = as_matrix(weight, out_axis, in_axis)
        assert matrix.shape == (shape[out_axis], math.prod(shape) // shape[out_axis])
        again = from_matrix(matrix, tuple(shape), out_axis, in_axis)
        assert torch.equal(again, weight) and again.is_contiguous()

    @pytest.mark.parametrize(("out_axis", "in_axis"), [(0, 1), (1, 0)])
    def test_a_row_is_an_output_and_inputs_come_fastest(self, out_axis: int, in_axis: int) -> None:
        weight = data(4, 6, 2, 3)
        matrix = as_matrix(weight, out_axis, in_axis)
        inputs = weight.shape[in_axis]
        for output, i, y, x in itertools.product(
            range(weight.shape[out_axis]), range(inputs), range(2), range(3)
        ):
            place = [y, x]
            for axis, index in sorted([(out_axis, output), (in_axis, i)]):
                place.insert(axis, index)
            assert matrix[output, (y * 3 + x) * inputs + i] == weight[tuple(place)]


class TestPromises:
    def test_count_what_breaks_them(self) -> None:
        mask = torch.tensor([[True, False], [False, True]])
        promise = Sparsity(mask, Pattern.parse("1:2"))
        assert promise.sparsity == 0.5 and str(promise) == "1:2, 50.0 % zeros"
        assert promise.violations(torch.tensor([[3.0, 0.0], [-0.0, 0.0]])) is None
        assert (
            promise.violations(torch.tensor([[3.0, 1.0], [2.0, 0.0]]))
            == "2 weights are nonzero where the mask is 0"
        )
        assert "shape (2, 3)" in str(promise.violations(torch.zeros(2, 3)))

    def test_of_an_empty_weight(self) -> None:
        assert Sparsity(torch.ones(0, 3, dtype=torch.bool)).sparsity == 0.0
