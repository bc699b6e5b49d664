"""The table of translations: `torch.ops.sqcompile_ort.*`, one ONNX operator each.

Beside them stands the one ATen operator whose translation by torch's exporter differs from PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset21

from sqcompile.backends.onnxruntime import operators  # noqa: F401  registers torch.ops.sqcompile_ort
from sqcompile.backends.onnxruntime.contrib import (
    CACHED_ATTENTION,
    GATHER_BLOCK_QUANTIZED,
    LOOKUP,
    MATMUL_NBITS,
    SHARED_POSITIONS,
    TOKEN_POSITIONS,
)

OPSET = 21
"""Standard operators: the first version with blocked DequantizeLinear and 4-bit integers."""

ort = torch.ops.sqcompile_ort
op: Any = opset21


def quantize_linear(x: Any, scale: Any, zero_point: Any, axis: int | None, block_size: int | None) -> Any:
    """QuantizeLinear; the type of the zero point is the type of the codes."""
    return op.QuantizeLinear(x, scale, zero_point, **_granularity(axis, block_size))


def dequantize_linear(
    codes: Any, scale: Any, zero_point: Any, axis: int | None, block_size: int | None
) -> Any:
    """DequantizeLinear."""
    if zero_point is None:
        return op.DequantizeLinear(codes, scale, **_granularity(axis, block_size))
    return op.DequantizeLinear(codes, scale, zero_point, **_granularity(axis, block_size))


def dynamic_quantize_linear(x: Any) -> Any:
    """DynamicQuantizeLinear."""
    return op.DynamicQuantizeLinear(x)


def matmul_integer(a: Any, b: Any, a_zero_point: Any, b_zero_point: Any) -> Any:
    """MatMulInteger."""
    if b_zero_point is None:
        return op.MatMulInteger(a, b, a_zero_point)
    return op.MatMulInteger(a, b, a_zero_point, b_zero_point)


def matmul_nbits(
    x: Any,
    packed: Any,
    scales: Any,
    zero_points: Any,
    bias: Any,
    columns: int,
    outputs: int,
    bits: int,
    block_size: int,
    accuracy_level: int,
) -> Any:
    """com.microsoft.MatMulNBits; its fifth input, an index of groups, stays empty."""
    return MATMUL_NBITS(
        x,
        packed,
        scales,
        zero_points,
        None,
        bias,
        K=columns,
        N=outputs,
        bits=bits,
        block_size=block_size,
        accuracy_level=accuracy_level,
    )


def gather_block_quantized(
    packed: Any, indices: Any, scales: Any, zero_points: Any, bits: int, block_size: int
) -> Any:
    """com.microsoft.GatherBlockQuantized over rows, with blocks along them."""
    return GATHER_BLOCK_QUANTIZED(
        packed, indices, scales, zero_points, bits=bits, block_size=block_size, gather_axis=0, quantize_axis=1
    )


def global_average_pool(x: Any) -> Any:
    """GlobalAveragePool."""
    return op.GlobalAveragePool(x)


def lookup(codes: Any, table: Any) -> Any:
    """Indices into a table, as one operator until the model is exported; see `weights.look_up_at_load`."""
    return LOOKUP(codes, table)


def cached_attention(
    query: Any, key: Any, value: Any, low: int | None, scale: float, key_scale: Any, value_scale: Any
) -> Any:
    """Attention with a cache, as one operator until the model is exported; see `generation.wire`."""
    window = {} if low is None else {"low": low}
    return CACHED_ATTENTION(query, key, value, key_scale, value_scale, scale=scale, **window)


def token_positions(tokens: Any) -> Any:
    """Positions of tokens, as one operator until the model is exported; see `generation.wire`."""
    return TOKEN_POSITIONS(tokens)


def shared_positions(tokens: Any) -> Any:
    """Positions that all rows share, as one operator until the model is exported; see `generation.wire`."""
    return SHARED_POSITIONS(tokens)


def _granularity(axis: int | None, block_size: int | None) -> dict[str, int]:
    attributes: dict[str, int] = {}
    if axis is not None:
        attributes["axis"] = axis
    if block_size is not None:
        attributes["block_size"] = block_size
    return attributes


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    ort.quantize_linear.default: quantize_linear,
    ort.dequantize_linear.default: dequantize_linear,
    ort.dynamic_quantize_linear.default: dynamic_quantize_linear,
    ort.matmul_integer.default: matmul_integer,
    ort.matmul_nbits.default: matmul_nbits,
    ort.gather_block_quantized.default: gather_block_quantized,
    ort.global_average_pool.default: global_average_pool,
    ort.cached_attention.default: cached_attention,
    ort.token_positions.default: token_positions,
    ort.shared_positions.default: shared_positions,
    torch.ops.sqcompile.lookup.default: lookup,
}
