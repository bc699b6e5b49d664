"""Invariants of quantization and sparsity: what the numbers in a program must satisfy."""

from __future__ import annotations

import torch
from torch import fx

from sqcompile.errors import VerifyError
from sqcompile.evaluate import constant_value
from sqcompile.fingerprint import tensor_identity
from sqcompile.layers import layers_of
from sqcompile.operators.table import argument
from sqcompile.program import Program
from sqcompile.quantization.format import scale_shape
from sqcompile.text import locate

_INT32_MAX = 2**31 - 1


def check_quantization(program: Program) -> None:
    """Check scales, zero points and codes, and that no int32 accumulator can overflow.

    - Scales are finite and > 0; zero points and stored codes lie in [qmin, qmax].
    - The lengths of scale and zero point fit the axis and group size.
    - K · max|a| · max|w| < 2³¹ for every layer whose data and weight are both integer codes.

    Raises:
        VerifyError: If one is broken; the text names the node.
    """
    for node in program.compute_nodes():
        if _is(node, "quantize", "dequantize", "fake_quantize"):
            _check_scales(program, node)
    for layer in layers_of(program):
        data, weight = layer.data, layer.weight_value
        if data is None or not (_is(data, "dequantize") and _is(weight, "dequantize")):
            continue
        shape = program.tensor(layer.weight).shape
        depth = max(1, program.tensor(layer.weight).numel() // shape[layer.operator.out_axis])
        largest = depth * _widest(data) * _widest(weight)
        if largest > _INT32_MAX and layer.operator.integer and _widest(data) < 2**15:
            raise VerifyError(
                "The int32 accumulator of an integer layer can overflow.",
                where=locate(layer.node),
                seen=f"K = {depth}, |a| ≤ {_widest(data)}, |w| ≤ {_widest(weight)}: up to {largest}",
                expected=f"at most {_INT32_MAX}",
                next_step="use fewer bits for the activations or the weights of this layer",
            )


def check_sparsity(program: Program) -> None:
    """Check that masks fit their weights, and that baked-in patterns still hold.

    Raises:
        VerifyError: If a mask has another shape or type, or if a weight with a promise
            (`Program.sparsity`) has nonzeros where it promises none.
    """
    for node in program.compute_nodes():
        if not _is(node, "mask"):
            continue
        weight, mask = node.meta["val"], node.args[1]
        if not isinstance(mask, fx.Node) or mask.op != "get_attr":
            continue
        stored = program.tensor(mask)
        if stored.dtype != torch.bool or tuple(stored.shape) != tuple(weight.shape):
            raise VerifyError(
                "A mask does not fit its weight.",
                where=locate(node),
                seen=f"mask {stored.dtype} {tuple(stored.shape)}",
                expected=f"bool {tuple(weight.shape)}",
                next_step="give the weight a mask of its own shape, True where it is kept",
            )
    if not program.sparsity:
        return
    for layer in layers_of(program):
        record = program.sparsity.get(layer.weight_name)
        if record is None:
            continue
        stored = program.tensor(layer.weight)
        key = f"{tensor_identity(stored)}:{id(record)}"
        if layer.node.meta.get("sparsity_checked") == key:
            continue
        value = constant_value(program, layer.weight_value)
        broken = None if value is None else record.violations(value)
        if broken:
            raise VerifyError(
                f"The weight of '{layer.name}' no longer has the sparsity that was promised for it.",
                where=f"tensor @{layer.weight_name}, {locate(layer.node)}",
                seen=broken,
                expected=str(record),
                next_step="multiply with the mask again, or prune after this pass",
            )
        layer.node.meta["sparsity_checked"] = key


def _check_scales(program: Program, node: fx.Node) -> None:
    value, scale_node, zero_node = node.args[0], node.args[1], node.args[2]
    axis, group = argument(node, 3), argument(node, 4)
    qmin, qmax = argument(node, 5), argument(node, 6)
    if not isinstance(scale_node, fx.Node) or scale_node.op != "get_attr":
        return  # a dynamic scale: made at run time by dynamic_scale, which keeps the invariants
    scale = program.tensor(scale_node)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        bad = scale[~(torch.isfinite(scale) & (scale > 0))]
        raise VerifyError(
            "A scale is not a positive finite number.",
            where=locate(node),
            seen=f"{bad.numel()} of {scale.numel()} scales, first {float(bad.flatten()[0])}",
            expected="finite scales > 0",
            next_step="check the weights and calibration data for NaN, infinity and constant channels",
        )
    expected = _scale_shape(value, axis, group)
    if expected is not None and tuple(scale.shape) != expected:
        raise VerifyError(
            "The shape of a scale does not fit its tensor.",
            where=locate(node),
            seen=tuple(scale.shape),
            expected=expected,
            next_step="one scale a channel or group along the axis",
        )
    if isinstance(zero_node, fx.Node) and zero_node.op == "get_attr":
        zero = program.tensor(zero_node)
        if zero.numel() and (int(zero.min()) < qmin or int(zero.max()) > qmax):  # type: ignore[operator]
            raise VerifyError(
                "A zero point is out of the range of its codes.",
                where=locate(node),
                seen=f"{int(zero.min())} to {int(zero.max())}",
                expected=f"{qmin} to {qmax}",
            )
    if _is(node, "dequantize") and isinstance(value, fx.Node) and value.op == "get_attr":
        key = f"{program.tensor(value).data_ptr()}:{qmin}:{qmax}"
        if node.meta.get("codes_checked") == key:
            return
        codes = program.tensor(value)
        if codes.numel() and (int(codes.min()) < qmin or int(codes.max()) > qmax):  # type: ignore[operator]
            raise VerifyError(
                "Stored codes are out of their range.",
                where=locate(node),
                seen=f"{int(codes.min())} to {int(codes.max())}",
                expected=f"{qmin} to {qmax}",
            )
        node.meta["codes_checked"] = key


def _scale_shape(value: object, axis: object, group: object) -> tuple[int, ...] | None:
    """Return the shape that a stored scale must have, or None where a symbolic size decides."""
    recorded = value.meta.get("val") if isinstance(value, fx.Node) else None
    if recorded is None:
        return None
    shape = scale_shape(recorded.shape, axis, group)  # type: ignore[arg-type]
    return shape if all(isinstance(size, int) for size in shape) else None


def _is(node: object, *names: str) -> bool:
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    target = node.target
    return target.namespace == "sqcompile" and target._schema.name.removeprefix("sqcompile::") in names


def _widest(node: fx.Node) -> int:
    """Return the largest |code − zero point| that a dequantize node can see."""
    qmin, qmax = argument(node, 5), argument(node, 6)
    assert isinstance(qmin, int) and isinstance(qmax, int)
    return max(abs(qmin), abs(qmax)) if qmin < 0 else qmax
