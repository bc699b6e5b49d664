"""Stored weights of products: read from a program, and packed for the kernel that suits them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from sqcompile.backends.native import kernels
from sqcompile.backends.native.lower.context import Lowering, node_argument, tensor_of
from sqcompile.backends.native.lower.quantized import Granularity
from sqcompile.backends.native.plan import Value

sq = torch.ops.sqcompile

# From these fractions of zeros on a sparse form is chosen (docs/kernels.md). Below
# them the dense kernels read hardly more and compute faster.
SPARSE_FROM = 0.3

# The same for codes of so many bits. Those kept take 4 bits behind a bitmask, so that of 3 and 2 bits half and
# three quarters of the weights have to be zero before a file is smaller; expanding costs more on top of it.
_CODES_SPARSE_FROM = {2: 0.85, 3: 0.6, 4: SPARSE_FROM}

# Time of a product that skips blocks of outputs × 4 inputs, as a part of the dense one's: so much for what is kept,
# and so much at any rate (docs/kernels.md, 128 rows). Wide blocks share loads, but are zero less often.
_BLOCK_TIME = {1: (1.33, 0.09), 4: (1.03, 0.075), 16: (1.19, 0.045)}
BLOCKS_BELOW = 0.75

_GROUPS = (128, 64, 32)
_INT8 = np.iinfo(np.int8)


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight as a matrix [N, K].

    Attributes:
        name: Name of the stored tensor.
        values: Codes minus zero points, which fit 16 bits.
        codes: The codes, from 0 on.
        lowest: What code 0 stands for before the zero point is subtracted.
        zero_point: [N, groups], as stored.
        scale: [N, groups].
        group_size: Inputs that share a scale; K for one scale an output.
        table: Entry of each code, where codes are no even steps; then lowest and zero points are 0.
    """

    name: str
    codes: NDArray[np.int16]
    lowest: int
    highest: int
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    group_size: int
    table: NDArray[np.int8] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def values(self) -> NDArray[np.int16]:
        """Codes minus zero points, or what the codes look up."""
        if self.table is not None:
            return self.table[self.codes].astype(np.int16)
        zeros = np.repeat(self.zero_point, self.group_size, axis=1)[:, : self.codes.shape[1]]
        return (self.codes - zeros).astype(np.int16)


@dataclass(frozen=True)
class PackedWeight:
    """A weight in a kernel's form.

    Attributes:
        operator: The operator that multiplies by it.
        arrays: Its constants, in the operator's order, without the bias (None: one that is left out).
        ints: The operator's whole numbers.
        group_size: Inputs that share an activation scale, for 4-bit products; 0 for 8-bit ones.
        form: What it is, for people.
    """

    operator: str
    arrays: tuple[Value | None, ...]
    bias: Value | None
    ints: tuple[int, ...]
    group_size: int
    form: str


def stored_weight(context: Lowering, node: fx.Node, outputs_axis: int) -> StoredWeight | None:
    """Return the quantized weight that a node stands for, or None if it is none.

    Args:
        context: The plan under construction.
        node: The weight as an operator takes it.
        outputs_axis: Which axis of it holds outputs.
    """
    if (
        node.target is not sq.dequantize.default
        or not context.is_constant(node)
        or tensor_of(node).dim() != 2
    ):
        return None
    source = node_argument(node, 0)
    table = None
    if source.target is sq.lookup.default:
        table = context.constant(node_argument(source, 1))
        source = node_argument(source, 0)
    parts = [context.constant(item) for item in (source, node_argument(node, 1), node_argument(node, 2))]
    if any(part is None for part in parts):
        return None
    codes, scale, zero_point = (part.numpy() for part in parts if part is not None)
    how = Granularity.of(node, 3, 2)
    if codes.dtype not in (np.int8, np.uint8):
        return None
    matrix = (codes if outputs_axis == 0 else codes.T).astype(np.int16)
    n, k = matrix.shape
    if how.axis is None:
        group_size = k
        scales, zeros = (np.broadcast_to(item.reshape(1, 1), (n, 1)) for item in (scale, zero_point))
    elif how.axis == outputs_axis and how.group_size is None:
        group_size = k
        scales, zeros = (item.reshape(n, 1) for item in (scale, zero_point))
    elif how.axis == 1 - outputs_axis and how.group_size is not None:
        group_size = k if how.group_size == -1 else min(how.group_size, k)
        scales, zeros = (item if outputs_axis == 0 else item.T for item in (scale, zero_point))
    else:
        return None
    return StoredWeight(
        name=str(source.target),
        codes=matrix,
        lowest=how.qmin if table is None else 0,
        highest=how.qmax if table is None else table.numel() - 1,
        scale=np.ascontiguousarray(scales, np.float32),
        zero_point=np.ascontiguousarray(zeros, np.int32),
        group_size=max(group_size, 1),
        table=None if table is None else table.numpy(),
    )


def pack(context: Lowering, weight: StoredWeight, bias: NDArray[np.float32] | None) -> PackedWeight | None:
    """Pack a weight for the kernel that suits its format and its zeros; None if there is no such kernel."""
    if weight.highest - weight.lowest < 16:
        group = _kernel_group(weight)
        return None if group is None else _pack_codes(context, weight, bias, group)
    if weight.scale.shape[1] != 1:
        group = _kernel_group(weight)
        return None if group is None else _pack_grouped_8bit(context, weight, bias, group)
    values = weight.values
    if values.size and (values.min() < _INT8.min or values.max() > _INT8.max):
        return None
    return _pack_8bit(context, values.astype(np.int8), weight.scale[:, 0], bias)


def _kernel_group(weight: StoredWeight) -> int | None:
    """Return the group size of the kernels with group scales in which this weight can be written without a change."""
    if weight.scale.shape[1] == 1:
        # Any will do; the last group of a short row is mostly padding.
        return next((group for group in reversed(_GROUPS) if group >= weight.shape[1]), _GROUPS[0])
    return next((group for group in _GROUPS if weight.group_size % group == 0), None)


def _pack_8bit(
    context: Lowering, values: NDArray[np.int8], scale: NDArray[np.float32], bias: NDArray[np.float32] | None
) -> PackedWeight:
    n, k = values.shape
    zeros = 1 - np.count_nonzero(values) / max(values.size, 1)
    outputs = _block_outputs(values)
    if outputs is not None:
        blocks = kernels.pack_block_sparse_int8(values, scale, outputs, bias)
        arrays: list[tuple[Any, str]] = [
            (blocks.index, "qblock_index"),
            (blocks.values, "qblock_values"),
            (blocks.start, "qblock_start"),
            (blocks.blocks_before, "panel_starts"),
            (blocks.sum, "panels"),
            (blocks.scale, "panels"),
        ]
        ints: tuple[int, ...] = (n, k, outputs, blocks.chunk)
        return _packed(
            context, "linear_q8_block", arrays, blocks.bias, ints, 0, f"int8 in {outputs}x4 blocks"
        )
    if zeros >= SPARSE_FROM:
        sparse = kernels.pack_sparse_int8(values, scale, bias)
        arrays = [
            (sparse.masks, "qsparse_masks"),
            (sparse.values, "qsparse_values"),
            (sparse.value_start, "panel_starts"),
            (sparse.sum, "panels"),
            (sparse.scale, "panels"),
        ]
        return _packed(context, "linear_q8_sparse", arrays, sparse.bias, (n, k), 0, "int8, bitmask")
    dense = kernels.pack_int8(values, scale, bias)
    arrays = [(dense.tiles, "qgemm"), (dense.sum, "panels"), (dense.scale, "panels")]
    return _packed(context, "linear_q8", arrays, dense.bias, (n, k), 0, "int8")


def _block_outputs(values: NDArray[np.int8]) -> int | None:
    """Return the block (so many outputs by 4 inputs) that saves the most time by its zeros, or None."""
    n, k = values.shape
    times = {}
    for outputs, (per_kept, fixed) in _BLOCK_TIME.items():
        if n % outputs or k % 4 or not values.size:
            continue
        blocks = values.reshape(n // outputs, outputs, k // 4, 4).any(axis=(1, 3))
        times[outputs] = per_kept * np.count_nonzero(blocks) / blocks.size + fixed
    best = min(times, key=lambda outputs: times[outputs], default=None)
    return None if best is None or times[best] > BLOCKS_BELOW else best


def _pack_codes(
    context: Lowering, weight: StoredWeight, bias: NDArray[np.float32] | None, group: int
) -> PackedWeight | None:
    """Pack codes of at most 4 bits, which index a table."""
    scale, zeros = _by_kernel_group(weight, group)
    bits = max((weight.highest - weight.lowest).bit_length(), 2)
    codes = (weight.codes - weight.lowest).astype(np.uint8)
    # One zero point for all is a shift of the table; others are subtracted group by group.
    shift = int(zeros.flat[0]) if zeros.size and (zeros == zeros.flat[0]).all() else None
    table = np.clip(np.arange(1 << bits) + weight.lowest - (shift or 0), -127, 127).astype(np.int8)
    if weight.table is not None:
        table[: len(weight.table)] = weight.table
    if shift is not None:
        keep = table[codes] != 0
        if keep.size and 1 - np.count_nonzero(keep) / keep.size >= _CODES_SPARSE_FROM[bits]:
            return _pack_kept_codes(context, codes, keep, np.resize(table, 16), scale, group, bias)
    if shift is None and (abs(zeros) > _INT8.max).any():
        return None
    zero_point = None if shift is not None else zeros.astype(np.int8)
    half = _fits_half(scale)
    dense = kernels.pack_int4(
        codes, table, scale, group, zero_point=zero_point, bias=bias, half_scales=half, bits=bits
    )
    return _packed_groups(context, dense)


def _pack_kept_codes(
    context: Lowering,
    codes: NDArray[np.uint8],
    keep: NDArray[np.bool_],
    table: NDArray[np.int8],
    scale: NDArray[np.float32],
    group: int,
    bias: NDArray[np.float32] | None,
) -> PackedWeight:
    half = _fits_half(scale)
    sparse = kernels.pack_sparse_int4(codes, keep, table, scale, group, bias=bias, half_scales=half)
    arrays: list[tuple[Any, str]] = [
        (sparse.masks, "q4sparse_masks"),
        (sparse.values, "q4sparse_values"),
        (sparse.value_start, "panel_starts"),
        (sparse.table, "plain"),
        (sparse.scale, "group_panels"),
    ]
    form = f"4-bit, bitmask, groups of {group}"
    return _packed(context, "linear_q4_sparse", arrays, sparse.bias, (*codes.shape, group), group, form)


def _pack_grouped_8bit(
    context: Lowering, weight: StoredWeight, bias: NDArray[np.float32] | None, group: int
) -> PackedWeight | None:
    """Pack codes of 5 to 8 bits, which are their own values, around the middle of their range."""
    scale, zeros = _by_kernel_group(weight, group)
    middle = (weight.lowest + weight.highest + 1) // 2
    codes, zeros = weight.codes - middle, zeros - middle
    most = int(_INT8.max)
    if weight.table is not None or abs(zeros).max(initial=0) > most or abs(codes).max(initial=0) > most:
        return None
    same = not zeros.any()
    half = _fits_half(scale)
    dense = kernels.pack_grouped_int8(
        codes.astype(np.int8),
        scale,
        group,
        zero_point=None if same else zeros.astype(np.int8),
        bias=bias,
        half_scales=half,
    )
    return _packed_groups(context, dense)


def _by_kernel_group(weight: StoredWeight, group: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return scales and zero points of groups of this size, of which one of the weight's is a multiple."""
    groups = -(-weight.shape[1] // group)
    repeats = max(weight.group_size // group, 1) if weight.scale.shape[1] > 1 else groups
    scale, zeros = (
        np.repeat(item, repeats, axis=1)[:, :groups] for item in (weight.scale, weight.zero_point)
    )
    return scale, zeros


def _packed_groups(context: Lowering, weight: kernels.Int4Weight) -> PackedWeight:
    group = weight.group_size
    arrays: list[tuple[Any, str]] = [
        (weight.codes, "q4gemm"),
        (weight.table, "plain"),
        (weight.scale, "group_panels"),
        (weight.zero_point, "group_panels"),
    ]
    ints = (weight.n, weight.k, group, weight.bits)
    form = f"{weight.bits}-bit, groups of {group}"
    return _packed(context, "linear_q4", arrays, weight.bias, ints, group, form)


def _fits_half(scale: NDArray[np.float32]) -> bool:
    """Whether half precision holds scales to 11 bits: none is too large for it, or too small."""
    limits = np.finfo(np.float16)
    return bool(((scale >= limits.tiny) & (scale <= limits.max)).all())


def _packed(
    context: Lowering,
    operation: str,
    arrays: list[tuple[Any, str]],
    bias: NDArray[np.float32] | None,
    ints: tuple[int, ...],
    group_size: int,
    form: str,
) -> PackedWeight:
    def store(array: Any, layout: str) -> Value | None:
        return None if array is None else context.plan.add_constant(array, layout)

    values = tuple(store(array, layout) for array, layout in arrays)
    return PackedWeight(operation, values, store(bias, "panels"), ints, group_size, form)
