"""Activations: rows of float32 as 8-bit codes, and what each product asks of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sqcompile.backends.native import _native
from sqcompile.backends.native._native import ThreadPool
from sqcompile.backends.native.kernels.arrays import ALIGNMENT, Floats, allocate, matrix, run
from sqcompile.errors import FormatError, InputError


@dataclass(frozen=True, kw_only=True)
class QuantizedRows:
    """Activations as codes, with what a matrix product needs to know of them.

    Shapes: codes [M, padded K] int8 or uint8; scale [M], [M, groups] or [1]; zero_point [M] or [1];
    sum [M, groups], the sums of the codes of each group (groups = 1 without a group size).

    Attributes:
        codes: The codes; from column `k` on the zero point.
        scale: Real value of one step.
        zero_point: The code of zero.
        sum: Sums of codes.
        k: Columns of the matrix that was quantized.
        kernel: The kernel that ran.
    """

    codes: NDArray[Any]
    scale: Floats
    zero_point: NDArray[np.int32]
    sum: NDArray[np.int32]
    k: int
    kernel: str


def quantize_rows(
    x: Floats,
    *,
    mode: Literal["symmetric", "affine"] = "symmetric",
    signed: bool = True,
    group_size: int | None = None,
    sum_group_size: int | None = None,
    isa: str | None = None,
    pool: ThreadPool | None = None,
) -> QuantizedRows:
    """Quantize each row of `x` to 8 bits with a scale of its own, or one a group.

    A row (or group) that holds a NaN or infinity gets the scale NaN.

    Args:
        x: Matrix [M, K].
        mode: `symmetric` maps the largest magnitude to 127; `affine` maps min..max, with zero, to 0..255.
        signed: Codes -128..127 with zero point 0, else 0..255 with zero point 128 (or the affine one).
        group_size: Columns that share a scale, a multiple of 16; None: the whole row.
        sum_group_size: Columns that share a sum when the scale has no groups.
        isa: Instruction set.
        pool: Threads.

    Raises:
        InputError: `x` is no float32 matrix.
        FormatError: An impossible combination of options.
    """
    if mode == "affine" and (signed or group_size is not None):
        raise FormatError(
            "affine rows have unsigned codes and one scale a row",
            seen=f"signed={signed}, group_size={group_size}",
            expected="signed=False, group_size=None",
        )
    return _quantize(x, mode, signed, group_size or 0, group_size or sum_group_size or 0, None, isa, pool)


def quantize_rows_static(
    x: Floats,
    scale: float,
    zero_point: int,
    *,
    signed: bool = True,
    sum_group_size: int | None = None,
    isa: str | None = None,
    pool: ThreadPool | None = None,
) -> QuantizedRows:
    """Quantize a matrix [M, K] to 8 bits with one known scale and zero point.

    Raises:
        InputError: `x` is no float32 matrix.
        FormatError: The scale is not finite and positive, or the zero point is no code.
    """
    return _quantize(x, "static", signed, 0, sum_group_size or 0, (scale, zero_point), isa, pool)


def check_int8_rows(a: QuantizedRows, k: int) -> None:
    """Refuse rows that 8-bit products do not take."""
    if a.codes.dtype != np.uint8 or a.scale.ndim != 1:
        raise InputError(
            "an int8 product takes unsigned activations with one scale a row",
            seen=f"{a.codes.dtype} codes, scale {list(a.scale.shape)}",
            next_step="quantize_rows(x, signed=False)",
        )
    _same_k(a, k)


def check_grouped_rows(a: QuantizedRows, k: int, group_size: int) -> None:
    """Refuse rows that products with group scales do not take."""
    groups = -(-k // group_size)
    if a.codes.dtype != np.int8 or a.zero_point.any() or a.sum.shape[1] != groups:
        raise InputError(
            "a 4-bit product takes signed symmetric activations with a sum for each group",
            seen=f"{a.codes.dtype} codes, sums {list(a.sum.shape)}",
            expected=f"int8 codes, sums [M, {groups}]",
            next_step=f"quantize_rows(x, sum_group_size={group_size})",
        )
    _same_k(a, k)


def row_scales(a: QuantizedRows) -> Floats:
    """One scale a row, or one a group, as 4-bit products take them; a static scale is one for all."""
    one_for_all = a.scale.ndim == 1 and len(a.scale) != len(a.codes)
    return np.repeat(a.scale, len(a.codes)) if one_for_all else a.scale.reshape(-1)


def _quantize(
    x: Floats,
    mode: str,
    signed: bool,
    scale_group: int,
    sum_group: int,
    static: tuple[float, int] | None,
    isa: str | None,
    pool: ThreadPool | None,
) -> QuantizedRows:
    x = matrix(x, np.float32, "x")
    if sum_group < 0 or sum_group % 16:
        raise FormatError("activation groups are multiples of 16 columns", seen=sum_group)
    m, k = x.shape
    groups = -(-k // sum_group) if sum_group else 1
    padded = -(-k // 128) * 128 if sum_group else -(-k // 4) * 4
    # A row starts on a cache line, and rows do not share their L1 sets: with a stride of a power of two
    # the six rows of a GEMM tile would evict each other.
    stride = -(-padded // ALIGNMENT) * ALIGNMENT + ALIGNMENT
    codes = allocate(m * stride, np.uint8).reshape(m, stride)
    scale = np.empty(m * (groups if scale_group else 1), np.float32)
    zero_point = np.full(m if mode == "affine" else 1, 0 if signed else 128, np.int32)
    if static is not None:
        scale, zero_point = np.array([static[0]], np.float32), np.array([static[1]], np.int32)
    sums = np.zeros((m, groups), np.int32)
    kernel = run(
        _native.quantize,
        pool or ThreadPool(1),
        isa,
        mode,
        signed,
        x,
        codes,
        padded,
        scale_group,
        sum_group,
        scale,
        zero_point,
        sums.reshape(-1),
    )
    return QuantizedRows(
        codes=codes.view(np.int8) if signed else codes,
        scale=scale.reshape(m, groups) if scale_group else scale,
        zero_point=zero_point,
        sum=sums,
        k=k,
        kernel=kernel,
    )


def _same_k(a: QuantizedRows, k: int) -> None:
    if a.k != k:
        raise InputError("activations and weight have different K", seen=f"{a.k} and {k}")
