"""Packing of MatMulNBits' weights, against ONNX Runtime's own operator."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from sqcompile.backends.onnxruntime import packing
from sqcompile.quantization import affine
from sqcompile.quantization.format import Format

SHAPES = [(1, 16), (3, 32), (33, 96), (8, 100), (5, 260)]


def _weight(outputs: int, columns: int) -> torch.Tensor:
    return torch.randn(outputs, columns, generator=torch.Generator().manual_seed(outputs + columns))


def _pack(text: str, outputs: int, columns: int) -> tuple[packing.Packed | None, torch.Tensor]:
    """Return a packed random weight, and what its codes stand for."""
    format = Format.parse(text)
    weight = _weight(outputs, columns)
    scale, zero_point = affine.scale_for_tensor(weight, format)
    axis, group = format.granularity.pair
    codes = affine.quantize(
        weight, scale, zero_point, axis, group, format.qmin, format.qmax, format.storage_dtype
    )
    packed = packing.pack(codes, scale, zero_point, qmin=format.qmin, qmax=format.qmax, group_size=group)
    return packed, affine.dequantize(codes, scale, zero_point, axis, group)


def _run(packed: packing.Packed, x: torch.Tensor, accuracy_level: int) -> torch.Tensor:
    tensors = {"packed": packed.packed.numpy(), "scales": packed.scales.numpy()}
    if packed.zero_points is not None:
        tensors["zero_points"] = packed.zero_points.numpy()
    node = helper.make_node(
        "MatMulNBits",
        ["x", *tensors],
        ["y"],
        domain="com.microsoft",
        K=packed.columns,
        N=packed.packed.shape[0],
        bits=packed.bits,
        block_size=packed.block_size,
        accuracy_level=accuracy_level,
    )
    sizes = [None] * x.dim()
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, sizes)],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "text",
    [
        "int4:group=32",
        "uint4:affine:group=32",
        "uint4:affine:group=16",
        "int4:group=32:narrow",
        "int8:group=64",
        "uint8:affine:group=32",
        "int2:group=32",
        "uint2:affine:group=32",
        "int3:group=32",
        "uint5:affine:group=16",
        "int8:channel=0",
        "uint4:affine:channel=0",
        "int4",
        "int4:group=96",
    ],
)
def test_unpacks_to_what_was_packed(text: str, shape: tuple[int, int]) -> None:
    packed, values = _pack(text, *shape)
    assert packed is not None
    found = packing.dequantize_blocks(
        packed.packed, packed.scales, packed.zero_points, packed.columns, packed.bits
    )
    assert torch.equal(found, values)


@pytest.mark.parametrize(
    "text", ["int4:group=32", "uint4:affine:group=32", "uint8:affine:group=32", "int2:group=32"]
)
@pytest.mark.parametrize("rows", [1, 5], ids="rows={}".format)
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_the_runtime_reads_the_same_weights(text: str, shape: tuple[int, int], rows: int) -> None:
    packed, values = _pack(text, *shape)
    assert packed is not None
    x = torch.randn(rows, shape[1])
    # fp32 sums of up to 260 products, in another order
    torch.testing.assert_close(_run(packed, x, 1), x @ values.t(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "text", ["int4:group=32", "uint4:affine:group=32", "int8:group=64", "uint8:affine:channel=0"]
)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_the_integer_kernels_round_activations_by_blocks(text: str, shape: tuple[int, int]) -> None:
    packed, values = _pack(text, *shape)
    assert packed is not None
    x = torch.randn(2, 3, shape[1])
    expected = packing.round_activations(x, packed.block_size) @ values.t()
    result = _run(packed, x, 4)
    difference = (result - expected).abs() / expected.abs().max()
    # A value in the middle of two codes may round either way: that moves a sum by one step of one product.
    assert float((difference > 1e-5).float().mean()) < 0.02
    assert float(difference.max()) < 0.02
    # and the rounding is really there
    assert float((result - x @ values.t()).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("codes_bits", "bits"), [(2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, None), (16, None)]
)
def test_takes_the_fewest_bits_that_hold_the_codes(codes_bits: int, bits: int | None) -> None:
    assert packing.bits_for(codes_bits) == bits


@pytest.mark.parametrize(
    ("group", "columns", "block"),
    [
        (32, 256, 32),
        (16, 256, 16),
        (8, 256, None),
        (24, 256, None),
        (96, 256, 32),
        (48, 256, 16),
        (None, 64, 64),
        (None, 4096, 128),
        (None, 5, 16),
        (-1, 300, 128),
        (512, 100, 128),
        (256, 512, 256),
    ],
)
def test_expresses_groups_as_blocks(group: int | None, columns: int, block: int | None) -> None:
    assert packing.block_for(group, columns) == block


@pytest.mark.parametrize("text", ["int16:group=32", "int4:group=8", "int4:group=24"])
def test_leaves_what_the_operator_cannot_express(text: str) -> None:
    assert _pack(text, 4, 64)[0] is None


def test_symmetric_weights_store_no_zero_points() -> None:
    symmetric, _ = _pack("int4:group=32", 4, 96)
    affine_, _ = _pack("uint4:affine:group=32", 4, 96)
    assert symmetric is not None and symmetric.zero_points is None
    assert affine_ is not None and affine_.zero_points is not None
    assert tuple(affine_.zero_points.shape) == (4, 2)  # three blocks of four bits: two bytes


def test_the_operator_takes_just_these_bits() -> None:
    """The list of bits is a property of the runtime: this test says when it grows."""
    accepted = []
    for bits in range(2, 9):
        codes = np.zeros((4, 1, 32 * bits // 8), np.uint8)
        packed = packing.Packed(torch.from_numpy(codes), torch.ones(4, 1), None, bits, 32, 32)
        try:
            _run(packed, torch.ones(1, 32), 4)
        except onnxruntime.capi.onnxruntime_pybind11_state.Fail:
            continue
        accepted.append(bits)
    assert tuple(accepted) == packing.BITS


def test_onnx_knows_no_schema_of_the_operator() -> None:
    """`contrib.py` describes the operator; if onnx ever does, it can go."""
    assert not onnx.defs.has("MatMulNBits", "com.microsoft")
