"""Dense int8 products: `cpp/kernels/qgemm`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sqcompile.backends.native import _native
from sqcompile.backends.native._native import ThreadPool
from sqcompile.backends.native.kernels.arrays import (
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
        return size_in_bytes(self.tiles, self.sum, self.scale, self.bias)


def pack_int8(weight: NDArray[np.int8], scale: Floats, bias: Floats | None = None) -> Int8Weight:
    """Pack an int8 matrix for `int8_matmul`.

    Shapes: weight [N, K]; scale [N]; bias [N].

    Raises:
        InputError: A shape or dtype is wrong.
    """
    weight = matrix(weight, np.int8, "weight")
    n, k = weight.shape
    tiles = allocate(_native.qgemm_packed_bytes(n, k), np.int8)
    sums = allocate(padded_outputs(n), np.int32)
    run(_native.qgemm_pack, weight, tiles, sums)
    return Int8Weight(
        n=n, k=k, tiles=tiles, sum=sums, scale=by_output(scale, n, "scale"), bias=optional_bias(bias, n)
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
    check_int8_rows(a, weight.k)
    out = output(out, len(a.codes), weight.n)
    run(
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
