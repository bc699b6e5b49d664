"""Encoding by tables, and fitting of tables and scales, against plain NumPy and exhaustive search."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sqcompile.errors import InputError
from sqcompile.quantization import Codebook, Format, affine
from sqcompile.quantization.lookup import Fitted, encode, fake_lookup, fit, lookup, nearest_entries

TABLES = ["nf", "tanh", "sigmoid", "mu-law", "log2", "codebook"]


def heavy_tailed(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    normal = torch.randn(*shape, generator=generator)
    return normal * torch.rand(*shape, generator=generator).mul(2).exp()


def decoded(weight: Tensor, fitted: Fitted, format: Format) -> Tensor:
    axis, group_size = format.granularity.pair
    entries = lookup(
        encode(affine.divide(weight, fitted.scale, axis, group_size), fitted.table), fitted.table
    )
    zero = torch.zeros_like(fitted.scale, dtype=torch.int32)
    return affine.dequantize(entries, fitted.scale, zero, axis, group_size)


def error(weight: Tensor, fitted: Fitted, format: Format) -> float:
    return float((decoded(weight, fitted, format) - weight).square().sum())


@given(
    st.lists(st.integers(-127, 127), min_size=4, max_size=16).map(sorted),
    st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=50),
)
def test_codes_are_of_the_nearest_entry(entries: list[int], values: list[float]) -> None:
    table, steps = torch.tensor(entries, dtype=torch.int8), torch.tensor(values)
    codes = encode(steps, table)
    assert codes.dtype == torch.uint8
    distance = (lookup(codes, table).double() - steps.double()).abs().numpy()
    every = np.abs(steps.double().numpy()[:, None] - np.array(entries, dtype=float)[None])
    np.testing.assert_array_equal(distance, every.min(1))


@pytest.mark.parametrize("word", ["nf", "tanh@2", "mu-law@20", "log2"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_of_values_become_those_of_the_nearest_entries(word: str, bits: int) -> None:
    table = Format.parse(f"int{bits}:mapping={word}").mapping.table(bits)
    found = nearest_entries(table)
    assert found.dtype == torch.uint8 and found.shape == (256,)
    entries = table.double().numpy()
    steps = np.arange(256) - 128.0
    np.testing.assert_array_equal(
        np.abs(found.double().numpy() - 128 - steps), np.abs(steps[:, None] - entries[None]).min(1)
    )
    assert int(found[128]) == 128  # zero stays zero
    assert torch.equal(found[found.long()], found)  # and entries stay what they are


def test_values_in_training_are_what_their_codes_will_restore() -> None:
    x, table = heavy_tailed(7, 96), Format.parse("int3:mapping=tanh@2").mapping.table(3)
    scale, zero = x.abs().max() / 127, torch.tensor(128, dtype=torch.int32)
    codes = affine.quantize(x, scale, zero, None, None, 0, 255, torch.uint8)
    wanted = affine.dequantize(lookup(codes, nearest_entries(table)), scale, zero, None, None)
    found = fake_lookup(x, scale, table, None, None, True)
    assert torch.equal(found, wanted)
    # Without the step between, some values that lie between two entries go to the other one.
    assert not torch.equal(fake_lookup(x, scale, table, None, None), wanted)


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("word", TABLES)
@pytest.mark.parametrize("granularity", ["tensor", "channel=0", "group=16", "group=24"])
def test_a_fit_decodes_to_near_the_weight(word: str, granularity: str, search: affine.Search) -> None:
    weight = heavy_tailed(12, 64)
    weight[3] = 0.0
    format = Format.parse(f"int4:{granularity}:mapping={word}")
    fitted = fit(weight, format, search)
    assert fitted.scale.shape == format.granularity.scale_shape(weight.shape)
    assert fitted.table.shape == (16,)
    restored = decoded(weight, fitted, format)
    assert not bool(restored[3].any())
    if search == "minmax":  # all in reach: never further than half the widest gap of its group
        gap = float(fitted.table.float().diff().max()) / 2
        scales = affine.dequantize(
            torch.ones_like(weight, dtype=torch.int8),
            fitted.scale,
            torch.zeros_like(fitted.scale, dtype=torch.int32),
            *format.granularity.pair,
        )
        reach = float((weight / scales).abs().max())
        ends = reach - min(abs(int(fitted.table[0])), int(fitted.table[-1]))
        assert bool(((restored - weight).abs() <= scales * (max(gap, ends) + 1e-3)).all())


@pytest.mark.parametrize("word", TABLES)
def test_the_search_never_loses_to_covering_all(word: str) -> None:
    weight = heavy_tailed(16, 64)
    format = Format.parse(f"int3:group=32:mapping={word}")
    assert error(weight, fit(weight, format, "mse"), format) <= error(weight, fit(weight, format), format)


@pytest.mark.parametrize("word", ["tanh", "sigmoid", "mu-law"])
def test_an_open_parameter_is_the_best_of_its_candidates(word: str) -> None:
    weight = heavy_tailed(16, 64)
    format = Format.parse(f"int4:channel=0:mapping={word}")
    chosen = error(weight, fit(weight, format), format)
    others = []
    for candidate in format.mapping.candidates():
        fixed = Format.parse(f"int4:channel=0:mapping={candidate}")
        others.append(error(weight, fit(weight, fixed), fixed))
    # The choice is made on a histogram of 1024 bins, which moves a value by at most an eighth of an entry.
    assert chosen <= min(others) * 1.001
    assert chosen < 0.9 * max(others)


def test_a_codebook_is_that_of_exhaustive_search() -> None:
    """Few distinct values: every table of their values is tried, with the zero that all tables have."""
    distinct = torch.tensor([-127.0, -90.0, -40.0, -35.0, 12.0, 60.0, 127.0])
    weight = distinct.repeat_interleave(torch.tensor([3, 9, 20, 8, 30, 2, 1]))[None]
    format = Format.parse("int2:channel=0:mapping=codebook")
    ours = error(weight, fit(weight, format), format)
    tables = itertools.combinations(range(-127, 128, 2), 3)
    best = min(
        float((weight[0, :, None] - torch.tensor([0.0, *table])).square().min(-1).values.sum())
        for table in tables
        if table[1] in (-37, -39, 11, 13)  # one of the two largest groups has an entry of its own
    )
    assert ours <= best


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_fitted_table_beats_those_that_are_given(bits: int) -> None:
    """In groups the largest weight is an end of the table, so half of what others assume is not so."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    losses = {}
    for word in TABLES:
        format = Format.parse(f"int{bits}:group=32:mapping={word}")
        losses[word] = error(weight, fit(weight, format, "mse"), format)
    assert losses["codebook"] == min(losses.values())


def test_importance_decides_where_entries_go() -> None:
    weight = torch.cat([torch.linspace(0.1, 0.3, 32), torch.linspace(-1, -0.7, 32)])[None]
    format = Format.parse("int2:channel=0:mapping=codebook")
    heavy = torch.cat([torch.full((32,), 100.0), torch.ones(32)])

    def small(fitted: Fitted) -> float:
        return float((decoded(weight, fitted, format) - weight)[:, :32].square().sum())

    assert small(fit(weight, format, importance=heavy)) < small(fit(weight, format, importance=1 / heavy))


def test_fitting_again_with_what_was_fitted_changes_nothing() -> None:
    weight = heavy_tailed(8, 64)
    format = Format.parse("int4:group=32:mapping=codebook")
    first = fit(weight, format, "mse")
    assert isinstance(first.mapping, Codebook) and first.mapping.entries is not None
    again = fit(weight, Format(4, granularity=format.granularity, mapping=first.mapping), "mse")
    torch.testing.assert_close(again.table, first.table, rtol=0, atol=0)
    torch.testing.assert_close(again.scale, first.scale, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_nothing_to_fit(shape: tuple[int, int]) -> None:
    format = Format.parse("int4:channel=0:mapping=codebook")
    fitted = fit(torch.zeros(shape), format, "mse")
    assert fitted.scale.shape == (shape[0],) and bool(fitted.table.diff().ge(0).all())


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(InputError, match="1 of 8 values are NaN or infinite"):
        fit(torch.tensor([[1.0] * 7 + [float("nan")]]), Format.parse("int4:mapping=nf"))


@pytest.mark.parametrize("granularity", ["tensor", "channel=0", "group=4"])
def test_gradients_go_straight_through_inside_of_the_table(granularity: str) -> None:
    """Against the definition, written out value by value."""
    table = torch.tensor([-127, -40, 0, 64], dtype=torch.int8)
    axis, group_size = Format.parse(f"int2:{granularity}:mapping=codebook").granularity.pair
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, generator=generator, requires_grad=True)
    shape = {"tensor": (), "channel=0": (3,), "group=4": (3, 2)}[granularity]
    scale = (torch.rand(shape, generator=generator) / 100 + 0.005).requires_grad_()
    wide = torch.broadcast_to(
        scale.detach().reshape(*shape, *[1] * (2 - len(shape))), (3, shape[1] if shape[1:] else 1)
    )
    wide = wide.repeat_interleave(8 // wide.shape[1], 1)
    upstream = torch.randn(3, 8, generator=generator)
    result = fake_lookup(x, scale, table, axis, group_size)
    result.backward(upstream)

    to_x, to_scale = torch.zeros(3, 8), torch.zeros(3, 8)
    for row, column in itertools.product(range(3), range(8)):
        step = float(x[row, column].detach() / wide[row, column])
        entry = min(table.tolist(), key=lambda item: abs(item - step))
        inside = -127 <= step <= 64
        assert float(result[row, column].detach()) == pytest.approx(
            entry * float(wide[row, column]), rel=1e-6
        )
        to_x[row, column] = upstream[row, column] * inside
        to_scale[row, column] = upstream[row, column] * (entry - step * inside)
    assert bool((to_x == 0).any() and (to_x != 0).any()), "some are clipped"
    assert x.grad is not None and torch.equal(x.grad, to_x)
    expected = {
        "tensor": lambda: to_scale.sum(),
        "channel=0": lambda: to_scale.sum(1),
        "group=4": lambda: to_scale.reshape(3, 2, 4).sum(2),
    }[granularity]()
    # Sums of eight to 24 products of size about 50.
    assert scale.grad is not None and torch.allclose(scale.grad, expected, rtol=1e-4, atol=1e-3)
