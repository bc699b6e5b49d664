"""The operators `torch.ops.sqcompile_ort.*`: ONNX Runtime's own forms, as nodes of a lowered program.

Selection (`sqcompile.backends.onnxruntime.selection`) rewrites a program until it holds only ATen
operators and these. Each stands for exactly one ONNX operator, with its inputs in its types, so that the
translation to ONNX is one to one. Each also runs in PyTorch with the arithmetic of ONNX Runtime: a lowered
program can be compared with the program it came from, without any ONNX in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sqcompile.backends.onnxruntime import packing
from sqcompile.quantization import affine

NAMESPACE = "sqcompile_ort"


def _quantize_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, block_size: int | None
) -> Tensor:
    limits = torch.iinfo(zero_point.dtype)
    return affine.quantize(
        x, scale, zero_point.int(), axis, block_size, limits.min, limits.max, zero_point.dtype
    )


def _quantize_linear_fake(
    x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, block_size: int | None
) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


def _dequantize_linear(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None, block_size: int | None
) -> Tensor:
    shift = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point.int()
    return affine.dequantize(codes, scale, shift, axis, block_size)


def _dequantize_linear_fake(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None, block_size: int | None
) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def _dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = affine.block_range(x, None, None)
    scale, zero_point = affine.unchecked_scale(low, high, 0, 255, False)
    codes = affine.quantize(x, scale, zero_point, None, None, 0, 255, torch.uint8)
    return codes, scale.contiguous(), zero_point.to(torch.uint8)


def _dynamic_quantize_linear_fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x, dtype=torch.uint8),
        x.new_empty((), dtype=torch.float32),
        x.new_empty((), dtype=torch.uint8),
    )


def _matmul_integer(a: Tensor, b: Tensor, a_zero_point: Tensor, b_zero_point: Tensor | None) -> Tensor:
    left = a.double() - a_zero_point.double()
    right = b.double() if b_zero_point is None else b.double() - b_zero_point.double()
    return torch.matmul(left, right).to(torch.int32)  # exact: float64 holds every int32


def _matmul_integer_fake(a: Tensor, b: Tensor, a_zero_point: Tensor, b_zero_point: Tensor | None) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=torch.int32)


def _matmul_nbits(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    columns: int,
    outputs: int,
    bits: int,
    block_size: int,
    accuracy_level: int,
) -> Tensor:
    weight = packing.dequantize_blocks(packed, scales, zero_points, columns, bits)
    if accuracy_level == 4:
        x = packing.round_activations(x, block_size)
    y = torch.matmul(x.float(), weight.t())
    return y if bias is None else y + bias


def _matmul_nbits_fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    columns: int,
    outputs: int,
    bits: int,
    block_size: int,
    accuracy_level: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


def _gather_block_quantized(
    packed: Tensor, indices: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, block_size: int
) -> Tensor:
    rows, columns = packed.shape[0], packed.shape[1] * 8 // bits
    blocks = packed.reshape(rows, -1, block_size * bits // 8)
    return packing.dequantize_blocks(blocks, scales, zero_points, columns, bits)[indices]


def _gather_block_quantized_fake(
    packed: Tensor, indices: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, block_size: int
) -> Tensor:
    return scales.new_empty((*indices.shape, packed.shape[1] * 8 // bits))


def _global_average_pool(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def _global_average_pool_fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], *(1,) * (x.dim() - 2)))


def _cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    low: int | None,
    scale: float,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Tensor:
    length = query.shape[2]
    place = torch.arange(length, device=query.device)
    distance = place[None, :] - place[:, None]  # from a query to a key
    seen = distance <= 0
    if low is not None:
        seen &= distance >= low
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        _rounded(key, key_scale),
        _rounded(value, value_scale),
        attn_mask=seen,
        scale=scale,
        enable_gqa=True,
    )


def _rounded(x: Tensor, scale: Tensor | None) -> Tensor:
    """Return what an int8 cache with one scale, or one a head, makes of keys or values."""
    if scale is None:
        return x
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    return affine.fake_quantize(x, scale, zero_point, 1 if scale.dim() else None, None, -128, 127)


def _cached_attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    low: int | None,
    scale: float,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Tensor:
    return query.new_empty(query.shape)


def _token_positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).repeat(tokens.shape[0], 1)


def _token_positions_fake(tokens: Tensor) -> Tensor:
    return torch.empty_like(tokens)


def _shared_positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device)


def _shared_positions_fake(tokens: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape[1])


_SCHEMAS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "quantize_linear(Tensor x, Tensor scale, Tensor zero_point, int? axis, int? block_size) -> Tensor": (
        _quantize_linear,
        _quantize_linear_fake,
    ),
    "dequantize_linear(Tensor codes, Tensor scale, Tensor? zero_point, int? axis, int? block_size) -> Tensor": (
        _dequantize_linear,
        _dequantize_linear_fake,
    ),
    "dynamic_quantize_linear(Tensor x) -> (Tensor, Tensor, Tensor)": (
        _dynamic_quantize_linear,
        _dynamic_quantize_linear_fake,
    ),
    "matmul_integer(Tensor a, Tensor b, Tensor a_zero_point, Tensor? b_zero_point) -> Tensor": (
        _matmul_integer,
        _matmul_integer_fake,
    ),
    "matmul_nbits(Tensor x, Tensor packed, Tensor scales, Tensor? zero_points, Tensor? bias, int columns, "
    "int outputs, int bits, int block_size, int accuracy_level) -> Tensor": (
        _matmul_nbits,
        _matmul_nbits_fake,
    ),
    "gather_block_quantized(Tensor packed, Tensor indices, Tensor scales, Tensor? zero_points, int bits, "
    "int block_size) -> Tensor": (
        _gather_block_quantized,
        _gather_block_quantized_fake,
    ),
    "global_average_pool(Tensor x) -> Tensor": (_global_average_pool, _global_average_pool_fake),
    # Of programs that generate, on a whole sequence: without a past. `low` is the first key that a query sees,
    # counted from itself.
    "cached_attention(Tensor query, Tensor key, Tensor value, int? low, float scale, Tensor? key_scale, "
    "Tensor? value_scale) -> Tensor": (
        _cached_attention,
        _cached_attention_fake,
    ),
    "token_positions(Tensor tokens) -> Tensor": (_token_positions, _token_positions_fake),
    "shared_positions(Tensor tokens) -> Tensor": (_shared_positions, _shared_positions_fake),
}


def _register(library: torch.library.Library) -> None:
    for schema, (implementation, fake) in _SCHEMAS.items():
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        name = schema.partition("(")[0]
        library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


# A second import of this file (a reload, or a test that clears sys.modules) finds them registered.
if not hasattr(torch.ops.sqcompile_ort, "quantize_linear"):
    _LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
    _register(_LIBRARY)


def operator_names() -> Sequence[str]:
    """Return the names of all operators, without the namespace."""
    return [schema.partition("(")[0] for schema in _SCHEMAS]
