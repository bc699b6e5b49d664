"""Products with a bitmask of what is kept, 4 bits a code: `cpp/kernels/q4sparse`."""

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
from sqcompile.backends.native.kernels.grouped import (
    check_group_size,
    group_scales,
    grouped_scratch,
    table_of_sixteen,
)
from sqcompile.backends.native.kernels.rows import QuantizedRows, check_grouped_rows, row_scales
from sqcompile.errors import InputError


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
        return size_in_bytes(self.masks, self.values, self.value_start, self.table, self.scale, self.bias)


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
    codes = matrix(codes, np.uint8, "codes")
    kept = matrix(keep, np.bool_, "keep").view(np.uint8)
    if kept.shape != codes.shape:
        raise InputError("codes and keep have different shapes", seen=f"{codes.shape} and {kept.shape}")
    n, k = codes.shape
    check_group_size(group_size)
    masks = allocate(_native.q4sparse_mask_count(n, k, group_size), np.uint64)
    values = allocate(_native.q4sparse_value_bytes(kept, group_size) + _native.VALUE_SLACK, np.uint8)
    starts = allocate(padded_outputs(n) // PANEL + 1, np.uint64)
    run(_native.q4sparse_pack, codes, kept, group_size, masks, values, starts)
    return SparseInt4Weight(
        n=n,
        k=k,
        group_size=group_size,
        masks=masks,
        values=values,
        value_start=starts,
        table=table_of_sixteen(table),
        scale=group_scales(scale, n, k, group_size, half_scales),
        bias=optional_bias(bias, n),
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
    check_grouped_rows(a, weight.k, weight.group_size)
    out = output(out, len(a.codes), weight.n)
    pool = pool or ThreadPool(1)
    run(
        _native.q4sparse,
        pool,
        isa,
        weight.k,
        weight.group_size,
        a.codes,
        a.sum,
        row_scales(a),
        weight.masks,
        weight.values,
        weight.value_start,
        weight.table,
        weight.scale.view(np.uint16),
        weight.bias,
        low,
        high,
        out,
        grouped_scratch(pool, len(a.codes), weight.k, weight.group_size),
    )
    return out
