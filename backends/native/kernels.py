"""The native engine's kernels on NumPy arrays: quantize activations, pack weights, multiply.

What the engine runs inside a compiled model, one kernel at a time, for tests and benchmarks. Arrays are
passed without copies. Every function takes `isa`, the name of an instruction set (None: what the
environment variable SQCOMPILE_ISA says, else the best of this CPU), and a thread pool (None: one thread).
Neither changes a bit of any result.

The math of each kernel is in its header, `cpp/kernels/<family>/<family>.h`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sqcompile.backends.native import _native
from sqcompile.backends.native._native import ThreadPool
from sqcompile.errors import BackendError, FormatError, InputError, did_you_mean

__all__ = [
    "BlockSparseInt8Weight",
    "Int4Weight",
    "Int8Weight",
    "KernelInfo",
    "QuantizedRows",
    "SparseInt4Weight",
    "SparseInt8Weight",
    "ThreadPool",
    "available_isas",
    "block_sparse_int8_matmul",
    "default_isa",
    "int4_matmul",
    "int8_matmul",
    "list_kernels",
    "pack_block_sparse_int8",
    "pack_grouped_int8",
    "pack_int4",
    "pack_int8",
    "pack_sparse_int4",
    "pack_sparse_int8",
    "quantize_rows",
    "quantize_rows_static",
    "sparse_int4_matmul",
    "sparse_int8_matmul",
]

# A chunk of 128 units of 4 k, for 64 rows of activations, is 32 KiB, the L1 cache of most CPUs. On Zen 4, run
# in turn, 64, 96, 128, 192 and 256 made 991, 931, 1057, 1039 and 982 GOPS (1x4 blocks, 75 %, K = 2048), and
# within 4 % of each other at K = 768.
BLOCK_CHUNK = 128

PANEL = 16  # outputs that are stored and computed together
ALIGNMENT = 64  # bytes: a cache line, and the widest vector

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class KernelInfo:
    """One line of a family's kernels.inc."""

    family: str
    name: str
    isa: str
    available: bool


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


@dataclass(frozen=True, kw_only=True)
class Int8Weight:
    """An int8 matrix [N, K] in the order of qgemm.h; arrays by output hold whole panels of 16."""

    n: int
    k: int
    tiles: NDArray[np.int8]
    sum: NDArray[np.int32]
    scale: Floats
    bias: Floats | None

    @property
    def size_bytes(self) -> int:
        """Bytes that a product reads, beside the activations."""
        return _size_bytes(self.tiles, self.sum, self.scale, self.bias)


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
        return _size_bytes(self.codes, self.table, self.scale, self.zero_point, self.bias)


@dataclass(frozen=True, kw_only=True)
class SparseInt8Weight:
    """The nonzero entries of an int8 matrix [N, K] and where they are, in the order of qsparse.h."""

    n: int
    k: int
    masks: NDArray[np.uint64]
    values: NDArray[np.uint8]
    value_start: NDArray[np.uint64]
    sum: NDArray[np.int32]
    scale: Floats
    bias: Floats | None

    @property
    def size_bytes(self) -> int:
        """Bytes that a product reads, beside the activations."""
        return _size_bytes(self.masks, self.values, self.value_start, self.sum, self.scale, self.bias)


@dataclass(frozen=True, kw_only=True)
class SparseInt4Weight:
    """The kept 4-bit codes of a matrix [N, K] and where they are, in the order of q4sparse.h."""

    n: int
    k: int
    group_size: int
    masks: NDArray[np.uint64]
    values: NDArray[np.uint8]
    value_start: NDArray[np.uint64]
    table: NDArray[np.int8]
    scale: NDArray[Any]
    bias: Floats | None

    @property
    def size_bytes(self) -> int:
        """Bytes that a product reads, beside the activations."""
        return _size_bytes(self.masks, self.values, self.value_start, self.table, self.scale, self.bias)


@dataclass(frozen=True, kw_only=True)
class BlockSparseInt8Weight:
    """The blocks of an int8 matrix [N, K] that are not zero, in the order of qblock.h."""

    n: int
    k: int
    block_outputs: int
    chunk: int
    index: NDArray[np.uint8]
    values: NDArray[np.int8]
    start: NDArray[np.uint64]
    blocks_before: NDArray[np.uint64]
    sum: NDArray[np.int32]
    scale: Floats
    bias: Floats | None

    @property
    def size_bytes(self) -> int:
        """Bytes that a product reads, beside the activations."""
        return _size_bytes(
            self.index, self.values, self.start, self.blocks_before, self.sum, self.scale, self.bias
        )


def list_kernels() -> list[KernelInfo]:
    """List every kernel that was built, best first within a family."""
    return [
        KernelInfo(family=family, name=name, isa=isa, available=available)
        for family, lines in _native.kernels().items()
        for name, isa, available in lines
    ]


def available_isas() -> list[str]:
    """Return the instruction sets that this CPU and its operating system can run, weakest first."""
    return [name for name in _native.isa_levels() if _native.isa_available(name)]


def default_isa() -> str:
    """Return what SQCOMPILE_ISA asks for, else the best instruction set available.

    Raises:
        BackendError: The variable holds an unknown name, or one that this CPU lacks.
    """
    try:
        return _native.default_isa()
    except (ValueError, RuntimeError) as error:
        raise _isa_error(error, "SQCOMPILE_ISA") from None


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


def pack_int8(weight: NDArray[np.int8], scale: Floats, bias: Floats | None = None) -> Int8Weight:
    """Pack an int8 matrix for `int8_matmul`.

    Shapes: weight [N, K]; scale [N]; bias [N].

    Raises:
        InputError: A shape or dtype is wrong.
    """
    weight = _matrix(weight, np.int8, "weight")
    n, k = weight.shape
    tiles = _allocate(_native.qgemm_packed_bytes(n, k), np.int8)
    sums = _allocate(_panels(n), np.int32)
    _run(_native.qgemm_pack, weight, tiles, sums)
    return Int8Weight(
        n=n, k=k, tiles=tiles, sum=sums, scale=_by_output(scale, n, "scale"), bias=_optional_bias(bias, n)
    )


def int8_matmul(
    a: QuantizedRows,
    weight: Int8Weight,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    out: Floats | None = None,
    isa: str | None = None,
    pool: ThreadPool | None = None,
) -> Floats:
    """Multiply unsigned 8-bit rows by an int8 weight: clamp(dequantize(a) @ dequantize(weight).T + bias).

    Shapes: a [M, K]; weight [N, K]; result [M, N].

    Raises:
        InputError: The activations are signed, have group scales, or another K than the weight.
    """
    _check_int8_rows(a, weight.k)
    out = _output(out, len(a.codes), weight.n)
    _run(
        _native.qgemm,
        pool or ThreadPool(1),
        isa,
        weight.k,
        a.codes,
        a.scale,
        a.zero_point,
        weight.tiles,
        weight.sum,
        weight.scale,
        weight.bias,
        low,
        high,
        out,
    )
    return out


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
    codes = _matrix(codes, np.uint8, "codes")
    n, k = codes.shape
    _check_group_size(group_size)
    packed = _allocate(_native.q4gemm_packed_bytes(n, k, group_size, bits), np.uint8)
    _run(_native.q4gemm_pack, codes, group_size, packed, bits)
    return Int4Weight(
        n=n,
        k=k,
        group_size=group_size,
        codes=packed,
        table=_table(table, bits),
        scale=_group_scales(scale, n, k, group_size, half_scales),
        zero_point=None
        if zero_point is None
        else _by_group(zero_point, n, k, group_size, np.int8, "zero_point"),
        bias=_optional_bias(bias, n),
        bits=bits,
    )


def pack_grouped_int8(
    weight: NDArray[np.int8],
    scale: Floats,
    group_size: int,
    *,
    bias: Floats | None = None,
    half_scales: bool = True,
) -> Int4Weight:
    """Pack an int8 matrix with a scale for each group of columns, for `int4_matmul`.

    For activations with group scales too; with one scale an output and a row, `pack_int8` is faster.

    Shapes: weight [N, K], -127..127; scale [N, ceil(K / group_size)]; bias [N].

    Raises:
        InputError: A shape or dtype is wrong, or a weight is -128.
        FormatError: The group size is not 32, 64 or 128.
    """
    weight = _matrix(weight, np.int8, "weight")
    n, k = weight.shape
    _check_group_size(group_size)
    packed = _allocate(_native.q4gemm_packed_bytes(n, k, group_size, 8), np.uint8)
    _run(_native.q4gemm_pack, weight.view(np.uint8), group_size, packed, 8)
    return Int4Weight(
        n=n,
        k=k,
        group_size=group_size,
        codes=packed,
        table=np.zeros(16, np.int8),
        scale=_group_scales(scale, n, k, group_size, half_scales),
        zero_point=None,
        bias=_optional_bias(bias, n),
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
    _check_int4_rows(a, weight.k, weight.group_size)
    out = _output(out, len(a.codes), weight.n)
    pool = pool or ThreadPool(1)
    _run(
        _native.q4gemm,
        pool,
        isa,
        weight.k,
        weight.group_size,
        a.codes,
        a.sum,
        _row_scales(a),
        weight.codes,
        weight.table,
        weight.scale.view(np.uint16),
        weight.zero_point,
        weight.bias,
        low,
        high,
        out,
        _int4_scratch(pool, len(a.codes), weight.k, weight.group_size),
        1,  # once
        weight.bits,
    )
    return out


def pack_sparse_int8(weight: NDArray[np.int8], scale: Floats, bias: Floats | None = None) -> SparseInt8Weight:
    """Pack the nonzero entries of an int8 matrix for `sparse_int8_matmul`.

    Shapes: weight [N, K]; scale [N]; bias [N].

    Raises:
        InputError: A shape or dtype is wrong.
    """
    weight = _matrix(weight, np.int8, "weight")
    n, k = weight.shape
    masks = _allocate(_native.qsparse_mask_count(n, k), np.uint64)
    values = _allocate(int(np.count_nonzero(weight)) + _native.VALUE_SLACK, np.uint8)
    starts = _allocate(_panels(n) // PANEL + 1, np.uint64)
    sums = _allocate(_panels(n), np.int32)
    _run(_native.qsparse_pack, weight, masks, values, starts, sums)
    return SparseInt8Weight(
        n=n,
        k=k,
        masks=masks,
        values=values,
        value_start=starts,
        sum=sums,
        scale=_by_output(scale, n, "scale"),
        bias=_optional_bias(bias, n),
    )


def sparse_int8_matmul(
    a: QuantizedRows,
    weight: SparseInt8Weight,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    out: Floats | None = None,
    isa: str | None = None,
    pool: ThreadPool | None = None,
) -> Floats:
    """Multiply as `int8_matmul` does on the dense weight, bit for bit, reading only what is not zero.

    Shapes: a [M, K]; weight [N, K]; result [M, N].

    Raises:
        InputError: The activations are signed, have group scales, or another K than the weight.
    """
    _check_int8_rows(a, weight.k)
    out = _output(out, len(a.codes), weight.n)
    pool = pool or ThreadPool(1)
    _run(
        _native.qsparse,
        pool,
        isa,
        weight.k,
        a.codes,
        a.scale,
        a.zero_point,
        weight.masks,
        weight.values,
        weight.value_start,
        weight.sum,
        weight.scale,
        weight.bias,
        low,
        high,
        out,
        _allocate(pool.threads * _native.qsparse_scratch_bytes(len(a.codes), weight.k), np.uint8),
    )
    return out


def pack_sparse_int4(
    codes: NDArray[np.uint8],
    keep: NDArray[np.bool_],
    table: NDArray[np.int8] | Sequence[int],
    scale: Floats,
    group_size: int,
    *,
    bias: Floats | None = None,
    half_scales: bool = True,
) -> SparseInt4Weight:
    """Pack the kept 4-bit codes of a matrix for `sparse_int4_matmul`; the other entries are zero.

    Shapes: codes [N, K], 0..15; keep [N, K]; table [16]; scale [N, ceil(K / group_size)]; bias [N].

    Raises:
        InputError: A shape or dtype is wrong, a kept code is over 15, a table entry is -128.
        FormatError: The group size is not 32, 64 or 128.
    """
    codes = _matrix(codes, np.uint8, "codes")
    kept = _matrix(keep, np.bool_, "keep").view(np.uint8)
    if kept.shape != codes.shape:
        raise InputError("codes and keep have different shapes", seen=f"{codes.shape} and {kept.shape}")
    n, k = codes.shape
    _check_group_size(group_size)
    masks = _allocate(_native.q4sparse_mask_count(n, k, group_size), np.uint64)
    values = _allocate(_native.q4sparse_value_bytes(kept, group_size) + _native.VALUE_SLACK, np.uint8)
    starts = _allocate(_panels(n) // PANEL + 1, np.uint64)
    _run(_native.q4sparse_pack, codes, kept, group_size, masks, values, starts)
    return SparseInt4Weight(
        n=n,
        k=k,
        group_size=group_size,
        masks=masks,
        values=values,
        value_start=starts,
        table=_table(table),
        scale=_group_scales(scale, n, k, group_size, half_scales),
        bias=_optional_bias(bias, n),
    )


def sparse_int4_matmul(
    a: QuantizedRows,
    weight: SparseInt4Weight,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    out: Floats | None = None,
    isa: str | None = None,
    pool: ThreadPool | None = None,
) -> Floats:
    """Multiply signed 8-bit rows by a sparse 4-bit weight, reading only the kept codes.

    Shapes: a [M, K]; weight [N, K]; result [M, N].

    Raises:
        InputError: The activations are unsigned or affine, lack the sums, or have another K.
    """
    _check_int4_rows(a, weight.k, weight.group_size)
    out = _output(out, len(a.codes), weight.n)
    pool = pool or ThreadPool(1)
    _run(
        _native.q4sparse,
        pool,
        isa,
        weight.k,
        weight.group_size,
        a.codes,
        a.sum,
        _row_scales(a),
        weight.masks,
        weight.values,
        weight.value_start,
        weight.table,
        weight.scale.view(np.uint16),
        weight.bias,
        low,
        high,
        out,
        _int4_scratch(pool, len(a.codes), weight.k, weight.group_size),
    )
    return out


def pack_block_sparse_int8(
    weight: NDArray[np.int8], scale: Floats, block_outputs: int, bias: Floats | None = None
) -> BlockSparseInt8Weight:
    """Pack the blocks of `block_outputs` x 4 entries that are not zero, for `block_sparse_int8_matmul`.

    Shapes: weight [N, K]; scale [N]; bias [N].

    Raises:
        InputError: A shape or dtype is wrong.
        FormatError: A block has other than 1, 4 or 16 outputs.
    """
    weight = _matrix(weight, np.int8, "weight")
    if block_outputs not in (1, 4, 16):
        raise FormatError("a block has 1, 4 or 16 outputs", seen=block_outputs)
    n, k = weight.shape
    count = _native.qblock_count(weight, block_outputs)
    index = _allocate(count, np.uint8)
    values = _allocate(count * block_outputs * 4, np.int8)
    start = _allocate(_native.qblock_start_count(n, k, block_outputs, BLOCK_CHUNK), np.uint64)
    before = _allocate(_panels(n) // PANEL + 1, np.uint64)
    sums = _allocate(_panels(n), np.int32)
    _run(_native.qblock_pack, weight, block_outputs, BLOCK_CHUNK, index, values, start, before, sums)
    return BlockSparseInt8Weight(
        n=n,
        k=k,
        block_outputs=block_outputs,
        chunk=BLOCK_CHUNK,
        index=index,
        values=values,
        start=start,
        blocks_before=before,
        sum=sums,
        scale=_by_output(scale, n, "scale"),
        bias=_optional_bias(bias, n),
    )


def block_sparse_int8_matmul(
    a: QuantizedRows,
    weight: BlockSparseInt8Weight,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    out: Floats | None = None,
    isa: str | None = None,
    pool: ThreadPool | None = None,
) -> Floats:
    """Multiply as `int8_matmul` does on the dense weight, bit for bit, skipping blocks of zeros.

    Made for many rows: sixteen take the time of one.

    Shapes: a [M, K]; weight [N, K]; result [M, N].

    Raises:
        InputError: The activations are signed, have group scales, or another K than the weight.
    """
    _check_int8_rows(a, weight.k)
    out = _output(out, len(a.codes), weight.n)
    pool = pool or ThreadPool(1)
    _run(
        _native.qblock,
        pool,
        isa,
        weight.k,
        a.codes,
        a.scale,
        a.zero_point,
        weight.block_outputs,
        weight.chunk,
        weight.index,
        weight.values,
        weight.start,
        weight.blocks_before,
        weight.sum,
        weight.scale,
        weight.bias,
        low,
        high,
        out,
        _allocate(_native.qblock_interleaved_bytes(len(a.codes), weight.k), np.uint8),
        _allocate(pool.threads * _native.QBLOCK_SUM_COUNT, np.int32),
    )
    return out


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
    x = _matrix(x, np.float32, "x")
    if sum_group < 0 or sum_group % 16:
        raise FormatError("activation groups are multiples of 16 columns", seen=sum_group)
    m, k = x.shape
    groups = -(-k // sum_group) if sum_group else 1
    padded = -(-k // 128) * 128 if sum_group else -(-k // 4) * 4
    # A row starts on a cache line, and rows do not share their L1 sets: with a stride of a power of two
    # the six rows of a GEMM tile would evict each other.
    stride = -(-padded // ALIGNMENT) * ALIGNMENT + ALIGNMENT
    codes = _allocate(m * stride, np.uint8).reshape(m, stride)
    scale = np.empty(m * (groups if scale_group else 1), np.float32)
    zero_point = np.full(m if mode == "affine" else 1, 0 if signed else 128, np.int32)
    if static is not None:
        scale, zero_point = np.array([static[0]], np.float32), np.array([static[1]], np.int32)
    sums = np.zeros((m, groups), np.int32)
    kernel = _run(
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


def _run(function: Any, *arguments: Any) -> Any:
    """Call into C++, and turn its errors into ours."""
    try:
        return function(*arguments)
    except ValueError as error:
        if "instruction set" in str(error):
            raise _isa_error(error, None) from None
        raise InputError(str(error)) from None
    except RuntimeError as error:
        raise _isa_error(error, None) from None


def _isa_error(error: Exception, where: str | None) -> BackendError:
    name = str(error).split("'")[1] if "'" in str(error) else ""
    return BackendError(str(error), where=where, next_step=did_you_mean(name, available_isas()))


def _panels(n: int) -> int:
    """Outputs, rounded up to whole panels."""
    return -(-n // PANEL) * PANEL


def _allocate(count: int, dtype: Any) -> NDArray[Any]:
    """Zeros on a cache line's boundary, on huge pages if there are many."""
    if count == 0:
        return np.empty(0, dtype)
    return _native.allocate(count * np.dtype(dtype).itemsize).view(dtype)


def _matrix(array: NDArray[Any], dtype: Any, name: str) -> NDArray[Any]:
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype != dtype:
        seen = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(f"{name} is no matrix of {np.dtype(dtype).name}", seen=seen)
    return np.ascontiguousarray(array)


def _by_output(values: NDArray[Any], n: int, name: str) -> Floats:
    """Copy one float an output into an array of whole panels."""
    values = np.asarray(values, np.float32)
    if values.shape != (n,):
        raise InputError(f"{name} has not one entry an output", seen=list(values.shape), expected=[n])
    padded: Floats = _allocate(_panels(n), np.float32)
    padded[:n] = values
    return padded


def _optional_bias(bias: Floats | None, n: int) -> Floats | None:
    return None if bias is None else _by_output(bias, n, "bias")


def _by_group(values: NDArray[Any], n: int, k: int, group_size: int, dtype: Any, name: str) -> NDArray[Any]:
    """Copy [N, groups] to [panel, group, 16]."""
    values = np.asarray(values)
    groups = -(-k // group_size)
    if values.shape != (n, groups):
        raise InputError(f"{name} has not one entry a group", seen=list(values.shape), expected=[n, groups])
    padded = np.zeros((_panels(n), groups), dtype)
    padded[:n] = values.astype(dtype)
    packed = _allocate(padded.size, dtype)
    packed[:] = padded.reshape(_panels(n) // PANEL, PANEL, groups).swapaxes(1, 2).reshape(-1)
    return packed


def _group_scales(scale: Floats, n: int, k: int, group_size: int, half: bool) -> NDArray[Any]:
    return _by_group(scale, n, k, group_size, np.float16 if half else np.float32, "scale")


def _check_group_size(group_size: int) -> None:
    if group_size not in (32, 64, 128):
        raise FormatError("4-bit groups have 32, 64 or 128 columns", seen=group_size)


def _table(table: NDArray[np.int8] | Sequence[int], bits: int = 4) -> NDArray[np.int8]:
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


def _check_int8_rows(a: QuantizedRows, k: int) -> None:
    if a.codes.dtype != np.uint8 or a.scale.ndim != 1:
        raise InputError(
            "an int8 product takes unsigned activations with one scale a row",
            seen=f"{a.codes.dtype} codes, scale {list(a.scale.shape)}",
            next_step="quantize_rows(x, signed=False)",
        )
    _same_k(a, k)


def _check_int4_rows(a: QuantizedRows, k: int, group_size: int) -> None:
    groups = -(-k // group_size)
    if a.codes.dtype != np.int8 or a.zero_point.any() or a.sum.shape[1] != groups:
        raise InputError(
            "a 4-bit product takes signed symmetric activations with a sum for each group",
            seen=f"{a.codes.dtype} codes, sums {list(a.sum.shape)}",
            expected=f"int8 codes, sums [M, {groups}]",
            next_step=f"quantize_rows(x, sum_group_size={group_size})",
        )
    _same_k(a, k)


def _row_scales(a: QuantizedRows) -> Floats:
    """One scale a row, or one a group, as 4-bit products take them; a static scale is one for all."""
    one_for_all = a.scale.ndim == 1 and len(a.scale) != len(a.codes)
    return np.repeat(a.scale, len(a.codes)) if one_for_all else a.scale.reshape(-1)


def _int4_scratch(pool: ThreadPool, m: int, k: int, group_size: int) -> NDArray[np.uint8]:
    return _allocate(pool.threads * _native.q4gemm_scratch_bytes(m, k, group_size), np.uint8)


def _same_k(a: QuantizedRows, k: int) -> None:
    if a.k != k:
        raise InputError("activations and weight have different K", seen=f"{a.k} and {k}")


def _output(out: Floats | None, m: int, n: int) -> Floats:
    if out is None:
        return np.empty((m, n), np.float32)
    if out.shape != (m, n) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise InputError(
            "out does not fit", seen=f"{out.dtype} {list(out.shape)}", expected=f"float32 [{m}, {n}]"
        )
    return out


def _size_bytes(*arrays: NDArray[Any] | None) -> int:
    return sum(array.nbytes for array in arrays if array is not None)
