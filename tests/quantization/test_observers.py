"""Observers, against plain NumPy on all the data at once."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from support.allocations import Allocations

from sqcompile.errors import CalibrationError, PassOptionError
from sqcompile.quantization import (
    Format,
    HistogramKL,
    HistogramMSE,
    MinMax,
    MovingAverage,
    Observer,
    ObserverState,
    Percentile,
    fake_quantize,
    scale_from_range,
)
from sqcompile.quantization import histogram as histogram_module
from sqcompile.quantization.histogram import Histogram

EVERY = (MinMax(), MovingAverage(), Percentile(), HistogramMSE(), HistogramKL())
MERGEABLE = tuple(observer for observer in EVERY if not isinstance(observer, MovingAverage))
SYMMETRIC, AFFINE = Format(), Format.parse("uint8:affine")

values = st.floats(-1e4, 1e4, width=32) | st.floats(-1, 1, width=32) | st.just(0.0)
batches = st.lists(npst.arrays(np.float32, st.integers(1, 20), elements=values), min_size=1, max_size=6)


def watch(observer: Observer, data: list[Any], format: Format = SYMMETRIC) -> ObserverState:
    state = observer.start(format, where="node conv1")
    for batch in data:
        state.observe(torch.as_tensor(batch))
    return state


def bounds(state: ObserverState) -> tuple[float, float]:
    low, high = state.range()
    assert low.shape == high.shape == ()
    assert low.dtype == high.dtype == torch.float32
    return float(low), float(high)


# --- text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("observer", "text"),
    [
        (MinMax(), "min-max"),
        (MovingAverage(0.5), "moving-average{momentum=0.5}"),
        (Percentile(99.9), "percentile{percentile=99.9,bins=2048}"),
        (HistogramMSE(512), "histogram-mse{bins=512}"),
        (HistogramKL(), "histogram-kl{bins=4096}"),
    ],
)
def test_text_parses_back(observer: Observer, text: str) -> None:
    assert str(observer) == text
    assert Observer.parse(text) == observer


def test_options_left_out_have_their_defaults() -> None:
    assert Observer.parse("percentile") == Percentile()
    assert Observer.parse(" percentile{ percentile = 100 } ") == Percentile(100.0)


@pytest.mark.parametrize(
    ("text", "meant"),
    [("minmax", "min-max"), ("histogram-ms", "histogram-mse"), ("percentile{percentil=99}", "percentile")],
)
def test_typo_names_the_nearest_word(text: str, meant: str) -> None:
    with pytest.raises(PassOptionError) as error:
        Observer.parse(text)
    assert error.value.next_step is not None and repr(meant) in error.value.next_step


@pytest.mark.parametrize(
    "text",
    [
        "percentile{percentile=high}",
        "percentile{percentile=50}",
        "percentile{percentile=100.1}",
        "percentile{bins=1000}",
        "histogram-mse{bins=8}",
        "moving-average{momentum=1}",
        "moving-average{momentum=-0.1}",
    ],
)
def test_option_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(PassOptionError) as error:
        Observer.parse(text)
    assert error.value.seen is not None and error.value.expected is not None


# --- min-max and moving average -----------------------------------------------------------------------


@given(batches)
@settings(deadline=None)
def test_min_max_equals_numpy(data: list[NDArray[np.float32]]) -> None:
    everything = np.concatenate(data)
    state = watch(MinMax(), data)
    assert bounds(state) == (everything.min(), everything.max())
    assert (state.count, state.batches) == (everything.size, len(data))


@pytest.mark.parametrize(
    ("text", "axes", "shape"), [("int8:channel=1", (0, 2), (3,)), ("int8:channel=-1", (0, 1), (5,))]
)
def test_min_max_per_channel(text: str, axes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    data = np.random.default_rng(0).normal(size=(4, 6, 3, 5)).astype(np.float32)  # four batches [6, 3, 5]
    low, high = watch(MinMax(), list(data), Format.parse(text)).range()
    joined = np.concatenate(list(data))
    assert low.shape == shape
    np.testing.assert_array_equal(low.numpy(), joined.min(axes))
    np.testing.assert_array_equal(high.numpy(), joined.max(axes))


def test_min_max_per_group() -> None:
    x = torch.arange(12.0).reshape(2, 6)
    low, high = watch(MinMax(), [x, -x], Format.parse("int4:group=4")).range()
    assert low.tolist() == [[-3, -5], [-9, -11]]  # groups of 4 and, at the end, 2
    assert high.tolist() == [[3, 5], [9, 11]]


@given(batches, st.sampled_from((0.0, 0.5, 0.9)))
@settings(deadline=None)
def test_moving_average_equals_numpy(data: list[NDArray[np.float32]], momentum: float) -> None:
    low, high = float(data[0].min()), float(data[0].max())
    for batch in data[1:]:
        low = momentum * low + (1 - momentum) * float(batch.min())
        high = momentum * high + (1 - momentum) * float(batch.max())
    # A few float32 roundings of numbers up to 1e4.
    assert bounds(watch(MovingAverage(momentum), data)) == pytest.approx((low, high), rel=1e-5, abs=1e-2)


def test_number_of_scales_may_not_change() -> None:
    for observer in (MinMax(), MovingAverage()):
        state = watch(observer, [torch.zeros(2, 3)], Format.parse("int8:channel=1"))
        with pytest.raises(CalibrationError, match="same number of scales") as error:
            state.observe(torch.ones(2, 4))
        assert error.value.where == f"node conv1, observer {observer}"
        assert state.range()[1].tolist() == [0, 0, 0]  # the refused batch left no trace


# --- the histogram --------------------------------------------------------------------------------------


def exact_counts(x: NDArray[np.float32], exponent: int, bins: int) -> NDArray[np.int64]:
    index = np.floor(np.ldexp(x.astype(np.float64), -exponent)).astype(np.int64) + bins
    return np.bincount(index, minlength=2 * bins)


@given(batches)
@settings(deadline=None)
def test_growing_histogram_equals_one_over_all_data(data: list[NDArray[np.float32]]) -> None:
    everything = np.concatenate(data)
    histogram = watch(Percentile(bins=16), data).histogram  # type: ignore[attr-defined]
    assert histogram.counts.numel() == 32
    assert int(histogram.counts.sum()) == everything.size
    largest = float(np.abs(everything).max())
    assert largest < 16 * histogram.width
    if largest > 2.0**-120:
        assert largest >= 8 * histogram.width  # at least half the bins of a side are in use
    np.testing.assert_array_equal(histogram.counts.numpy(), exact_counts(everything, histogram.exponent, 16))


def test_histogram_grows_from_denormals_to_the_largest_floats() -> None:
    histogram = Histogram(16)
    data = [0.0, -1e-44, 1e-30, -1.0, 3e38]
    for value in data:
        histogram.add(torch.tensor([value]), abs(value))
    # Everything but the last is now in the two bins around zero: two below, two above.
    assert histogram.counts[15].item() == 2 and histogram.counts[16].item() == 2
    assert int(histogram.counts.sum()) == 5
    assert math.ldexp(8.0, histogram.exponent) <= 3e38 < math.ldexp(16.0, histogram.exponent)


@pytest.mark.parametrize("observer", MERGEABLE, ids=str)
@given(batches, batches)
@settings(max_examples=20, deadline=None)
def test_merge_equals_one_state(observer: Observer, first: list[Any], second: list[Any]) -> None:
    merged, other = watch(observer, first), watch(observer, second)
    merged.merge(other)
    together = watch(observer, first + second)
    assert bounds(merged) == bounds(together)
    assert (merged.count, merged.batches) == (together.count, together.batches)
    assert bounds(other) == bounds(watch(observer, second))  # the other state is only read


def test_merge_leaves_the_other_state_as_it_was() -> None:
    wide, narrow = watch(Percentile(), [torch.tensor([1000.0])]), watch(Percentile(), [torch.rand(100)])
    before = narrow.histogram.exponent, narrow.histogram.counts.clone()  # type: ignore[attr-defined]
    wide.merge(narrow)
    assert narrow.histogram.exponent == before[0]  # type: ignore[attr-defined]
    assert torch.equal(narrow.histogram.counts, before[1])  # type: ignore[attr-defined]
    assert wide.histogram.exponent > before[0]  # type: ignore[attr-defined]


def test_merge_refuses_what_would_be_wrong() -> None:
    data = [torch.ones(3)]
    with pytest.raises(CalibrationError, match="different observers"):
        watch(MinMax(), data).merge(watch(Percentile(), data))
    with pytest.raises(CalibrationError, match="different observers"):
        watch(MinMax(), data).merge(watch(MinMax(), data, AFFINE))
    with pytest.raises(CalibrationError, match="moving averages"):
        watch(MovingAverage(), data).merge(watch(MovingAverage(), data))


def test_merge_with_a_state_that_saw_nothing() -> None:
    state = watch(MinMax(), [torch.tensor([-1.0, 2.0])])
    state.merge(MinMax().start())
    assert bounds(state) == (-1, 2)
    empty = MinMax().start()
    empty.merge(state)
    assert bounds(empty) == (-1, 2)


# --- percentile -----------------------------------------------------------------------------------------


def order_statistic(x: NDArray[Any], share: float) -> float:
    """Return the least value that at least `share` of the values do not exceed."""
    return float(np.percentile(x, share * 100, method="inverted_cdf"))


@pytest.mark.parametrize("percentile", [90.0, 99.9, 99.99])
@pytest.mark.parametrize("skew", [False, True])
def test_percentile_equals_numpy_to_one_bin(percentile: float, skew: bool) -> None:
    data = np.random.default_rng(0).standard_t(3, size=(8, 5000)).astype(np.float32)
    data = np.maximum(data, 0) if skew else data
    width = watch(Percentile(percentile), list(data)).histogram.width  # type: ignore[attr-defined]
    share = percentile / 100
    low, high = bounds(watch(Percentile(percentile), list(data)))
    assert high == -low
    assert abs(high - order_statistic(np.abs(data), share)) <= width
    low, high = bounds(watch(Percentile(percentile), list(data), AFFINE))
    assert abs(low - order_statistic(data, (1 - share) / 2)) <= width
    assert abs(high - order_statistic(data, (1 + share) / 2)) <= width


@given(batches)
@settings(deadline=None)
def test_all_of_the_values_are_exactly_min_max(data: list[NDArray[np.float32]]) -> None:
    everything = np.concatenate(data)
    assert bounds(watch(Percentile(100.0), data, AFFINE)) == (everything.min(), everything.max())
    assert bounds(watch(Percentile(100.0), data))[1] == np.abs(everything).max()


# --- the searches ---------------------------------------------------------------------------------------

DISTRIBUTIONS = {
    "normal": lambda rng: rng.normal(size=40000),
    "relu": lambda rng: np.maximum(rng.normal(size=40000), 0),
    "shifted": lambda rng: rng.normal(size=40000) * 0.3 + 1,
    "heavy tails": lambda rng: rng.standard_t(2.5, size=40000),
    "one outlier": lambda rng: np.append(rng.normal(size=40000), 300.0),
    "uniform": lambda rng: rng.uniform(-1, 1, size=40000),
}


def squared_error(x: torch.Tensor, low: float, high: float, format: Format) -> float:
    scale, zero_point = scale_from_range(torch.tensor(low), torch.tensor(high), format)
    return float(
        (fake_quantize(x, scale, zero_point, None, None, format.qmin, format.qmax) - x).square().mean()
    )


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("text", ["int8", "int4", "uint8:affine", "uint4:affine"])
def test_mse_range_is_the_best_on_the_data_itself(name: str, text: str) -> None:
    x = torch.from_numpy(DISTRIBUTIONS[name](np.random.default_rng(1)).astype(np.float32))
    format = Format.parse(text)
    found = squared_error(x, *bounds(watch(HistogramMSE(), list(x.split(7000)), format)), format)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    fractions = np.linspace(1, 0.004, 60) ** 2
    if format.symmetric:
        largest = max(-low, high)
        best = min(squared_error(x, -largest * f, largest * f, format) for f in fractions)
    else:
        lows = [low * f for f in fractions[::2]] if low else [0.0]
        best = min(squared_error(x, a, high * f, format) for f in fractions for a in lows)
    # 5 %: both search grids, of different spacing, and the histogram's bins stand for their values.
    assert found <= best * 1.05


def reference_divergence(counts: NDArray[Any], start: int, end: int, levels: int) -> float:
    """Return the divergence of the range in plain loops, straight from the talk by Migacz."""
    reference = [float(c) for c in counts[start:end]]
    reference[0] += float(counts[:start].sum())
    reference[-1] += float(counts[end:].sum())
    n = end - start
    candidate = [0.0] * n
    for level in range(levels):
        members = [i for i in range(n) if i * levels // n == level]
        filled = [i for i in members if reference[i] > 0]
        for i in filled:
            candidate[i] = max(sum(float(counts[start + m]) for m in members) / len(filled), 1e-4)
    total_p, total_q = sum(reference), sum(candidate)
    divergence = 0.0
    for p, q in zip(reference, candidate, strict=True):
        if p > 0:
            divergence += p / total_p * math.log((p / total_p) / (q / total_q))
    return divergence


@pytest.mark.parametrize("name", ["normal", "heavy tails", "relu"])
def test_kl_range_of_symmetric_formats_is_the_least_divergent(name: str) -> None:
    x = DISTRIBUTIONS[name](np.random.default_rng(1)).astype(np.float32)
    format, bins = Format.parse("int5"), 256
    state = watch(HistogramKL(bins), np.split(x, 4), format)
    low, high = bounds(state)
    assert low == -high
    width = state.histogram.width  # type: ignore[attr-defined]
    counts = np.bincount(np.floor(np.abs(x) / width).astype(int), minlength=bins)
    counts[0] = counts[1]  # the bin of zero
    # Sixteen levels: 0 to 15. Candidates are the 128 ranges that the search tries.
    ends = [math.ceil(np.abs(x).max() * i / 128 / width) for i in range(128, 0, -1)]
    losses = {end: reference_divergence(counts, 0, end, 16) for end in ends if end >= 16}
    # Magnitudes are folded bin by bin; a value on an edge may fall into the neighbour.
    assert losses[math.ceil(high / width)] <= min(losses.values()) * 1.02 + 1e-9


def test_kl_of_affine_formats_judges_both_sides() -> None:
    rng = np.random.default_rng(2)
    body = rng.normal(size=100000).astype(np.float32)
    x = np.concatenate([np.maximum(body, -0.5), [100.0]]).astype(np.float32)
    low, high = bounds(watch(HistogramKL(), [x], AFFINE))
    assert low < -0.45  # a short side stays whole
    assert 2.5 < high < 30  # the long one loses its outlier


@pytest.mark.parametrize("format", [SYMMETRIC, AFFINE], ids=str)
@pytest.mark.parametrize("observer", [HistogramMSE(), HistogramKL(), Percentile(99.9)], ids=str)
def test_outlier_is_clipped_and_body_is_kept(observer: Observer, format: Format) -> None:
    x = np.random.default_rng(1).normal(size=1_000_000).astype(np.float32)
    x[0] = 60.0
    low, high = bounds(watch(observer, np.split(x, 4), format))
    assert 2.5 < high < 45
    assert low < -2.5


@pytest.mark.parametrize("observer", [HistogramMSE(), HistogramKL()], ids=str)
@pytest.mark.parametrize("format", [SYMMETRIC, AFFINE], ids=str)
def test_uniform_values_are_not_clipped(observer: Observer, format: Format) -> None:
    x = np.random.default_rng(1).uniform(-1, 1, size=200000).astype(np.float32)
    low, high = bounds(watch(observer, [x], format))
    # 2 %: two of the ranges that the search tries.
    assert high == pytest.approx(1, abs=0.02) and low == pytest.approx(-1, abs=0.02)


# --- inputs at the edge -----------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", EVERY, ids=str)
@pytest.mark.parametrize("format", [SYMMETRIC, AFFINE, Format.parse("int16")], ids=str)
@pytest.mark.parametrize("constant", [0.0, 3.0, -0.25, 1e-42, -3e38])
def test_constant_input_is_represented(observer: Observer, format: Format, constant: float) -> None:
    x = torch.full((7,), constant)
    scale, zero_point = scale_from_range(*watch(observer, [x, x], format).range(), format)
    value = fake_quantize(x, scale, zero_point, None, None, format.qmin, format.qmax)
    # Half a step at 8 bits; denormal numbers may become zero.
    assert float((value - x).abs().max()) <= abs(constant) / 200 + 1e-37


@pytest.mark.parametrize("observer", EVERY, ids=str)
def test_observer_that_never_saw_data(observer: Observer) -> None:
    with pytest.raises(CalibrationError, match="never saw data") as error:
        observer.start(where="node conv1").range()
    assert error.value.where == f"node conv1, observer {observer}"
    assert error.value.next_step is not None


@pytest.mark.parametrize("observer", EVERY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_values_that_are_not_finite(observer: Observer, dtype: torch.dtype) -> None:
    state = watch(observer, [torch.tensor([-1.0, 2.0])])
    before = bounds(state)
    bad = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf], dtype=dtype)
    with pytest.raises(CalibrationError) as error:
        state.observe(bad)
    assert error.value.seen == "1 NaN and 2 infinite of 4 values, batch 2"
    assert error.value.where == f"node conv1, observer {observer}"
    assert bounds(state) == before and state.count == 2


@pytest.mark.parametrize("observer", EVERY, ids=str)
def test_infinity_alone(observer: Observer) -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        observer.start().observe(torch.tensor([1.0, torch.inf]))


@pytest.mark.parametrize("observer", EVERY, ids=str)
def test_empty_and_integer_tensors(observer: Observer) -> None:
    with pytest.raises(CalibrationError, match="empty") as error:
        observer.start().observe(torch.zeros(0, 3))
    assert error.value.seen == "shape [0, 3]"
    with pytest.raises(CalibrationError, match="floating-point") as error:
        observer.start().observe(torch.zeros(3, dtype=torch.int64))
    assert error.value.seen == "torch.int64"


@pytest.mark.parametrize("observer", [Percentile(), HistogramMSE(), HistogramKL()], ids=str)
def test_histograms_watch_whole_tensors_only(observer: Observer) -> None:
    with pytest.raises(CalibrationError, match="whole tensors") as error:
        observer.start(Format.parse("int8:channel=0"))
    assert error.value.seen == "format int8:channel=0"


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", EVERY, ids=str)
def test_memory_does_not_grow_with_the_data(observer: Observer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histogram_module, "_PIECE", 1 << 14)  # as a million to a tensor of a hundred million
    state = observer.start()
    state.observe(torch.randn(1000))
    batch = torch.randn(1_000_000)
    kept = weakref.ref(batch)
    with Allocations() as watched:
        for growth in range(6):
            state.observe(batch * 2.0**growth)
    # What lives afterwards: some bounds, and two sets of 8192 counts of 8 bytes.
    assert watched.live_bytes <= 2 * 8192 * 8 + 1000
    # At the peak: the batch made here, a piece as float64 and int32, and some sets of counts.
    assert batch.nbytes <= watched.peak_bytes <= batch.nbytes + 12 * (1 << 14) + 6 * 8192 * 8
    del batch
    gc.collect()
    assert kept() is None
    assert state.count == 1000 + 6 * 1_000_000
