"""Distances, against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.programs import data

from sqcompile.errors import InputError
from sqcompile.metrics import EQUAL, DistanceMeter, distance, output_distance

finite = st.floats(-1e6, 1e6, width=32)
pairs = st.lists(st.tuples(finite, finite), min_size=1, max_size=30)


def plain(reference: np.ndarray, value: np.ndarray) -> tuple[float, float, float]:
    """SQNR in dB, cosine and largest error, in float64."""
    reference, value = reference.astype(np.float64).ravel(), value.astype(np.float64).ravel()
    noise, signal = float(((reference - value) ** 2).sum()), float((reference**2).sum())
    if noise == 0:
        return math.inf, 1.0, 0.0
    norms = np.linalg.norm(reference) * np.linalg.norm(value)
    cosine = float(reference @ value / norms) if norms > 0 else 0.0
    sqnr = 10 * math.log10(signal / noise) if signal > 0 else -math.inf
    return sqnr, cosine, float(np.abs(reference - value).max())


class TestDistance:
    @settings(deadline=None, max_examples=50)
    @given(pairs)
    def test_equals_numpy(self, values: list[tuple[float, float]]) -> None:
        left, right = (np.array(side, dtype=np.float32) for side in zip(*values, strict=True))
        found = distance(torch.from_numpy(left), torch.from_numpy(right))
        sqnr, cosine, largest = plain(left, right)
        # Sums in float64 in another order: their rounding is all that may differ.
        assert found.sqnr_db == pytest.approx(sqnr, abs=1e-6)
        assert found.cosine == pytest.approx(cosine, abs=1e-9) and found.cosine <= 1.0
        assert found.max_error == largest and found.finite

    @settings(deadline=None, max_examples=50)
    @given(st.lists(pairs, min_size=1, max_size=4))
    def test_over_parts_is_that_of_the_whole(self, parts: list[list[tuple[float, float]]]) -> None:
        meter = DistanceMeter()
        for part in parts:
            left, right = (torch.tensor(side) for side in zip(*part, strict=True))
            meter.add(left, right)
        whole = [pair for part in parts for pair in part]
        left, right = (torch.tensor(side) for side in zip(*whole, strict=True))
        found, expected = meter.result(), distance(left, right)
        assert found.sqnr_db == pytest.approx(expected.sqnr_db, abs=1e-6)
        assert found.cosine == pytest.approx(expected.cosine, abs=1e-9)
        assert found.max_error == expected.max_error

    def test_known_figures(self) -> None:
        x = data(1000)
        assert distance(x, x * 1.1).sqnr_db == pytest.approx(20, abs=1e-4)  # 10 % error
        assert distance(x, x * 1.1).cosine == pytest.approx(1.0)
        assert distance(x, -x).cosine == pytest.approx(-1.0)
        assert distance(x, x.clone()) == EQUAL == distance(torch.zeros(3), torch.zeros(3))
        silent = distance(torch.zeros(3), torch.tensor([0.0, 3.0, 4.0]))
        assert (silent.sqnr_db, silent.cosine, silent.max_error) == (-math.inf, 0.0, 4.0)

    def test_small_errors_of_large_values_are_seen(self) -> None:
        """In float32 the sum of squares would swallow them."""
        x = torch.full((10_000,), 1000.0, dtype=torch.float64)
        assert distance(x, x + 1e-9).sqnr_db == pytest.approx(240, abs=0.1)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool])
    def test_of_every_type(self, dtype: torch.dtype) -> None:
        left, right = torch.tensor([1, 0, 1, 1]).to(dtype), torch.tensor([1, 1, 1, 0]).to(dtype)
        assert distance(left, right).max_error == 1.0
        assert distance(left, right).sqnr_db == pytest.approx(10 * math.log10(3 / 2))

    def test_of_complex_numbers(self) -> None:
        left = torch.tensor([1 + 1j, 2.0])
        assert distance(left, left + 1j).sqnr_db == pytest.approx(10 * math.log10(6 / 2))

    def test_of_nothing(self) -> None:
        assert distance(torch.empty(0), torch.empty(0)) == EQUAL == DistanceMeter().result()

    def test_another_shape_is_no_distance(self) -> None:
        for other in (data(3, 4), data(4, 2), data(8)):
            with pytest.raises(InputError, match="shapes") as caught:
                distance(data(2, 4), other)
            assert caught.value.seen and caught.value.expected

    def test_reads_well(self) -> None:
        x = torch.tensor([1.0, 2.0])
        assert str(distance(x, x + 0.1)) == "SQNR 24.0 dB, cosine 0.999822, max error 0.1"
        assert str(distance(x, x * math.nan)) == "not finite"


class TestNotFinite:
    reference = torch.tensor([1.0, -math.inf, 2.0, math.nan, math.inf])

    def test_where_the_reference_is_too_it_does_not_count(self) -> None:
        assert distance(self.reference, self.reference.clone()) == EQUAL
        found = distance(self.reference, self.reference + torch.tensor([0.1, 0.0, 0.0, 0.0, 0.0]))
        assert found.finite and found.sqnr_db == pytest.approx(10 * math.log10(5 / 0.01), abs=1e-3)
        assert distance(self.reference[1:2], self.reference[1:2]) == EQUAL

    @pytest.mark.parametrize("place", range(5))
    @pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 7.0])
    def test_anywhere_else_it_does(self, place: int, wrong: float) -> None:
        value = self.reference.clone()
        value[place] = wrong
        same = (math.isnan(wrong) and place == 3) or wrong == self.reference[place]
        found = distance(self.reference, value)
        assert found.finite == (same or (math.isfinite(wrong) and place in (0, 2)))
        if not found.finite:
            assert (found.sqnr_db, found.cosine, found.max_error) == (-math.inf, 0.0, math.inf)

    def test_is_not_forgotten(self) -> None:
        meter = DistanceMeter()
        meter.add(torch.ones(1), torch.full((1,), math.nan))
        meter.add(torch.ones(1), torch.ones(1))
        assert not meter.result().finite


class TestOutputs:
    def test_lists_of_outputs(self) -> None:
        references = [[torch.tensor([3.0]), None, 5, torch.tensor([4])], [torch.tensor([0.0])]]
        values = [[torch.tensor([3.0]), None, 5, torch.tensor([3])], [torch.tensor([2.0])]]
        found = output_distance(references, values)
        assert found.sqnr_db == pytest.approx(10 * math.log10(25 / 5)) and found.max_error == 2.0

    def test_another_number_of_outputs(self) -> None:
        with pytest.raises(ValueError, match="zip"):
            output_distance([[torch.ones(1)]], [[torch.ones(1), torch.ones(1)]])
