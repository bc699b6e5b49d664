"""Products with a bitmask of what is not zero, 8 bits: `cpp/kernels/qsparse`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sqcompile.backends.native import _native
from sqcompile.backends.native._native import ThreadPool
from sqcompile.backends.native.kernels.arrays import (
    PANEL,
    Floats,
    allocate,
    by_output,
    matrix,
    optional_bias,
    output,
    padded_outputs,
    run,
    size_in_bytes,
)
from sqcompile.backends.native.kernels.rows import QuantizedRows, check_int8_rows


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
        return size_in_bytes(self.masks, self.values, self.value_start, self.sum, self.scale, self.bias)


def pack_sparse_int8(weight: NDArray[np.int8], scale: Floats, bias: Floats | None = None) -> SparseInt8Weight:
    """Pack the nonzero entries of an int8 matrix for `sparse_int8_matmul`.

    Shapes: weight [N, K]; scale [N]; bias [N].

    Raises:
        InputError: A shape or dtype is wrong.
    """
    weight = matrix(weight, np.int8, "weight")
    n, k = weight.shape
    masks = allocate(_native.qsparse_mask_count(n, k), np.uint64)
    values = allocate(int(np.count_nonzero(weight)) + _native.VALUE_SLACK, np.uint8)
    starts = allocate(padded_outputs(n) // PANEL + 1, np.uint64)
    sums = allocate(padded_outputs(n), np.int32)
    run(_native.qsparse_pack, weight, masks, values, starts, sums)
    return SparseInt8Weight(
        n=n,
        k=k,
        masks=masks,
        values=values,
        value_start=starts,
        sum=sums,
        scale=by_output(scale, n, "scale"),
        bias=optional_bias(bias, n),
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
    check_int8_rows(a, weight.k)
    out = output(out, len(a.codes), weight.n)
    pool = pool or ThreadPool(1)
    run(
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
        allocate(pool.threads * _native.qsparse_scratch_bytes(len(a.codes), weight.k), np.uint8),
    )
    return out
