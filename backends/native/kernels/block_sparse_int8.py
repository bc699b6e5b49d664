"""Products that skip blocks of zeros: `cpp/kernels/qblock`."""

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
from sqcompile.errors import FormatError

# A chunk of 192 units of 4 k, for 64 rows of activations, is 48 KiB: a little more than the L1 cache of most CPUs,
# but the L2 cache keeps up, and sums go to memory and back with each chunk. On Zen 4 with 85 % zeros (1x4 blocks,
# 128 rows), 64, 96, 128 and 192 took 458, 441, 444 and 422 us at N = 3072, K = 768, and 128 and 192 316 and 307 us
# at N = 768, K = 3072.
BLOCK_CHUNK = 192


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
        return size_in_bytes(
            self.index, self.values, self.start, self.blocks_before, self.sum, self.scale, self.bias
        )


def pack_block_sparse_int8(
    weight: NDArray[np.int8], scale: Floats, block_outputs: int, bias: Floats | None = None
) -> BlockSparseInt8Weight:
    """Pack the blocks of `block_outputs` x 4 entries that are not zero, for `block_sparse_int8_matmul`.

    Shapes: weight [N, K]; scale [N]; bias [N].

    Raises:
        InputError: A shape or dtype is wrong.
        FormatError: A block has other than 1, 4 or 16 outputs.
    """
    weight = matrix(weight, np.int8, "weight")
    if block_outputs not in (1, 4, 16):
        raise FormatError("a block has 1, 4 or 16 outputs", seen=block_outputs)
    n, k = weight.shape
    count = _native.qblock_count(weight, block_outputs)
    index = allocate(count, np.uint8)
    values = allocate(count * block_outputs * 4, np.int8)
    start = allocate(_native.qblock_start_count(n, k, block_outputs, BLOCK_CHUNK), np.uint64)
    before = allocate(padded_outputs(n) // PANEL + 1, np.uint64)
    sums = allocate(padded_outputs(n), np.int32)
    run(_native.qblock_pack, weight, block_outputs, BLOCK_CHUNK, index, values, start, before, sums)
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
        scale=by_output(scale, n, "scale"),
        bias=optional_bias(bias, n),
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
    check_int8_rows(a, weight.k)
    out = output(out, len(a.codes), weight.n)
    pool = pool or ThreadPool(1)
    run(
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
        allocate(_native.qblock_interleaved_bytes(len(a.codes), weight.k), np.uint8),
        allocate(pool.threads * _native.QBLOCK_SUM_COUNT, np.int32),
    )
    return out
