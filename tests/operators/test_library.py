"""The operators: registration, tracing, gradients, and what they compute."""

from __future__ import annotations

import gc
import importlib
import sys
from functools import lru_cache
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.library import opcheck

from sqcompile.errors import FormatError, InputError
from sqcompile.operators import library
from sqcompile.quantization import Format, dequantize, quantize, scale_for_tensor

ops = torch.ops.sqcompile

FORMATS = tuple(
    Format.parse(text)
    for text in (
        "int8",
        "uint8:affine",
        "int4:channel=0",
        "int8:channel=1:narrow",
        "uint4:group=5:affine",
        "int4:group=7",
        "int4:group=4@0",
        "int8:token:dynamic",
        "int16",
        "uint16:affine",
    )
)


def arguments(format: Format) -> tuple[int | None, int | None, int, int]:
    return *format.granularity.pair, format.qmin, format.qmax


def example(format: Format) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(6, 10)
    return x, *scale_for_tensor(x * 0.7, format)  # some values lie outside the range


# --- registration and tracing -------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_opcheck_of_quantizing_operators(format: Format) -> None:
    x, scale, zero_point = example(format)
    codes = ops.quantize(x, scale, zero_point, *arguments(format))
    opcheck(
        ops.quantize.default, (x.requires_grad_(), scale.requires_grad_(), zero_point, *arguments(format))
    )
    opcheck(ops.fake_quantize.default, (x, scale, zero_point, *arguments(format)))
    opcheck(ops.dequantize.default, (codes, scale, zero_point, *arguments(format)))
    opcheck(ops.dynamic_scale.default, (x, *arguments(format), format.symmetric))


@pytest.mark.parametrize("shape", [(), (0, 4), (2, 3, 4, 5)])
def test_opcheck_of_observe_and_mask(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    opcheck(ops.observe.default, (x, "min-max"))
    opcheck(ops.mask.default, (x, torch.rand(shape) > 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_opcheck_in_half_precision(dtype: torch.dtype) -> None:
    format = Format.parse("int8:channel=0")
    x, scale, zero_point = example(format)
    opcheck(ops.fake_quantize.default, (x.to(dtype).requires_grad_(), scale, zero_point, *arguments(format)))
    opcheck(ops.dynamic_scale.default, (x.to(dtype), *arguments(format), True))
    codes = ops.quantize(x.to(dtype), scale, zero_point, *arguments(format))
    opcheck(ops.dequantize.default, (codes, scale.to(dtype), zero_point, *arguments(format)))


def test_opcheck_of_other_memory_layouts() -> None:
    format = Format.parse("int8:channel=1")
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    scale, zero_point = scale_for_tensor(x, format)
    for view in (x, x.permute(3, 1, 0, 2)):
        opcheck(ops.quantize.default, (view, scale, zero_point, *arguments(format)))
        opcheck(ops.fake_quantize.default, (view, scale, zero_point, *arguments(format)))
        opcheck(ops.dynamic_scale.default, (view, -1, 2, -128, 127, True))
        opcheck(ops.mask.default, (view, torch.ones(view.shape, dtype=torch.bool)))


class Quantized(nn.Module):
    """Every operator once, on a batch of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))
        self.format = Format.parse("int4:group=3")
        scale, zero_point = scale_for_tensor(self.weight, self.format)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero_point", zero_point)
        self.register_buffer("kept", torch.rand(5, 8) > 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = ops.observe(x, "input")
        token = (-1, -1, -128, 127)
        scale, zero_point = ops.dynamic_scale(x, *token, True)
        codes = ops.quantize(x, scale, zero_point, *token)
        x = ops.dequantize(codes, scale, zero_point, *token)
        weight = ops.mask(self.weight, self.kept)
        weight = ops.fake_quantize(weight, self.weight_scale, self.weight_zero_point, *arguments(self.format))
        return nn.functional.linear(x, weight)


def test_survives_export_and_decomposition() -> None:
    torch.manual_seed(0)
    module = Quantized().eval()
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(module, (torch.randn(4, 8),), dynamic_shapes=shapes)
    for exported in (program, program.run_decompositions()):
        targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
        for name in ("observe", "dynamic_scale", "quantize", "dequantize", "mask", "fake_quantize"):
            assert f"sqcompile.{name}.default" in targets
        for batch in (1, 4, 33):
            x = torch.randn(batch, 8)
            assert torch.equal(exported.module()(x), module(x))


def test_symbolic_sizes_stay_symbolic() -> None:
    program = torch.export.export(
        Quantized(), (torch.randn(4, 8),), dynamic_shapes={"x": {0: torch.export.Dim("batch", max=64)}}
    )
    sizes = [node.meta["val"].shape[0] for node in program.graph.nodes if node.name in ("quantize", "linear")]
    assert len(sizes) == 2 and not any(isinstance(size, int) for size in sizes)


@pytest.mark.parametrize("again", ["reload", "fresh import"])
def test_importing_again_registers_nothing_twice(again: str) -> None:
    x = torch.ones(3)
    if again == "reload":
        importlib.reload(library)
    else:
        old = sys.modules.pop(library.__name__)
        assert importlib.import_module(library.__name__) is not old
        sys.modules[library.__name__] = old
    gc.collect()
    assert ops.observe(x, "o").equal(x)
    assert ops.mask(x, x > 0).equal(x)


# --- what they compute ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_equal_to_the_arithmetic(format: Format) -> None:
    x, scale, zero_point = example(format)
    codes = ops.quantize(x, scale, zero_point, *arguments(format))
    assert codes.dtype == format.storage_dtype
    assert torch.equal(codes, quantize(x, scale, zero_point, *arguments(format), codes.dtype))
    values = ops.dequantize(codes, scale, zero_point, *arguments(format))
    assert torch.equal(values, dequantize(codes, scale, zero_point, *format.granularity.pair))
    assert torch.equal(ops.fake_quantize(x, scale, zero_point, *arguments(format)), values)
    assert not torch.equal(values, x)
    dynamic = ops.dynamic_scale(x * 0.7, *arguments(format), format.symmetric)
    assert torch.equal(dynamic[0], scale) and torch.equal(dynamic[1], zero_point)


def test_dequantize_gives_the_scale_its_dtype() -> None:
    codes = torch.tensor([-3, 5], dtype=torch.int8)
    scale, zero_point = torch.tensor(0.5, dtype=torch.float16), torch.tensor(1, dtype=torch.int32)
    values = ops.dequantize(codes, scale, zero_point, None, None, -128, 127)
    assert values.dtype == torch.float16 and values.tolist() == [-2, 2]


@lru_cache
def dynamic_quantize_linear() -> Any:
    outputs = (("codes", TensorProto.UINT8), ("scale", TensorProto.FLOAT), ("zero_point", TensorProto.UINT8))
    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeLinear", ["x"], [name for name, _ in outputs])],
        "dynamic",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session, ReferenceEvaluator(model)


# Not below 1e-9, where a scale could fall under the smallest that we give; and halves, whose quotient by
# the scale is often exactly between two zero points.
reals = (
    st.floats(2.0**-30, 2.0**100, width=32)
    | st.floats(-(2.0**100), -(2.0**-30), width=32)
    | st.integers(-255, 255).map(lambda half: half / 2)
)


@given(npst.arrays(np.float32, st.integers(1, 12), elements=reals))
@settings(max_examples=300, deadline=None)
def test_dynamic_scale_equals_onnx_dynamic_quantize_linear(x: Any) -> None:
    pair = None, None, 0, 255
    scale, zero_point = ops.dynamic_scale(torch.from_numpy(x), *pair, False)
    codes = ops.quantize(torch.from_numpy(x), scale, zero_point, *pair)
    session, evaluator = dynamic_quantize_linear()
    found = (codes.numpy(), scale.numpy(), zero_point.numpy())
    for ours, theirs in zip(found, session.run(None, {"x": x}), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if x.any():  # ONNX's reference gives a tensor of zeros the scale 1/255, ONNX Runtime and we give it 1
        for ours, theirs in zip(found, evaluator.run(None, {"x": x}), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("symmetric", [True, False])
def test_dynamic_scale_of_zeros_and_of_nothing(symmetric: bool) -> None:
    for x in (torch.zeros(3, 4), torch.zeros(3, 0), torch.zeros(0, 4)):
        scale, zero_point = ops.dynamic_scale(x, -1, -1, -128, 127, symmetric)
        assert scale.shape == zero_point.shape == (x.shape[0], 1)
        assert (scale == 1).all()
        assert (zero_point == (0 if symmetric else -128)).all()


def test_mask_zeroes_what_it_does_not_keep() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    mask = torch.tensor([[True, False], [False, True]])
    assert ops.mask(weight, mask).tolist() == [[1, 0], [0, 4]]


@pytest.mark.parametrize("mask", [torch.ones(2, dtype=torch.bool), torch.ones(2, 2)])
def test_mask_that_does_not_fit_is_refused(mask: Tensor) -> None:
    with pytest.raises(InputError, match="mask") as error:
        ops.mask(torch.ones(2, 2), mask)
    assert error.value.expected == "torch.bool of shape [2, 2]"


def test_scale_that_does_not_fit_is_refused_while_tracing() -> None:
    class Wrong(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.quantize(x, torch.ones(3), torch.zeros(3, dtype=torch.int32), 1, None, -128, 127)

    with pytest.raises(FormatError, match="does not fit"):
        torch.export.export(Wrong(), (torch.ones(2, 4),))


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_fake_quantize_has_the_gradients_of_lsq(format: Format) -> None:
    x, scale, zero_point = example(format)
    upstream = torch.randn(x.shape)
    ours = [tensor.clone().requires_grad_() for tensor in (x, scale)]
    ops.fake_quantize(*ours, zero_point, *arguments(format)).backward(upstream)

    # The same by automatic differentiation: round(v) as v plus a constant, scales spread by indexing.
    theirs = [tensor.clone().requires_grad_() for tensor in (x, scale)]
    owner = torch.arange(scale.numel(), dtype=torch.float32).reshape(scale.shape)  # each scale's own number
    ones, zeros = torch.ones(x.shape, dtype=torch.int8), torch.zeros(scale.shape, dtype=torch.int32)
    index = dequantize(ones, owner, zeros, *format.granularity.pair).long()
    assert index.unique().numel() == scale.numel()
    wide_scale, wide_zero = theirs[1].reshape(-1)[index], zero_point.reshape(-1)[index]
    steps = (theirs[0] / wide_scale).clamp(format.qmin - wide_zero, format.qmax - wide_zero)
    ((steps + (steps.round() - steps).detach()) * wide_scale).backward(upstream)
    # float32 sums of up to 60 terms of up to 32767 steps, in another order.
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[1].grad, theirs[1].grad, rtol=1e-4, atol=1e-3 * format.qmax / 127)
    inside = (x / wide_scale + wide_zero >= format.qmin) & (x / wide_scale + wide_zero <= format.qmax)
    assert 0 < inside.float().mean() < 1, "the example must have values inside and outside"


def test_gradients_on_the_edge_of_the_range() -> None:
    x = torch.tensor([-8.5, -8.0, -1.25, 0.5, 7.0, 7.25], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    total = torch.zeros(6)
    for position in range(6):
        x.grad = scale.grad = None
        out = ops.fake_quantize(x, scale, torch.tensor(0, dtype=torch.int32), None, None, -8, 7)
        out[position].backward()
        assert x.grad is not None and scale.grad is not None
        assert x.grad[position] == (0 if position in (0, 5) else 1)  # the edges -8 and 7 still train
        total[position] = scale.grad
    # Esser et al., eq. 3: -Qn below and at the edge, round(v) - v inside, Qp at the edge and above.
    assert total.tolist() == [-8, -8, 0.25, -0.5, 7, 7]


def test_dequantize_has_a_gradient_to_the_scale() -> None:
    codes = torch.tensor([[1, -2, 3], [4, 5, -6]], dtype=torch.int8)
    scale = torch.tensor([[0.5, 1.0], [2.0, 4.0]], requires_grad=True)
    zero_point = torch.tensor([[0, 1], [-1, 2]], dtype=torch.int32)
    upstream = torch.tensor([[1.0, 10.0, 100.0], [1.0, 10.0, 100.0]])
    ops.dequantize(codes, scale, zero_point, -1, 2, -128, 127).backward(upstream)
    assert scale.grad is not None
    assert scale.grad.tolist() == [[1 - 20, 200], [5 + 60, -800]]


def test_no_gradient_passes_through_codes_and_dynamic_scales() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    scale, zero_point = ops.dynamic_scale(x, None, None, -128, 127, True)
    codes = ops.quantize(x, scale, zero_point, None, None, -128, 127)
    assert not scale.requires_grad and not zero_point.requires_grad and not codes.requires_grad


def test_observe_passes_the_gradient_on() -> None:
    x = torch.randn(3, requires_grad=True)
    ops.observe(x, "o").backward(torch.tensor([1.0, 2.0, 3.0]))
    assert x.grad is not None and x.grad.tolist() == [1, 2, 3]


def test_masked_weights_get_no_gradient() -> None:
    weight = torch.ones(4, requires_grad=True)
    mask = torch.tensor([True, False, True, False])
    ops.mask(weight, mask).backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert weight.grad is not None and weight.grad.tolist() == [1, 0, 3, 0]


def test_masked_weights_stay_zero_in_training() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 0.0, 2.0]))
    mask = torch.tensor([True, False, True])
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (ops.mask(weight, mask) - 5).square().sum().backward()
        optimizer.step()
    assert weight[1] == 0 and weight[0] != 1
