"""The native engine's kernels on NumPy arrays: quantize activations, pack weights, multiply.

What the engine runs inside a compiled model, one kernel at a time, for tests and benchmarks. Arrays are
passed without copies. Every function takes `isa`, the name of an instruction set (None: what the
environment variable SQCOMPILE_ISA says, else the best of this CPU), and a thread pool (None: one thread).
Neither changes a bit of any result.

The math of each kernel is in its header, `cpp/kernels/<family>/<family>.h`.

rows.py                                          quantized activations
int8.py, sparse_int8.py, block_sparse_int8.py    weights with one scale an output
grouped.py, sparse_int4.py                       weights with group scales
arrays.py, isas.py                               what they share; instruction sets
"""

from __future__ import annotations

from sqcompile.backends.native._native import ThreadPool
from sqcompile.backends.native.kernels.arrays import PANEL
from sqcompile.backends.native.kernels.block_sparse_int8 import (
    BlockSparseInt8Weight,
    block_sparse_int8_matmul,
    pack_block_sparse_int8,
)
from sqcompile.backends.native.kernels.grouped import Int4Weight, int4_matmul, pack_grouped_int8, pack_int4
from sqcompile.backends.native.kernels.int8 import Int8Weight, int8_matmul, pack_int8
from sqcompile.backends.native.kernels.isas import KernelInfo, available_isas, default_isa, list_kernels
from sqcompile.backends.native.kernels.rows import QuantizedRows, quantize_rows, quantize_rows_static
from sqcompile.backends.native.kernels.sparse_int4 import (
    SparseInt4Weight,
    pack_sparse_int4,
    sparse_int4_matmul,
)
from sqcompile.backends.native.kernels.sparse_int8 import (
    SparseInt8Weight,
    pack_sparse_int8,
    sparse_int8_matmul,
)

__all__ = [
    "PANEL",
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
