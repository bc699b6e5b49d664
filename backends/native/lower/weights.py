"""Stored weights of products: read from a program, and packed for the kernel that suits them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from sqcompile.backends.native import kernels
from sqcompile.backends.native.lower.choice import Candidate, Workload, choose
from sqcompile.backends.native.lower.context import Lowering, node_argument, tensor_of
from sqcompile.backends.native.lower.quantized import Granularity
from sqcompile.backends.native.plan import Size, Value

sq = torch.ops.sqcompile

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
        choice: The form that was chosen, as times are kept by.
        remark: What is to be said of the choice.
    """

    operator: str
    arrays: tuple[Value | None, ...]
    bias: Value | None
    ints: tuple[int, ...]
    group_size: int
    form: str
    choice: Candidate
    remark: str = ""


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


def pack(
    context: Lowering, weight: StoredWeight, bias: NDArray[np.float32] | None, rows: Size
) -> PackedWeight | None:
    """Pack a weight for the kernel that suits its format and its zeros; None if there is no such kernel.

    Args:
        context: The plan under construction.
        weight: The weight.
        bias: [N], or None.
        rows: Rows of activations that it is multiplied by.
    """
    packed, remark = _pack(context, weight, bias, context.workload(rows))
    return packed and replace(packed, remark=remark)


def _pack(
    context: Lowering, weight: StoredWeight, bias: NDArray[np.float32] | None, workload: Workload
) -> tuple[PackedWeight | None, str]:
    if weight.highest - weight.lowest < 16:
        group = _kernel_group(weight)
        return (None, "") if group is None else _pack_codes(context, weight, bias, group, workload)
    if weight.scale.shape[1] != 1:
        group = _kernel_group(weight)
        return (None if group is None else _pack_grouped_8bit(context, weight, bias, group)), ""
    values = weight.values
    if values.size and (values.min() < _INT8.min or values.max() > _INT8.max):
        return None, ""
    codes = values.astype(np.int8)
    candidates = _forms_of_int8(codes)
    choice, remark = choose(context.times, workload, candidates, *weight.shape)
    return _pack_8bit(context, codes, weight.scale[:, 0], bias, choice), remark


def _kernel_group(weight: StoredWeight) -> int | None:
    """Return the group size of the kernels with group scales in which this weight can be written without a change."""
    if weight.scale.shape[1] == 1:
        # Any will do; the last group of a short row is mostly padding.
        return next((group for group in reversed(_GROUPS) if group >= weight.shape[1]), _GROUPS[0])
    return next((group for group in _GROUPS if weight.group_size % group == 0), None)


def _forms_of_int8(values: NDArray[np.int8]) -> list[Candidate]:
    """Return the forms that a weight can have: dense, and those that leave zeros out."""
    n, k = values.shape
    forms = [Candidate("int8", 1.0, values.size)]
    kept = np.count_nonzero(values)
    if kept == values.size:
        return forms
    forms.append(Candidate("int8, bitmask", kept / values.size, kept + values.size / 8))
    for outputs in (1, 4, 16):
        if n % outputs or k % 4:
            continue
        blocks = values.reshape(n // outputs, outputs, k // 4, 4).any(axis=(1, 3))
        count = int(np.count_nonzero(blocks))
        if count < blocks.size:
            size_bytes = count * (outputs * 4 + 1)
            forms.append(Candidate(f"int8 in {outputs}x4 blocks", count / blocks.size, size_bytes, outputs))
    return forms


def _pack_8bit(
    context: Lowering,
    values: NDArray[np.int8],
    scale: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    choice: Candidate,
) -> PackedWeight:
    n, k = values.shape
    if choice.block_outputs:
        outputs = choice.block_outputs
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
        return _packed(context, "linear_q8_block", arrays, blocks.bias, ints, 0, choice)
    if choice.form == "int8, bitmask":
        sparse = kernels.pack_sparse_int8(values, scale, bias)
        arrays = [
            (sparse.masks, "qsparse_masks"),
            (sparse.values, "qsparse_values"),
            (sparse.value_start, "panel_starts"),
            (sparse.sum, "panels"),
            (sparse.scale, "panels"),
        ]
        return _packed(context, "linear_q8_sparse", arrays, sparse.bias, (n, k), 0, choice)
    dense = kernels.pack_int8(values, scale, bias)
    arrays = [(dense.tiles, "qgemm"), (dense.sum, "panels"), (dense.scale, "panels")]
    return _packed(context, "linear_q8", arrays, dense.bias, (n, k), 0, choice)


def _pack_codes(
    context: Lowering,
    weight: StoredWeight,
    bias: NDArray[np.float32] | None,
    group: int,
    workload: Workload,
) -> tuple[PackedWeight | None, str]:
    """Pack codes of at most 4 bits, which index a table."""
    scale, zeros = _by_kernel_group(weight, group)
    bits = max((weight.highest - weight.lowest).bit_length(), 2)
    codes = (weight.codes - weight.lowest).astype(np.uint8)
    # One zero point for all is a shift of the table; others are subtracted group by group.
    shift = int(zeros.flat[0]) if zeros.size and (zeros == zeros.flat[0]).all() else None
    table = np.clip(np.arange(1 << bits) + weight.lowest - (shift or 0), -127, 127).astype(np.int8)
    if weight.table is not None:
        table[: len(weight.table)] = weight.table
    choice, remark = Candidate(f"{bits}-bit", 1.0, codes.size * bits / 8), ""
    if shift is not None:
        keep = table[codes] != 0
        kept = np.count_nonzero(keep)
        if kept < keep.size:
            # Kept codes have 4 bits, whatever they had; those of two tiles share bytes, which pads them a little.
            bitmask = Candidate("4-bit, bitmask", kept / keep.size, keep.size / 8 + 0.51 * kept)
            choice, remark = choose(context.times, workload, [choice, bitmask], *weight.shape)
            if choice is bitmask:
                table = np.resize(table, 16)
                return _pack_kept_codes(context, codes, keep, table, scale, group, bias, choice), remark
    if shift is None and (abs(zeros) > _INT8.max).any():
        return None, ""
    zero_point = None if shift is not None else zeros.astype(np.int8)
    half = not context.exact and _fits_half(scale)
    dense = kernels.pack_int4(
        codes, table, scale, group, zero_point=zero_point, bias=bias, half_scales=half, bits=bits
    )
    return _packed_groups(context, dense, choice), remark


def _pack_kept_codes(
    context: Lowering,
    codes: NDArray[np.uint8],
    keep: NDArray[np.bool_],
    table: NDArray[np.int8],
    scale: NDArray[np.float32],
    group: int,
    bias: NDArray[np.float32] | None,
    choice: Candidate,
) -> PackedWeight:
    half = not context.exact and _fits_half(scale)
    sparse = kernels.pack_sparse_int4(codes, keep, table, scale, group, bias=bias, half_scales=half)
    arrays: list[tuple[Any, str]] = [
        (sparse.masks, "q4sparse_masks"),
        (sparse.values, "q4sparse_values"),
        (sparse.value_start, "panel_starts"),
        (sparse.table, "plain"),
        (sparse.scale, "group_panels"),
    ]
    return _packed(context, "linear_q4_sparse", arrays, sparse.bias, (*codes.shape, group), group, choice)


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
    half = not context.exact and _fits_half(scale)
    dense = kernels.pack_grouped_int8(
        codes.astype(np.int8),
        scale,
        group,
        zero_point=None if same else zeros.astype(np.int8),
        bias=bias,
        half_scales=half,
    )
    return _packed_groups(context, dense, Candidate("8-bit", 1.0, codes.size))


def _by_kernel_group(weight: StoredWeight, group: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return scales and zero points of groups of this size, of which one of the weight's is a multiple."""
    groups = -(-weight.shape[1] // group)
    repeats = max(weight.group_size // group, 1) if weight.scale.shape[1] > 1 else groups
    scale = np.repeat(weight.scale, repeats, axis=1)[:, :groups]
    zeros = np.repeat(weight.zero_point, repeats, axis=1)[:, :groups]
    return scale, zeros


def _packed_groups(context: Lowering, weight: kernels.Int4Weight, choice: Candidate) -> PackedWeight:
    group = weight.group_size
    arrays: list[tuple[Any, str]] = [
        (weight.codes, "q4gemm"),
        (weight.table, "plain"),
        (weight.scale, "group_panels"),
        (weight.zero_point, "group_panels"),
    ]
    ints = (weight.n, weight.k, group, weight.bits)
    return _packed(context, "linear_q4", arrays, weight.bias, ints, group, choice)


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
    choice: Candidate,
) -> PackedWeight:
    def store(array: Any, layout: str) -> Value | None:
        return None if array is None else context.plan.add_constant(array, layout)

    values = tuple(store(array, layout) for array, layout in arrays)
    form = f"{choice.form}, groups of {group_size}" if group_size else choice.form
    return PackedWeight(operation, values, store(bias, "panels"), ints, group_size, form, choice)
