"""What all kernels on NumPy arrays share: memory, checks of arrays, errors of C++ as ours."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqcompile.backends.native import _native
from sqcompile.backends.native.kernels.isas import isa_error
from sqcompile.errors import InputError

PANEL = 16  # outputs that are stored and computed together
ALIGNMENT = 64  # bytes: a cache line, and the widest vector

Floats = NDArray[np.float32]


def run(function: Any, *arguments: Any) -> Any:
    """Call into C++, and turn its errors into ours."""
    try:
        return function(*arguments)
    except ValueError as error:
        if "instruction set" in str(error):
            raise isa_error(error, None) from None
        raise InputError(str(error)) from None
    except RuntimeError as error:
        raise isa_error(error, None) from None


def padded_outputs(n: int) -> int:
    """Outputs, rounded up to whole panels."""
    return -(-n // PANEL) * PANEL


def allocate(count: int, dtype: Any) -> NDArray[Any]:
    """Zeros on a cache line's boundary, on huge pages if there are many."""
    if count == 0:
        return np.empty(0, dtype)
    return _native.allocate(count * np.dtype(dtype).itemsize).view(dtype)


def matrix(array: NDArray[Any], dtype: Any, name: str) -> NDArray[Any]:
    """Return a matrix without gaps, or refuse what is none of this type."""
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype != dtype:
        seen = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(f"{name} is no matrix of {np.dtype(dtype).name}", seen=seen)
    return np.ascontiguousarray(array)


def by_output(values: NDArray[Any], n: int, name: str) -> Floats:
    """Copy one float an output into an array of whole panels."""
    values = np.asarray(values, np.float32)
    if values.shape != (n,):
        raise InputError(f"{name} has not one entry an output", seen=list(values.shape), expected=[n])
    padded: Floats = allocate(padded_outputs(n), np.float32)
    padded[:n] = values
    return padded


def optional_bias(bias: Floats | None, n: int) -> Floats | None:
    """Copy a bias, if there is one, into an array of whole panels."""
    return None if bias is None else by_output(bias, n, "bias")


def output(out: Floats | None, m: int, n: int) -> Floats:
    """Return where a product goes: `out`, if it fits, or new memory."""
    if out is None:
        return np.empty((m, n), np.float32)
    if out.shape != (m, n) or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise InputError(
            "out does not fit", seen=f"{out.dtype} {list(out.shape)}", expected=f"float32 [{m}, {n}]"
        )
    return out


def size_in_bytes(*arrays: NDArray[Any] | None) -> int:
    """Return the bytes of arrays that are there."""
    return sum(array.nbytes for array in arrays if array is not None)
