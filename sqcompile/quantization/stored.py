"""Stored codes: putting quantized weights and biases into a program in place of floating-point ones.

A stored weight `name` becomes the tensors `name_codes`, `name_scale` and `name_zero_point`, read by one
`dequantize`; every pass that quantizes weights ends here, so that backends find one form. Codes of a
non-linear mapping go through `lookup` first, with the table in `name_table`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sqcompile.errors import InputError
from sqcompile.evaluate import constant_value
from sqcompile.layers import Layer
from sqcompile.operators.table import argument
from sqcompile.program import Program
from sqcompile.quantization import affine
from sqcompile.quantization.affine import Search
from sqcompile.quantization.format import Format
from sqcompile.quantization.learned import LearnedState
from sqcompile.quantization.lookup import encode, fake_lookup, fit
from sqcompile.quantization.mappings import LARGEST_ENTRY
from sqcompile.quantization.observers import ObserverState
from sqcompile.rewrite import Rewriter
from sqcompile.sparsity import Pattern, Sparsity

# Codes of biases: int32, as the sums that they join.
BIAS_QMIN, BIAS_QMAX = -(2**31), 2**31 - 1


def weight_tensor(program: Program, layer: Layer) -> Tensor:
    """Return a layer's weight as its operator sees it, masks applied.

    Raises:
        InputError: If it is no constant, or holds NaN or infinity; the text names the layer.
    """
    value = constant_value(program, layer.weight_value)
    where = f"layer '{layer.name}', tensor @{layer.weight_name}"
    if value is None:
        raise InputError("A weight depends on the program's inputs.", where=where)
    finite = value.isfinite()
    if not bool(finite.all()):
        raise InputError(
            "A weight to quantize is not finite.",
            where=where,
            seen=f"{int((~finite).sum())} of {value.numel()} weights are NaN or infinite",
            expected="finite weights",
            next_step="mend the model's weights first; their origin is often a diverged training run",
        )
    return value


@dataclass(frozen=True)
class Decoding:
    """What turns the codes of a weight into its values.

    Attributes:
        scale: float32, as `format.granularity.scale_shape`.
        zero_point: int32, alike.
        table: Of a mapping that is not linear, int8 [2**bits]: codes are looked up in it first.
    """

    scale: Tensor
    zero_point: Tensor
    table: Tensor | None = None


def fit_decoding(
    weight: Tensor, format: Format, search: Search = "minmax", importance: Tensor | None = None
) -> Decoding:
    """Choose scales and zero points for a weight, and a table if its format asks for one.

    Args:
        weight: The weight.
        format: Its format, with its axis on the weight's own axes.
        search: Of scales.
        importance: Weights of errors, for tables; see `lookup.fit`.

    Raises:
        InputError: If a weight is NaN or infinite.
    """
    if format.mapping.is_linear:
        return Decoding(*affine.scale_for_tensor(weight, format, search))
    fitted = fit(weight, format, search, importance)
    return Decoding(fitted.scale, torch.zeros_like(fitted.scale, dtype=torch.int32), fitted.table)


def weight_decoding(
    state: ObserverState, weight: Tensor, search: Search = "minmax", least: Tensor | None = None
) -> Decoding:
    """Return what an observed weight's codes will stand for: what was learned, or what fits; scales at least `least`.

    Shapes: weight [...]; least as `state.format.granularity.scale_shape(weight.shape)`, or [].
    """
    if isinstance(state, LearnedState):
        decoding = Decoding(*state.parameters(), state.table)
    else:
        decoding = fit_decoding(weight, state.format, search)
    return _raised(weight, state.format, decoding, least)


def _raised(weight: Tensor, format: Format, decoding: Decoding, least: Tensor | None) -> Decoding:
    scale, zero_point = decoding.scale, decoding.zero_point
    if least is None or not bool((scale < least).any()):
        return decoding
    raised = torch.maximum(scale, least)
    if not format.symmetric:  # the zero point belongs to the range; the wider one starts as low as before
        low = affine.block_range(weight, *format.granularity.pair)[0].clamp(max=0)
        moved = (format.qmin - low / raised).clamp(format.qmin, format.qmax).round().to(torch.int32)
        zero_point = torch.where(raised > scale, moved, zero_point)
    return Decoding(raised, zero_point, decoding.table)


def rounded_weight(weight: Tensor, decoding: Decoding, format: Format) -> Tensor:
    """Return a weight as its codes will restore it. Shapes: weight [...]; result alike."""
    scale, pair = decoding.scale, format.granularity.pair
    if decoding.table is not None:
        return fake_lookup(weight, scale, decoding.table, *pair)
    return affine.fake_quantize(weight, scale, decoding.zero_point, *pair, format.qmin, format.qmax)


def look_up(edit: Rewriter, codes: fx.Node, entries: Tensor, name: str) -> fx.Node:
    """Insert the lookup of values' codes where the edit stands, and return it.

    Args:
        edit: The edit.
        codes: 8-bit codes.
        entries: What they become, uint8 [256]: `lookup.nearest_entries`.
        name: What the stored entries are called by.
    """
    stored = edit.constant(f"{name}_entries", entries.to(codes.meta["val"].device), like=codes)
    return edit.call(torch.ops.sqcompile.lookup.default, codes, stored, like=codes)


def store_weight(
    edit: Rewriter,
    value: fx.Node,
    stored: fx.Node,
    weight: Tensor,
    decoding: Decoding,
    format: Format,
) -> fx.Node:
    """Store the codes of a weight, and return the `dequantize` that stands for it from now on.

    Codes of zeros stand for exactly zero, so masks are baked in; the promise about them
    (`Program.sparsity`) moves to the codes.

    Args:
        edit: The rewriter; the node is inserted where it inserts.
        value: The node that is quantized: the stored weight, or what masks it.
        stored: The `get_attr` node of the stored weight.
        weight: The value of `value`.
        decoding: Its scales, and its table if it has one.
        format: Its format, with its axis on the weight's own axes.
    """
    axis, group_size = format.granularity.pair
    scale, zero_point, table = decoding.scale, decoding.zero_point, decoding.table
    qmin, qmax = (format.qmin, format.qmax) if table is None else (-LARGEST_ENTRY, LARGEST_ENTRY)
    if table is None:
        codes = affine.quantize(weight, scale, zero_point, axis, group_size, qmin, qmax, format.storage_dtype)
    else:
        codes = encode(affine.divide(weight, scale, axis, group_size), table)
    name = str(stored.target)
    codes_node = edit.constant(f"{name}_codes", codes, like=stored)
    promise = promised(edit.program, value, stored)
    if promise is not None:
        edit.program.sparsity[str(codes_node.target)] = promise
    steps = codes_node
    if table is not None:
        table_node = edit.constant(f"{name}_table", table, like=stored)
        steps = edit.call(torch.ops.sqcompile.lookup.default, codes_node, table_node, like=value)
    scale_node = edit.constant(f"{name}_scale", scale.contiguous(), like=stored)
    zero_node = edit.constant(f"{name}_zero_point", zero_point.contiguous(), like=stored)
    return edit.call(
        torch.ops.sqcompile.dequantize.default,
        steps,
        scale_node,
        zero_node,
        axis,
        group_size,
        qmin,
        qmax,
        like=value,
    )


def store_bias(edit: Rewriter, bias: fx.Node, codes: Tensor, scale: Tensor) -> fx.Node:
    """Store the int32 codes of a bias, and return the `dequantize` that stands for it.

    Shapes: codes [O]; scale [O] or [].
    """
    name = str(bias.target)
    axis = None if scale.dim() == 0 else 0
    return edit.call(
        torch.ops.sqcompile.dequantize.default,
        edit.constant(f"{name}_codes", codes, like=bias),
        edit.constant(f"{name}_scale", scale.contiguous(), like=bias),
        edit.constant(f"{name}_zero_point", torch.zeros_like(scale, dtype=torch.int32), like=bias),
        axis,
        None,
        BIAS_QMIN,
        BIAS_QMAX,
        like=bias,
    )


def promised(program: Program, value: fx.Node, stored: fx.Node) -> Sparsity | None:
    """Return what is promised about the zeros of a weight: its record, or the mask before its operator."""
    record = program.sparsity.get(str(stored.target))
    mask = None
    while value is not stored:
        if value.target is torch.ops.sqcompile.mask.default:
            applied = constant_value(program, _mask_node(value))
            if applied is None:
                return record
            mask = applied if mask is None else mask & applied
        source = argument(value, 0)
        assert isinstance(source, fx.Node)
        value = source
    if mask is None:
        return record
    if record is None:
        return Sparsity(mask)
    return Sparsity(mask & record.mask, record.pattern if torch.equal(mask, record.mask) else Pattern())


def forget_unused_promises(program: Program) -> None:
    """Drop the promises about weights that the program no longer holds."""
    for name in [name for name in program.sparsity if not program.has_tensor(name)]:
        del program.sparsity[name]


def _mask_node(value: fx.Node) -> fx.Node:
    mask = value.args[1]
    assert isinstance(mask, fx.Node)
    return mask
