"""Formats: their text, their codes, the shapes of their scales, their size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sqcompile.errors import FormatError
from sqcompile.quantization import Format, PerChannel, PerGroup, PerTensor, PerToken
from sqcompile.quantization.format import BITS

axes = st.integers(-4, 3)
granularities = st.one_of(
    st.just(PerTensor()),
    st.just(PerToken()),
    st.builds(PerChannel, axes),
    st.builds(PerGroup, st.integers(1, 4096), axes),
)


@st.composite
def formats(draw: st.DrawFn) -> Format:
    granularity = draw(granularities)
    return Format(
        bits=draw(st.sampled_from(BITS)),
        signed=draw(st.booleans()),
        symmetric=draw(st.booleans()),
        granularity=granularity,
        dynamic=isinstance(granularity, PerToken) or draw(st.booleans()),
        narrow=draw(st.booleans()),
    )


@given(formats())
def test_text_parses_back(format: Format) -> None:
    assert Format.parse(str(format)) == format


@pytest.mark.parametrize(
    ("text", "format"),
    [
        ("int8", Format()),
        ("uint8:affine", Format(signed=False, symmetric=False)),
        ("int4:group=32", Format(bits=4, granularity=PerGroup(32))),
        ("uint4:group=32:affine", Format(4, signed=False, symmetric=False, granularity=PerGroup(32))),
        ("int4:group=32@0", Format(bits=4, granularity=PerGroup(32, axis=0))),
        ("int8:channel=0", Format(granularity=PerChannel(0))),
        ("int8:channel=0:narrow", Format(granularity=PerChannel(0), narrow=True)),
        ("uint8:affine:dynamic", Format(signed=False, symmetric=False, dynamic=True)),
        ("int8:token:dynamic", Format(granularity=PerToken(), dynamic=True)),
        ("int16", Format(bits=16)),
    ],
)
def test_text_of_common_formats(text: str, format: Format) -> None:
    assert str(format) == text
    assert Format.parse(text) == format


@pytest.mark.parametrize(
    ("text", "format"),
    [
        ("int8:tensor:symmetric:static:mapping=linear", Format()),
        ("int8:dynamic:token", Format(granularity=PerToken(), dynamic=True)),
        ("  uint4:affine:group=32 ", Format.parse("uint4:group=32:affine")),
    ],
)
def test_words_may_be_spelled_out_and_come_in_any_order(text: str, format: Format) -> None:
    assert Format.parse(text) == format


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("in8", "int8"),
        ("uint9", "uint8"),
        ("unit4:affine", "uint4"),
        ("uint8:afine", "affine"),
        ("int8:dynamc", "dynamic"),
        ("int4:groups=32", "group=32"),
        ("int4:group", "group=32"),
        ("int8:chanel=0", "channel=0"),
        ("int8:mapping=liner", "mapping=linear"),
    ],
)
def test_typo_names_the_nearest_word(typo: str, meant: str) -> None:
    with pytest.raises(FormatError) as error:
        Format.parse(typo)
    assert error.value.where == f"format {typo!r}"
    assert error.value.next_step is not None and repr(meant) in error.value.next_step


@pytest.mark.parametrize(
    "text", ["int8:affine:symmetric", "int8:token:group=32:dynamic", "int8:narrow:narrow"]
)
def test_contradicting_words_are_refused(text: str) -> None:
    with pytest.raises(FormatError, match="contradicts"):
        Format.parse(text)


@pytest.mark.parametrize("text", ["", "int8:", "float8", "int4:group=0", "int4:group=-32", "int8:channel=x"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        Format.parse(text)


def test_static_scales_per_token_are_refused() -> None:
    with pytest.raises(FormatError, match="only at run time") as error:
        Format(granularity=PerToken())
    assert error.value.expected == "int8:token:dynamic"


@pytest.mark.parametrize("bits", [0, 1, 9, 12, 32])
def test_only_2_to_8_and_16_bits_exist(bits: int) -> None:
    with pytest.raises(FormatError, match=f"{bits} bits"):
        Format(bits=bits)


@pytest.mark.parametrize(
    ("text", "qmin", "qmax", "middle", "storage"),
    [
        ("int8", -128, 127, 0, torch.int8),
        ("int8:narrow", -127, 127, 0, torch.int8),
        ("uint8", 0, 255, 128, torch.uint8),
        ("uint8:narrow", 1, 255, 128, torch.uint8),
        ("int4", -8, 7, 0, torch.int8),
        ("uint4", 0, 15, 8, torch.uint8),
        ("int2:narrow", -1, 1, 0, torch.int8),
        ("uint2", 0, 3, 2, torch.uint8),
        ("int16", -32768, 32767, 0, torch.int16),
        ("uint16", 0, 65535, 32768, torch.uint16),
    ],
)
def test_codes(text: str, qmin: int, qmax: int, middle: int, storage: torch.dtype) -> None:
    format = Format.parse(text)
    assert (format.qmin, format.qmax, format.middle) == (qmin, qmax, middle)
    assert format.storage_dtype == storage


@pytest.mark.parametrize(
    ("granularity", "shape", "scale"),
    [
        (PerTensor(), (8, 3, 5, 5), ()),
        (PerTensor(), (), ()),
        (PerChannel(0), (8, 3, 5, 5), (8,)),
        (PerChannel(1), (8, 3, 5, 5), (3,)),
        (PerChannel(-1), (8, 3), (3,)),
        (PerGroup(32), (8, 64), (8, 2)),
        (PerGroup(32), (8, 65), (8, 3)),
        (PerGroup(32), (8, 0), (8, 0)),
        (PerGroup(32, axis=0), (40, 8), (2, 8)),
        (PerGroup(128), (2, 3, 64), (2, 3, 1)),
        (PerToken(), (2, 3, 64), (2, 3, 1)),
        (PerToken(), (2, 3, 0), (2, 3, 1)),
    ],
)
def test_shape_of_the_scale(granularity: PerTensor, shape: tuple[int, ...], scale: tuple[int, ...]) -> None:
    assert granularity.scale_shape(shape) == scale


@pytest.mark.parametrize("granularity", [PerChannel(2), PerChannel(-3), PerGroup(4, axis=2)])
def test_axis_that_does_not_exist_is_refused(granularity: PerChannel) -> None:
    with pytest.raises(FormatError, match="does not exist in a tensor of 2 dimensions"):
        granularity.scale_shape((4, 4))


@pytest.mark.parametrize(
    ("text", "scale_bits", "bits"),
    [
        ("int8", 32, 8 + 32 / (64 * 128)),
        ("int8:channel=0", 32, 8 + 32 / 128),
        ("int4:group=32", 32, 5.0),
        ("int4:group=32", 16, 4.5),
        ("uint4:group=32:affine", 16, 4.625),  # a zero point of 4 bits a group
        ("int4:group=48", 16, 4 + 16 * 3 / 128),  # 128 = 48 + 48 + 32: three groups a row
        ("int8:token:dynamic", 32, 8.0),  # nothing but codes is stored
    ],
)
def test_bits_per_weight(text: str, scale_bits: int, bits: float) -> None:
    assert Format.parse(text).bits_per_weight((64, 128), scale_bits) == bits


def test_bits_per_weight_of_an_empty_tensor() -> None:
    assert Format.parse("int4:group=32").bits_per_weight((0, 128)) == 4.0


def test_formats_are_values() -> None:
    assert len({Format.parse("int4:group=32"), Format(bits=4, granularity=PerGroup(32)), Format()}) == 2
    with pytest.raises(AttributeError):
        Format().bits = 4  # type: ignore[misc]
