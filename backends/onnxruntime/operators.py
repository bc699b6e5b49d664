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
