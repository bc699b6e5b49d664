"""Products of weights with group scales, 2, 3, 4 or 8 bits a code: `cpp/kernels/q4gemm`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqcompile.backends.native import _native
from sqcompile.backends.native._native import ThreadPool
from sqcompile.backends.native.kernels.arrays import (
    PANEL,
    Floats,
    allocate,
    matrix,
    optional_bias,
    output,
    padded_outputs,
    run,
    size_in_bytes,
)
from sqcompile.backends.native.kernels.rows import QuantizedRows, check_grouped_rows, row_scales
from sqcompile.errors import FormatError, InputError


@dataclass(frozen=True, kw_only=True)
class Int4Weight:
    """A matrix [N, K] of 4-, 3- or 2-bit codes with a table and group scales, in the order of q4gemm.h.

    With 8 bits a code is the weight itself, and the table has no meaning.
    """

    n: int
    k: int
    group_size: int
    codes: NDArray[np.uint8]
    table: NDArray[np.int8]
    scale: NDArray[Any]
    zero_point: NDArray[np.int8] | None
    bias: Floats | None
    bits: int = 4

    @property
    def size_bytes(self) -> int:
        """Bytes that a product reads, beside the activations."""
        return size_in_bytes(self.codes, self.table, self.scale, self.zero_point, self.bias)


def pack_int4(
    codes: NDArray[np.uint8],
    table: NDArray[np.int8] | Sequence[int],
    scale: Floats,
    group_size: int,
    *,
    zero_point: NDArray[np.int8] | None = None,
    bias: Floats | None = None,
    half_scales: bool = True,
    bits: int = 4,
) -> Int4Weight:
    """Pack codes of 4, 3 or 2 bits for `int4_matmul`.

    The matrix is (table[codes] - zero_point) * scale, by groups along K. `table` holds any integers
    -127..127, one for each code: -8..7 is plain int4, NF4 and fitted codebooks are tables scaled to 127.

    Shapes: codes [N, K], 0..2^bits - 1; table [2^bits]; scale and zero_point
    [N, ceil(K / group_size)]; bias [N].

    Raises:
        InputError: A shape or dtype is wrong, a code is too large, a table entry is -128.
        FormatError: The group size is not 32, 64 or 128, or the bits are not 2, 3 or 4.
    """
    if bits not in (2, 3, 4):
        raise FormatError("codes have 2, 3 or 4 bits", seen=bits)
    codes = matrix(codes, np.uint8, "codes")
    n, k = codes.shape
    check_group_size(group_size)
    packed = allocate(_native.q4gemm_packed_bytes(n, k, group_size, bits), np.uint8)
    run(_native.q4gemm_pack, codes, group_size, packed, bits)
    return Int4Weight(
        n=n,
        k=k,
        group_size=group_size,
        codes=packed,
        table=table_of_sixteen(table, bits),
        scale=group_scales(scale, n, k, group_size, half_scales),
        zero_point=None
        if zero_point is None
        else _by_group(zero_point, n, k, group_size, np.int8, "zero_point"),
        bias=optional_bias(bias, n),
        bits=bits,
    )


def pack_grouped_int8(
    weight: NDArray[np.int8],
    scale: Floats,
    group_size: int,
    *,
    zero_point: NDArray[np.int8] | None = None,
    bias: Floats | None = None,
    half_scales: bool = True,
) -> Int4Weight:
    """Pack an int8 matrix with a scale for each group of columns, for `int4_matmul`.

    For activations with group scales too; with one scale an output and a row, `pack_int8` is faster.

    Shapes: weight [N, K], -127..127; scale and zero_point [N, ceil(K / group_size)]; bias [N].

    Raises:
        InputError: A shape or dtype is wrong, or a weight is -128.
        FormatError: The group size is not 32, 64 or 128.
    """
    weight = matrix(weight, np.int8, "weight")
    n, k = weight.shape
    check_group_size(group_size)
    packed = allocate(_native.q4gemm_packed_bytes(n, k, group_size, 8), np.uint8)
    run(_native.q4gemm_pack, weight.view(np.uint8), group_size, packed, 8)
    return Int4Weight(
        n=n,
        k=k,
        group_size=group_size,
        codes=packed,
        table=np.zeros(16, np.int8),
        scale=group_scales(scale, n, k, group_size, half_scales),
        zero_point=None
        if zero_point is None
        else _by_group(zero_point, n, k, group_size, np.int8, "zero_point"),
        bias=optional_bias(bias, n),
        bits=8,
    )


def int4_matmul(
    a: QuantizedRows,
    weight: Int4Weight,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    out: Floats | None = None,
    isa: str | None = None,
    pool: ThreadPool | None = None,
) -> Floats:
    """Multiply signed 8-bit rows by a weight with group scales: clamp(dequantize(a) @ dequantize(weight).T + bias).

    The activations need sums by the weight's groups, and one scale a row or one a group.

    Shapes: a [M, K]; weight [N, K]; result [M, N].

    Raises:
        InputError: The activations are unsigned or affine, lack the sums, or have another K.
    """
    check_grouped_rows(a, weight.k, weight.group_size)
    out = output(out, len(a.codes), weight.n)
    pool = pool or ThreadPool(1)
    run(
        _native.q4gemm,
        pool,
        isa,
        weight.k,
        weight.group_size,
        a.codes,
        a.sum,
        row_scales(a),
        weight.codes,
        weight.table,
        weight.scale.view(np.uint16),
        weight.zero_point,
        weight.bias,
        low,
        high,
        out,
        grouped_scratch(pool, len(a.codes), weight.k, weight.group_size),
        1,  # once
        weight.bits,
    )
    return out


def check_group_size(group_size: int) -> None:
    """Refuse groups that the kernels have not."""
    if group_size not in (32, 64, 128):
        raise FormatError("4-bit groups have 32, 64 or 128 columns", seen=group_size)


def table_of_sixteen(table: NDArray[np.int8] | Sequence[int], bits: int = 4) -> NDArray[np.int8]:
    """Check a table of 2^bits entries and repeat it to sixteen."""
    values = np.asarray(table)
    fits = values.shape == (2**bits,) and values.dtype.kind in "iu"
    if not fits or abs(values.astype(np.int64)).max() > 127:
        raise InputError(
            f"a {bits}-bit table holds {'sixteen' if bits == 4 else 2**bits} integers",
            seen=f"{values.dtype} {values.tolist()}",
            expected="-127..127",
        )
    return np.resize(values.astype(np.int8), 16)


def _by_group(values: NDArray[Any], n: int, k: int, group_size: int, dtype: Any, name: str) -> NDArray[Any]:
    """Copy [N, groups] to [panel, group, 16]."""
    values = np.asarray(values)
    groups = -(-k // group_size)
    if values.shape != (n, groups):
        raise InputError(f"{name} has not one entry a group", seen=list(values.shape), expected=[n, groups])
    padded = np.zeros((padded_outputs(n), groups), dtype)
    padded[:n] = values.astype(dtype)
    packed = allocate(padded.size, dtype)
    packed[:] = padded.reshape(padded_outputs(n) // PANEL, PANEL, groups).swapaxes(1, 2).reshape(-1)
    return packed


def group_scales(scale: Floats, n: int, k: int, group_size: int, half: bool) -> NDArray[Any]:
    """Copy scales [N, groups] to [panel, group, 16], in half or single precision."""
    return _by_group(scale, n, k, group_size, np.float16 if half else np.float32, "scale")


def grouped_scratch(pool: ThreadPool, m: int, k: int, group_size: int) -> NDArray[np.uint8]:
    """Return the memory that a product needs beside its result."""
    return allocate(pool.threads * _native.q4gemm_scratch_bytes(m, k, group_size), np.uint8)
