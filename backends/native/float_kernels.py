"""The native engine's float kernels on NumPy arrays: normalize, attend, multiply, activate.

As in `kernels`: what the engine runs inside a compiled model, one kernel at a time, for tests and
benchmarks. The math of each kernel is in its header, `cpp/kernels/<family>/<family>.h`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sqcompile.backends.native import _native
from sqcompile.backends.native._native import ThreadPool
from sqcompile.errors import InputError, did_you_mean

__all__ = ["ACTIVATIONS", "FloatWeight", "KvCache", "activate", "float_matmul", "normalize", "pack_float"]

Floats = NDArray[np.float32]

# In the order of activation.h.
ACTIVATIONS = ("identity", "relu", "sigmoid", "silu", "gelu", "gelu_tanh", "tanh", "exp")

PANEL = 16  # outputs, or positions of a cache, that lie together


@dataclass(frozen=True, kw_only=True)
class FloatWeight:
    """A float matrix [N, K] in the order of fgemm.h, as float32 or bfloat16."""

    n: int
    k: int
    bfloat16: bool
    data: NDArray[np.uint8]
    bias: Floats | None


def normalize(
    x: Floats,
    *,
    kind: Literal["rms", "layer"] = "rms",
    weight: Floats | None = None,
    bias: Floats | None = None,
    epsilon: float = 1e-5,
    isa: str | None = None,
    pool: ThreadPool | None = None,
) -> Floats:
    """Apply RMSNorm or LayerNorm to each row.

    Shapes: x [M, K]; weight and bias [K]; result [M, K].

    Raises:
        InputError: A shape or dtype is wrong.
    """
    x = _floats(x, "x", 2)
    y = np.empty_like(x)
    weight = None if weight is None else _floats(weight, "weight", 1)
    bias = None if bias is None else _floats(bias, "bias", 1)
    try:
        _native.norm(pool or ThreadPool(1), isa, kind, x, weight, bias, epsilon, y)
    except ValueError as error:
        raise InputError(str(error), seen=f"x {list(x.shape)}, kind {kind!r}, epsilon {epsilon}") from None
    return y


def activate(
    x: Floats,
    function: str,
    *,
    factor: Floats | None = None,
    isa: str | None = None,
    pool: ThreadPool | None = None,
) -> Floats:
    """Apply one of `ACTIVATIONS`, then multiply by `factor` where it is given.

    Shapes: x and factor [M, K]; result [M, K].

    Raises:
        InputError: A shape or dtype is wrong, or there is no such function.
    """
    if function not in ACTIVATIONS:
        raise InputError(
            "there is no such activation",
            seen=function,
            expected=list(ACTIVATIONS),
            next_step=did_you_mean(function, ACTIVATIONS),
        )
    x = _floats(x, "x", 2)
    factor = None if factor is None else _floats(factor, "factor", 2)
    y = np.empty_like(x)
    try:
        _native.activation(pool or ThreadPool(1), isa, ACTIVATIONS.index(function), x, factor, y)
    except ValueError as error:
        raise InputError(str(error), seen=list(x.shape)) from None
    return y


def pack_float(weight: Floats, bias: Floats | None = None, *, bfloat16: bool = False) -> FloatWeight:
    """Pack a float matrix for `float_matmul`; bfloat16 rounds to it, halves to even.

    Shapes: weight [N, K]; bias [N].

    Raises:
        InputError: A shape or dtype is wrong.
    """
    weight = _floats(weight, "weight", 2)
    n, k = weight.shape
    data = _native.allocate(_native.fgemm_packed_bytes(n, k, bfloat16))
    _native.fgemm_pack(weight, bfloat16, data)
    padded: Floats | None = None
    if bias is not None:
        if np.shape(bias) != (n,):
            raise InputError("bias has not one entry an output", seen=list(np.shape(bias)), expected=[n])
        padded = np.zeros(-(-n // PANEL) * PANEL, np.float32)
        padded[:n] = bias
    return FloatWeight(n=n, k=k, bfloat16=bfloat16, data=data, bias=padded)


def float_matmul(
    a: Floats, weight: FloatWeight, *, isa: str | None = None, pool: ThreadPool | None = None
) -> Floats:
    """Multiply float rows by a float weight: a @ weight.T + bias.

    Shapes: a [M, K]; weight [N, K]; result [M, N].

    Raises:
        InputError: `a` is no float32 matrix with K columns.
    """
    a = _floats(a, "a", 2)
    if a.shape[1] != weight.k:
        raise InputError("activations and weight have different K", seen=f"{a.shape[1]} and {weight.k}")
    pool = pool or ThreadPool(1)
    c = np.empty((len(a), weight.n), np.float32)
    scratch = _native.allocate(pool.threads * _native.fgemm_scratch_bytes(len(a), weight.bfloat16))
    _native.fgemm(pool, isa, a, weight.data, weight.bfloat16, weight.bias, c, scratch)
    return c


class KvCache:
    """Keys and values of one attention layer, as floats or as 8-bit codes with a scale a token and head."""

    def __init__(
        self, batch: int, heads: int, head_dim: int, capacity: int, *, quantized: bool = False
    ) -> None:
        """Make an empty cache for up to `capacity` positions."""
        self.batch, self.heads, self.head_dim = batch, heads, head_dim
        self.capacity = -(-capacity // PANEL) * PANEL
        self.length = 0
        k_bytes, v_bytes, scale_bytes = _native.kv_bytes(batch, heads, self.capacity, head_dim, quantized)
        self.k, self.v = _native.allocate(k_bytes), _native.allocate(v_bytes)
        self.scale = _native.allocate(2 * scale_bytes).view(np.float32)

    def append(self, k: Floats, v: Floats, *, isa: str | None = None, pool: ThreadPool | None = None) -> None:
        """Append tokens.

        Shapes: k and v [batch, heads, tokens, head_dim].

        Raises:
            InputError: A shape or dtype is wrong, or the tokens do not fit.
        """
        k, v = _floats(k, "k", 4), _floats(v, "v", 4)
        tokens = k.shape[2]
        expected = (self.batch, self.heads, tokens, self.head_dim)
        if k.shape != expected or v.shape != expected:
            raise InputError(
                "keys or values do not fit the cache", seen=list(k.shape), expected=list(expected)
            )
        pool = pool or ThreadPool(1)
        try:
            _native.kvcache(pool, isa, k, v, self.length, self.capacity, self.k, self.v, self.scale)
        except ValueError as error:
            raise InputError(str(error), seen=f"{self.length} + {tokens}", expected=self.capacity) from None
        self.length += tokens

    def attend(
        self,
        q: Floats,
        *,
        causal: bool = False,
        position: int | None = None,
        mask: NDArray[np.bool_] | Floats | None = None,
        scale: float | None = None,
        isa: str | None = None,
        pool: ThreadPool | None = None,
    ) -> Floats:
        """Attend to everything in the cache.

        Shapes: q [batch, query heads, queries, head_dim]; mask [batch, queries, length], where False or
        -inf hides a key; result as q.

        Args:
            q: Queries.
            causal: Whether a query sees only keys up to its own position.
            position: Of the first query; None: the queries are the last tokens of the cache.
            mask: Booleans, or floats to add to the scores.
            scale: Of the scores; None: 1 / sqrt(head_dim).
            isa: Instruction set.
            pool: Threads.

        Raises:
            InputError: A shape or dtype is wrong.
        """
        q = _floats(q, "q", 4)
        if q.shape[0] != self.batch or q.shape[3] != self.head_dim:
            raise InputError(
                "queries do not fit the cache",
                seen=list(q.shape),
                expected=f"[{self.batch}, heads, queries, {self.head_dim}]",
            )
        pool = pool or ThreadPool(1)
        out = np.empty_like(q)
        allowed = added = None
        if mask is not None and mask.dtype == np.bool_:
            allowed = np.ascontiguousarray(mask).view(np.uint8)
        elif mask is not None:
            added = _floats(mask, "mask", 3)
        scratch = _native.allocate(4 * pool.threads * _native.attention_scratch_count(self.head_dim))
        try:
            _native.attention(
                pool,
                isa,
                q,
                self.heads,
                self.length,
                max(self.length - q.shape[2], 0) if position is None else position,
                causal,
                1 / math.sqrt(self.head_dim) if scale is None else scale,
                allowed,
                added,
                self.capacity,
                self.k,
                self.v,
                self.scale,
                out,
                scratch.view(np.float32),
            )
        except ValueError as error:
            raise InputError(str(error), seen=f"q {list(q.shape)}") from None
        return out


def _floats(array: NDArray[Any], name: str, dimensions: int) -> Floats:
    """Check that `array` is float32 with so many dimensions; returns it without gaps."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != dimensions:
        seen = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(
            f"{name} is no float32 array with {dimensions} dimensions", seen=seen, expected="numpy.float32"
        )
    return np.ascontiguousarray(array)
