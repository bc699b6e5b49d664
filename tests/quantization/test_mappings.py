"""Mappings: their tables against the formulas of their sources, their text, and what is no mapping."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sqcompile.errors import FormatError
from sqcompile.quantization import (
    Codebook,
    Format,
    Log2,
    Mapping,
    MuLaw,
    NormalFloat,
    PerGroup,
    Sigmoid,
    Tanh,
)

ALL = [Tanh(2.0), Sigmoid(3.0), MuLaw(255.0), Log2(), NormalFloat()]

# The table of the paper's appendix E, to four digits.
NF4 = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
NF4 += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("mapping", ALL, ids=str)
def test_tables_are_ascending_from_least_to_most_with_zero(mapping: Mapping, bits: int) -> None:
    values, table = mapping.values(bits), mapping.table(bits)
    assert values.shape == table.shape == (1 << bits,)
    assert bool((values.diff() > 0).all())
    assert (float(values[0]), float(values[-1])) == pytest.approx((-1, 1), abs=1e-12)
    assert int((values == 0).sum()) == 1
    assert table.dtype == torch.int8
    np.testing.assert_array_equal(table.numpy(), np.round(values.numpy() * 127))


def test_nf4_is_that_of_the_paper() -> None:
    np.testing.assert_allclose(NormalFloat().values(4).numpy(), NF4, atol=6e-5)  # its four digits


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_companding_makes_codes_even(bits: int) -> None:
    """The functions that the docstrings say codes are even in, written out, undo the tables."""
    below, above = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    even = np.concatenate([-np.arange(below, 0, -1) / below, np.arange(above + 1) / above])
    x = Tanh(2.5).values(bits).numpy()
    np.testing.assert_allclose(np.tanh(2.5 * x) / math.tanh(2.5), even, atol=1e-12)
    x = Sigmoid(4.0).values(bits).numpy()
    sigma = (2 / (1 + np.exp(-4.0 * x)) - 1) / (2 / (1 + math.exp(-4.0)) - 1)
    np.testing.assert_allclose(sigma, even, atol=1e-12)
    x = MuLaw(255).values(bits).numpy()
    law = np.sign(x) * np.log1p(255 * np.abs(x)) / math.log(256)
    np.testing.assert_allclose(law, even, atol=1e-12)


def test_sigmoid_is_tanh_of_half_the_steepness() -> None:
    torch.testing.assert_close(Sigmoid(5.0).values(4), Tanh(2.5).values(4))


def test_powers_of_two() -> None:
    assert Log2().values(3).tolist() == [-1, -0.5, -0.25, -0.125, 0, 0.25, 0.5, 1]


def test_a_codebook_has_the_entries_that_were_fitted() -> None:
    assert Codebook((-127, 0, 5, 127)).table(2).tolist() == [-127, 0, 5, 127]


@pytest.mark.parametrize("mapping", [Codebook(), Tanh(), MuLaw()], ids=str)
def test_what_is_left_open_has_no_table(mapping: Mapping) -> None:
    with pytest.raises(FormatError, match="before it is fitted"):
        mapping.table(2)


@pytest.mark.parametrize(
    "text",
    [
        "int4:group=32:mapping=nf",
        "int3:mapping=tanh",
        "int4:mapping=tanh@2.5",
        "int2:mapping=mu-law@255",
        "int4:channel=0:mapping=codebook",
        "int4:mapping=log2",
        "int4:mapping=sigmoid@0.5",
    ],
)
def test_text(text: str) -> None:
    format = Format.parse(text)
    assert str(format) == text and not format.mapping.is_linear


def test_fitted_parameters_survive_their_text() -> None:
    for mapping in (*Tanh().candidates(), *Sigmoid().candidates(), *MuLaw().candidates()):
        format = Format(bits=4, mapping=mapping)
        assert Format.parse(str(format)) == format


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("int4:mapping=nf4", "mapping=nf"),
        ("int4:mapping=tanh@-1", "a positive number"),
        ("int4:mapping=tanh@x", "a positive number"),
        ("int4:mapping=nf@2", "takes no parameter"),
        ("int5:mapping=nf", "2 to 4 bits"),
        ("int4:affine:mapping=nf", "int4:tensor:mapping=nf"),
        ("int4:dynamic:mapping=tanh", "write the parameter"),
        ("int4:narrow:mapping=nf", "leave out"),
    ],
)
def test_mistakes(text: str, seen: str) -> None:
    with pytest.raises(FormatError) as caught:
        Format.parse(text)
    assert seen in str(caught.value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_parameters_are_positive(value: float) -> None:
    for kind in (Tanh, Sigmoid, MuLaw):
        with pytest.raises(FormatError, match="a positive"):
            kind(value)


def test_a_table_is_counted() -> None:
    linear, mapped = (Format(4, granularity=PerGroup(32), mapping=item) for item in (Codebook(), Log2()))
    assert mapped.size_bits((8, 64)) == linear.size_bits((8, 64)) == 4 * 512 + 32 * 16 + 16 * 8
