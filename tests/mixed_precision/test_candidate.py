from __future__ import annotations

import pytest

from sqcompile.errors import FormatError
from sqcompile.mixed_precision import Candidate
from sqcompile.quantization import Format
from sqcompile.sparsity import Pattern

FOUR = Format.parse("uint4:group=32:affine")


@pytest.mark.parametrize(
    ("text", "candidate"),
    [
        ("uint4:group=32:affine", Candidate(FOUR)),
        ("uint4:group=32:affine+50%", Candidate(FOUR, 0.5)),
        ("uint4:group=32:affine+12.5%", Candidate(FOUR, 0.125)),
        ("int8:channel=0+2:4", Candidate(Format.parse("int8:channel=0"), pattern=Pattern.parse("2:4"))),
        ("int8+1x4:80%", Candidate(Format(), 0.8, Pattern.parse("1x4"))),
    ],
)
def test_text(text: str, candidate: Candidate) -> None:
    assert Candidate.parse(text) == candidate
    assert str(candidate) == text


@pytest.mark.parametrize("text", ["int5+half", "int4+100%", "int4+2:4:80%", "uint8:dynamic", "int4+1x4"])
def test_mistakes(text: str) -> None:
    with pytest.raises(FormatError):
        Candidate.parse(text)


def test_counts_scales_zero_points_and_marks() -> None:
    shape = (8, 64)
    assert Candidate(FOUR).size_bits(shape) == 512 * 4 + 16 * (32 + 4)
    # A bit for each weight, and codes for the half that is kept.
    assert Candidate(FOUR, 0.5).size_bits(shape) == 512 + 256 * 4 + 16 * 36
    # A bit for each block of four.
    assert Candidate.parse("int8+1x4:75%").size_bits(shape) == 128 + 128 * 8 + 32
