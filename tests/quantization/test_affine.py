"""The arithmetic of quantization, against plain NumPy, ONNX Runtime and ONNX's own reference."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from support.allocations import Allocations
from torch._subclasses.fake_tensor import FakeTensorMode

from sqcompile.errors import FormatError, InputError
from sqcompile.quantization import (
    Format,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    dequantize,
    fake_quantize,
    least_weight_scale,
    quantize,
    quantize_bias,
    scale_for_tensor,
    scale_from_range,
)
from sqcompile.quantization.affine import BIAS_LIMIT, SMALLEST_SCALE, block_range, reduce_blocks

# --- the plain reference ----------------------------------------------------------------------------


def spread(
    parameter: NDArray[Any], shape: tuple[int, ...], axis: int | None, size: int | None
) -> NDArray[Any]:
    """Return one parameter for each element of a tensor of `shape`."""
    if axis is None:
        return np.broadcast_to(parameter, shape)
    axis %= len(shape)
    if size is None:
        return np.broadcast_to(np.expand_dims(parameter, [d for d in range(len(shape)) if d != axis]), shape)
    repeats = shape[axis] if size == -1 else size
    return np.take(np.repeat(parameter, repeats, axis), np.arange(shape[axis]), axis)


def reference(
    x: NDArray[Any], scale: NDArray[Any], zero_point: NDArray[Any], format: Format
) -> tuple[Any, Any]:
    axis, size = format.granularity.pair
    wide_scale, wide_zero = (spread(p, x.shape, axis, size) for p in (scale, zero_point))
    with np.errstate(over="ignore"):  # a quotient may overflow to infinity, and then saturates
        steps = np.rint(x / wide_scale) + wide_zero
    codes = np.clip(steps, format.qmin, format.qmax).astype(np.int64)
    return codes, (codes - wide_zero).astype(np.float32) * wide_scale


# --- cases ------------------------------------------------------------------------------------------

HEADS = ("int8", "uint8", "int4", "uint4", "int16", "uint16", "int2", "uint3", "int6", "uint7")
ONNX_TYPES = {
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int16": TensorProto.INT16,
    "uint16": TensorProto.UINT16,
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
}


@dataclass(frozen=True)
class Case:
    head: str
    format: Format
    x: NDArray[np.float32]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]

    def torch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self.x), torch.from_numpy(self.scale), torch.from_numpy(self.zero_point)

    def quantize(self) -> torch.Tensor:
        axis, size = self.format.granularity.pair
        qmin, qmax, storage = self.format.qmin, self.format.qmax, self.format.storage_dtype
        return quantize(*self.torch(), axis, size, qmin, qmax, storage)

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        return dequantize(codes, *self.torch()[1:], *self.format.granularity.pair)


def granularities(rank: int) -> st.SearchStrategy[Granularity]:
    axis = st.integers(-rank, rank - 1)
    return st.one_of(
        st.just(PerTensor()),
        st.just(PerToken()),
        st.builds(PerChannel, axis),
        st.builds(PerGroup, st.integers(2, 6), axis),
    )


@st.composite
def cases(draw: st.DrawFn, heads: tuple[str, ...] = HEADS, finite: bool = False, least_size: int = 0) -> Case:
    shape = tuple(draw(st.lists(st.integers(least_size, 9), min_size=1, max_size=3)))
    head = draw(st.sampled_from(heads))
    granularity = draw(granularities(len(shape)))
    base = Format.parse(head)
    format = Format(base.bits, base.signed, False, granularity, isinstance(granularity, PerToken))
    scale_shape = granularity.scale_shape(shape)
    # Powers of two make exact ties, on which rounding modes differ; other scales round everywhere.
    powers = st.integers(-6, 6).map(lambda power: 2.0**power)
    scale = draw(
        npst.arrays(np.float32, scale_shape, elements=powers | st.floats(2.0**-10, 2.0**10, width=32))
    )
    zero_points = st.integers(format.qmin, format.qmax)
    zero_point = draw(npst.arrays(np.int32, scale_shape, elements=zero_points))
    halves = st.integers(-2 * format.qmax - 9, 2 * format.qmax + 9).map(lambda half: half / 2)
    # 1e5 * 2**10 stays within int32, on which ONNX's reference relies.
    values = halves | st.floats(-1e5, 1e5, width=32)
    if not finite:
        values |= st.floats(allow_nan=False, width=32)
    x = draw(npst.arrays(np.float32, shape, elements=values))
    return Case(head, format, x, scale, zero_point)


# --- against the references -------------------------------------------------------------------------


@given(cases())
@settings(max_examples=300, deadline=None)
def test_equals_numpy(case: Case) -> None:
    codes = case.quantize()
    expected_codes, expected_values = reference(case.x, case.scale, case.zero_point, case.format)
    assert codes.dtype == case.format.storage_dtype
    np.testing.assert_array_equal(codes.numpy(), expected_codes)
    np.testing.assert_array_equal(case.dequantize(codes).numpy(), expected_values)


@given(cases())
@settings(deadline=None)
def test_fake_quantize_equals_quantize_then_dequantize(case: Case) -> None:
    axis, size = case.format.granularity.pair
    values = fake_quantize(*case.torch(), axis, size, case.format.qmin, case.format.qmax)
    assert torch.equal(values, case.dequantize(case.quantize()))


@lru_cache
def onnx_model(head: str, rank: int, axis: int | None, block_size: int) -> onnx.ModelProto:
    attributes = {} if axis is None else {"axis": axis, "block_size": block_size}
    code_type = ONNX_TYPES[head]
    storage = {TensorProto.INT4: TensorProto.INT8, TensorProto.UINT4: TensorProto.UINT8}.get(
        code_type, code_type
    )
    nodes = [
        helper.make_node("Cast", ["z"], ["zero_point"], to=code_type),
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"], **attributes),
        helper.make_node("Cast", ["q"], ["codes"], to=storage),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero_point"], ["values"], **attributes),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * rank),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("z", TensorProto.INT32, None),
    ]
    outputs = [
        helper.make_tensor_value_info("codes", storage, None),
        helper.make_tensor_value_info("values", TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph(nodes, "quantize", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@lru_cache
def runtime(*key: Any) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        onnx_model(*key).SerializeToString(), providers=["CPUExecutionProvider"]
    )


def onnx_key(case: Case) -> tuple[str, int, int | None, int]:
    axis, size = case.format.granularity.pair
    if case.scale.shape == (1,):
        return case.head, case.x.ndim, None, 0  # ONNX Runtime refuses blocks where there is but one
    # ONNX has no word for "the whole axis": a block as long as the axis is the same.
    block_size = case.x.shape[-1] if size == -1 else size or 0
    return case.head, case.x.ndim, axis, block_size


@given(cases(heads=tuple(ONNX_TYPES), least_size=1))
@settings(max_examples=300, deadline=None)
def test_equals_onnx_runtime(case: Case) -> None:
    feeds = {"x": case.x, "scale": case.scale, "z": case.zero_point}
    codes, values = runtime(*onnx_key(case)).run(None, feeds)
    ours = case.quantize()
    np.testing.assert_array_equal(ours.numpy(), codes)
    np.testing.assert_array_equal(case.dequantize(ours).numpy(), values)


@given(cases(heads=tuple(ONNX_TYPES), finite=True, least_size=1))
@settings(max_examples=100, deadline=None)
def test_equals_the_onnx_reference(case: Case) -> None:
    feeds = {"x": case.x, "scale": case.scale, "z": case.zero_point}
    codes, values = ReferenceEvaluator(onnx_model(*onnx_key(case))).run(None, feeds)
    ours = case.quantize()
    np.testing.assert_array_equal(ours.numpy(), codes)
    np.testing.assert_array_equal(case.dequantize(ours).numpy(), values)


def test_ties_round_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    codes = quantize(
        x, torch.tensor(1.0), torch.tensor(1, dtype=torch.int32), None, None, -128, 127, torch.int8
    )
    assert codes.tolist() == [-1, -1, 1, 1, 3, 3]  # an odd zero point: added after rounding, not before


@pytest.mark.parametrize("text", ["int8", "uint8:affine", "int4:narrow", "uint16"])
def test_saturates(text: str) -> None:
    format = Format.parse(text)
    x = torch.tensor([-torch.inf, -3e38, 3e38, torch.inf])
    zero_point = torch.tensor(format.middle, dtype=torch.int32)
    scale = torch.tensor(0.5)
    codes = quantize(x, scale, zero_point, None, None, format.qmin, format.qmax, format.storage_dtype)
    assert codes.tolist() == [format.qmin, format.qmin, format.qmax, format.qmax]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_quantized_in_float32(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 101).to(dtype)
    arguments = torch.tensor(0.1), torch.tensor(3, dtype=torch.int32), None, None, -128, 127
    assert torch.equal(quantize(x, *arguments, torch.int8), quantize(x.float(), *arguments, torch.int8))
    assert fake_quantize(x, *arguments).dtype == dtype


def test_one_scale_for_many_groups_is_refused() -> None:
    zero_point = torch.zeros(4, 1, dtype=torch.int32)
    with pytest.raises(FormatError) as error:
        quantize(torch.zeros(4, 64), torch.ones(4, 1), zero_point, -1, 32, -128, 127, torch.int8)
    assert error.value.seen == "scale of shape [4, 1]"
    assert error.value.expected == "[4, 2]"


# --- scales -----------------------------------------------------------------------------------------

ranges = npst.arrays(np.float32, 5, elements=st.floats(-(2.0**127), 2.0**127, width=32))
scale_formats = st.sampled_from(
    ("int8", "int8:narrow", "int8:affine", "uint8", "uint8:affine", "uint4:affine", "int16")
)


@given(ranges, ranges, scale_formats)
def test_scale_is_normal_and_covers_range_and_zero(a: Any, b: Any, text: str) -> None:
    format = Format.parse(text)
    low, high = torch.from_numpy(np.minimum(a, b)), torch.from_numpy(np.maximum(a, b))
    scale, zero_point = scale_from_range(low, high, format)
    assert (scale >= SMALLEST_SCALE).all() and scale.isfinite().all()
    assert ((format.qmin <= zero_point) & (zero_point <= format.qmax)).all()
    # The ends lie within half a step of a code: a half for the rounding of the zero point, and a
    # hair for float32 (2**-23 of up to 65535 steps).
    lowest = (format.qmin - zero_point.double()) * scale.double()
    highest = (format.qmax - zero_point.double()) * scale.double()
    # Spans beyond the largest float32 are clipped to it; both ends of one are not representable anyway.
    fits = (high.double() - low.double()) < 3.4e38
    assert (lowest - low.double() <= scale * 0.51)[fits].all()
    assert (high.double() - highest <= scale * 0.51)[fits].all()
    if format.symmetric:
        assert (zero_point == format.middle).all()


@pytest.mark.parametrize(
    ("text", "low", "high", "scale", "zero_point"),
    [
        ("int8", -1.27, 0.5, 0.01, 0),
        ("int8:narrow", -1.27, 0.5, 0.01, 0),
        ("uint8", -0.5, 1.27, 0.01, 128),
        ("uint8:affine", -1.0, 1.55, 0.01, 100),
        ("int8:affine", -1.0, 1.55, 0.01, -28),
        ("uint8:affine", 1.0, 2.55, 0.01, 0),  # zero is always in the range
        ("uint8:affine", -2.55, -1.0, 0.01, 255),
        ("int8", 0.0, 0.0, 1.0, 0),
        ("uint8:affine", 0.0, 0.0, 1.0, 0),
        ("uint8", 0.0, 0.0, 1.0, 128),
        ("int8", -1e-44, 1e-44, SMALLEST_SCALE, 0),  # neither zero nor denormal
    ],
)
def test_scale_of_known_ranges(text: str, low: float, high: float, scale: float, zero_point: int) -> None:
    found = scale_from_range(torch.tensor(low), torch.tensor(high), Format.parse(text))
    assert float(found[0]) == pytest.approx(scale, rel=1e-6)  # one float32 division
    assert int(found[1]) == zero_point
    assert found[1].dtype == torch.int32


@pytest.mark.parametrize(("low", "high"), [(np.nan, 1.0), (-np.inf, 1.0), (0.0, np.inf), (2.0, 1.0)])
def test_range_that_is_not_finite_is_refused(low: float, high: float) -> None:
    lows, highs = torch.tensor([0.0, low]), torch.tensor([1.0, high])
    with pytest.raises(InputError, match="range") as error:
        scale_from_range(lows, highs, Format())
    assert error.value.seen is not None and error.value.seen.startswith("1 of 2 ranges")


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize(
    "text",
    ["int8", "uint8:affine", "int4:channel=0", "int4:channel=1", "int4:group=5", "uint4:group=4:affine"],
)
def test_scale_for_tensor_without_values_or_with_zeros(text: str, search: Any) -> None:
    format = Format.parse(text)
    for x in (torch.zeros(0, 7), torch.zeros(3, 0), torch.zeros(3, 7)):
        scale, zero_point = scale_for_tensor(x, format, search)
        assert scale.shape == zero_point.shape == format.granularity.scale_shape(x.shape)
        assert (scale == 1).all()
        arguments = scale, zero_point, *format.granularity.pair, format.qmin, format.qmax
        assert torch.equal(fake_quantize(x, *arguments), x)


def squared_error(x: torch.Tensor, format: Format, search: Any) -> torch.Tensor:
    axis, size = format.granularity.pair
    scale, zero_point = scale_for_tensor(x, format, search)
    error = fake_quantize(x, scale, zero_point, axis, size, format.qmin, format.qmax) - x
    return reduce_blocks(error.square(), axis, size, torch.sum)


@pytest.mark.parametrize(
    "text", ["int4", "int4:channel=0", "uint4:group=16:affine", "int3:group=24", "int8:channel=1"]
)
def test_mse_search_is_never_worse_for_any_scale(text: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(24, 64) * torch.rand(24, 1).add(0.1) + torch.randn(24, 64).pow(5) * 0.01
    format = Format.parse(text)
    found, widest = squared_error(x, format, "mse"), squared_error(x, format, "minmax")
    assert (found <= widest).all()
    # Heavy tails: at 4 bits and fewer, clipping must pay overall.
    assert found.sum() < widest.sum() * (0.95 if format.bits <= 4 else 1.0)


def test_mse_search_finds_the_best_clip() -> None:
    torch.manual_seed(0)
    x = torch.randn(5000)
    format = Format.parse("int4")
    best = min(
        float(
            (fake_quantize(x, scale, torch.zeros((), dtype=torch.int32), None, None, -8, 7) - x)
            .square()
            .sum()
        )
        for scale in torch.linspace(0.02, 1, 2000)
    )
    # 1 %: the search tries 64 ranges, this loop 2000.
    assert float(squared_error(x, format, "mse")) <= best * 1.01


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_tensor_that_is_not_finite_is_refused(bad: float) -> None:
    x = torch.zeros(4, 8)
    x[2, 3] = bad
    with pytest.raises(InputError) as error:
        scale_for_tensor(x, Format.parse("int8:channel=0"))
    assert error.value.seen == "1 of 32 values are NaN or infinite"


@given(cases(least_size=0, finite=True))
@settings(deadline=None)
def test_block_range_equals_numpy(case: Case) -> None:
    axis, size = case.format.granularity.pair
    low, high = block_range(torch.from_numpy(case.x), axis, size)
    owner = spread(np.arange(case.scale.size).reshape(case.scale.shape), case.x.shape, axis, size)
    for block in range(case.scale.size):
        values = case.x[owner == block]
        bounds = (values.min(), values.max()) if values.size else (0, 0)
        assert (low.reshape(-1)[block], high.reshape(-1)[block]) == bounds


# --- biases -----------------------------------------------------------------------------------------


def test_bias_has_the_scale_of_the_products() -> None:
    bias, weight_scale = torch.tensor([0.5, -0.26, 1e4]), torch.tensor([0.25, 0.5, 2.0**-10])
    codes, scale = quantize_bias(bias, torch.tensor(0.5), weight_scale)
    assert codes.dtype == torch.int32
    assert scale.tolist() == [0.125, 0.25, 2.0**-11]
    assert codes.tolist() == [4, -1, 20480000]


def test_large_bias_codes_are_exact() -> None:
    codes, _ = quantize_bias(torch.tensor([1e8]), torch.tensor(3.0), torch.tensor(1.0))
    assert codes.tolist() == [33333333]  # odd, and beyond 2**24: no float32 number


@pytest.mark.parametrize("bias", [float(BIAS_LIMIT) * 1.001, torch.nan, -torch.inf])
def test_bias_beyond_the_limit_is_refused(bias: float) -> None:
    with pytest.raises(InputError, match="bias") as error:
        quantize_bias(torch.tensor([1.0, bias]), torch.tensor(1.0), torch.tensor([1.0, 1.0]))
    assert error.value.seen is not None and error.value.seen.startswith("1 of 2 channels")


@given(npst.arrays(np.float32, 6, elements=st.floats(-1e6, 1e6, width=32)), st.floats(2.0**-20, 10, width=32))
def test_least_weight_scale_makes_any_bias_fit(bias: Any, input_scale: float) -> None:
    weight_scale = least_weight_scale(torch.from_numpy(bias), torch.tensor(input_scale))
    codes, _ = quantize_bias(torch.from_numpy(bias), torch.tensor(input_scale), weight_scale)
    assert (codes.abs() <= BIAS_LIMIT).all()
    if abs(bias).max() > 1:
        assert codes.abs().max() > BIAS_LIMIT * 0.999  # and no larger than needed


# --- memory, layout, fake tensors -------------------------------------------------------------------

LAYOUTS = {
    "tensor": (PerTensor(), (64, 1024)),
    "channel": (PerChannel(0), (64, 1024)),
    "group": (PerGroup(32), (64, 1024)),
    "incomplete group": (PerGroup(65), (64, 1024)),
    "token": (PerToken(), (64, 1024)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_at_most_two_temporaries(layout: str, symmetric: bool) -> None:
    granularity, shape = LAYOUTS[layout]
    format = Format(8, not symmetric, symmetric, granularity, isinstance(granularity, PerToken))
    x = torch.randn(shape)
    size_bytes = x.numel() * 4
    small_bytes = size_bytes // 16  # scales, zero points
    pair, (scale, zero_point) = granularity.pair, scale_for_tensor(x, format)
    arguments = scale, zero_point, *pair, format.qmin, format.qmax
    with Allocations() as quantizing:
        codes = quantize(x, *arguments, format.storage_dtype)
    assert size_bytes < quantizing.peak_bytes <= 2 * size_bytes + small_bytes
    with Allocations() as dequantizing:
        dequantize(codes, scale, zero_point, *pair)
    assert size_bytes <= dequantizing.peak_bytes <= 2 * size_bytes + small_bytes
    with Allocations() as faking:
        fake_quantize(x, *arguments)
    assert size_bytes <= faking.peak_bytes <= 2 * size_bytes + small_bytes
    with Allocations() as searching:
        scale_for_tensor(x, format, "mse", steps=4)
    assert (
        size_bytes <= searching.peak_bytes <= 2 * size_bytes + 4 * small_bytes
    )  # several candidates' scales


@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(1), PerGroup(2, axis=1), PerGroup(3, axis=1)]
)
def test_memory_layout_is_kept(granularity: Granularity) -> None:
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    format = Format(granularity=granularity)
    scale, zero_point = scale_for_tensor(x, format)
    arguments = scale, zero_point, *granularity.pair, format.qmin, format.qmax
    codes = quantize(x, *arguments, torch.int8)
    assert codes.stride() == fake_quantize(x, *arguments).stride() == x.stride()
    assert torch.equal(codes, quantize(x.contiguous(), *arguments, torch.int8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_on_fake_tensors(layout: str) -> None:
    granularity, shape = LAYOUTS[layout]
    format = Format(granularity=granularity, dynamic=isinstance(granularity, PerToken))
    with FakeTensorMode():
        x = torch.empty(shape)
        scale = torch.empty(granularity.scale_shape(shape))
        zero_point = torch.empty(scale.shape, dtype=torch.int32)
        codes = quantize(x, scale, zero_point, *granularity.pair, format.qmin, format.qmax, torch.int8)
        values = dequantize(codes, scale, zero_point, *granularity.pair, torch.float16)
        low, _ = block_range(x, *granularity.pair)
    assert (codes.shape, codes.dtype) == (x.shape, torch.int8)
    assert (values.shape, values.dtype) == (x.shape, torch.float16)
    assert low.shape == scale.shape


def test_records_no_gradient() -> None:
    x = torch.randn(8, requires_grad=True)
    scale, zero_point = scale_for_tensor(x, Format())
    codes = quantize(x, scale, zero_point, None, None, -128, 127, torch.int8)
    assert not scale.requires_grad and not codes.requires_grad
