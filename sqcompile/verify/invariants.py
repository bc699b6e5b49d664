"""Invariants of quantization and sparsity: what the numbers in a program must satisfy."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import fx

from sqcompile.errors import VerifyError
from sqcompile.evaluate import constant_sources, constant_value
from sqcompile.fingerprint import tensor_identity
from sqcompile.layer_values import original_name
from sqcompile.layers import Layer, layers_of
from sqcompile.operators.table import argument
from sqcompile.program import Program
from sqcompile.quantization import affine
from sqcompile.quantization.format import scale_shape
from sqcompile.sparsity import Sparsity, as_matrix
from sqcompile.text import locate

_INT32_MAX = 2**31 - 1
_SATURATE = "saturate them with clamp(qmin, qmax), or give the node the range of its format"


def check_quantization(program: Program) -> None:
    """Check scales, zero points and codes, and that no int32 accumulator can overflow.

    - Scales are finite and > 0; zero points and stored codes lie in [qmin, qmax].
    - The shapes of scale and zero point fit the axis and group size.
    - Σ |a| · |w| + |bias| < 2³¹ for every layer whose data (of 8 bits or less) and weight are codes,
      with a and w as steps from their zero points.
    - Stored codes of a `lookup` are indices into its table.
    - Every `observe` node has an observer.

    Raises:
        VerifyError: If one is broken; the text names the node.
    """
    for node in program.compute_nodes():
        if _is(node, "quantize", "dequantize", "fake_quantize"):
            _check_parameters(program, node)
        elif _is(node, "lookup"):
            _check_lookup(program, node)
        elif _is(node, "observe") and str(argument(node, 1)) not in program.observers:
            raise VerifyError(
                "An observe node has no observer.",
                where=locate(node),
                seen=f"the name '{argument(node, 1)}'",
                expected=f"one of the {len(program.observers)} names in Program.observers",
                next_step="put a state under that name: program.observers[name] = observer.start(format)",
            )
    for layer in layers_of(program):
        _check_accumulator(program, layer)


def check_sparsity(program: Program) -> None:
    """Check that masks fit their weights, and that what is promised about zeros still holds.

    Raises:
        VerifyError: If a mask has another shape or type than its weight; or if a weight with a promise
            (`Program.sparsity`) has nonzeros where it promises none, or has not the pattern promised.
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
        promise = program.sparsity.get(layer.weight_name)
        if promise is not None:
            _check_promise(program, layer, promise)


def check_masks_kept(before: Program, after: Program) -> None:
    """Check that no pruned layer has lost its mask together with the promise about its zeros.

    Raises:
        VerifyError: If one has.
    """
    pruned = {original_name(layer.node) for layer in layers_of(before) if _is_pruned(before, layer)}
    if not pruned:
        return
    for layer in layers_of(after):
        if original_name(layer.node) in pruned and not _is_pruned(after, layer):
            raise VerifyError(
                f"The layer '{layer.name}' has lost its mask.",
                where=locate(layer.node),
                seen=f"tensor @{layer.weight_name}, without a mask, and no promise about its zeros",
                expected="the mask, or a promise in Program.sparsity for the weight that replaces it",
                next_step="move the promise to the new weight: program.sparsity[new_name] = …",
            )


def _check_parameters(program: Program, node: fx.Node) -> None:
    scale, zero_point = (_parameter(program, argument(node, position)) for position in (1, 2))
    qmin, qmax = _range(node)
    expected = _scale_shape(node)
    if scale is not None:
        valid = torch.isfinite(scale) & (scale > 0)
        if not bool(valid.all()):
            bad = scale[~valid]
            raise VerifyError(
                "A scale is not a positive finite number.",
                where=locate(node),
                seen=f"{bad.numel()} of {scale.numel()} scales, first {float(bad.flatten()[0])}",
                expected="finite scales > 0",
                next_step="check the weights and calibration data for NaN, infinity and constant channels",
            )
        _check_shape(node, "scale", scale, expected)
    if zero_point is not None:
        if zero_point.is_floating_point():
            raise VerifyError(
                "A zero point is no integer.",
                where=locate(node),
                seen=str(zero_point.dtype),
                expected="torch.int32",
                next_step="round it, and convert it with .to(torch.int32)",
            )
        _check_shape(node, "zero point", zero_point, expected)
        _check_range(
            node, "A zero point is out of the range of its codes.", zero_point, _range(node), _SATURATE
        )
    source = argument(node, 0)
    if _is(node, "dequantize") and isinstance(source, fx.Node) and source.op == "get_attr":
        codes = program.tensor(source)
        if _is_checked(node, "codes_checked", [codes], f"{qmin}:{qmax}"):
            return
        if codes.is_floating_point():
            raise VerifyError(
                "Stored codes are no integers.",
                where=locate(node),
                seen=str(codes.dtype),
                expected="an integer type",
                next_step="store what sqcompile.quantization.quantize returns",
            )
        _check_range(node, "Stored codes are out of their range.", codes, (qmin, qmax), _SATURATE)
        _set_checked(node, "codes_checked", [codes], f"{qmin}:{qmax}")


def _check_lookup(program: Program, node: fx.Node) -> None:
    codes, table = (constant_value(program, item) for item in node.args if isinstance(item, fx.Node))
    if codes is None or table is None or _is_checked(node, "codes_checked", [codes, table], ""):
        return
    encode = "store what sqcompile.quantization.lookup.encode returns for this table"
    _check_range(node, "Stored codes are out of their table.", codes, (0, table.numel() - 1), encode)
    _set_checked(node, "codes_checked", [codes, table], "")


def _parameter(program: Program, node: object) -> torch.Tensor | None:
    """Return a scale or zero point, or None if it is made at run time."""
    if not isinstance(node, fx.Node):
        return None
    maker = node.args[0] if node.args else None
    if isinstance(maker, fx.Node) and _is(maker, "dynamic_scale"):
        return None  # it keeps the invariants; asking further would walk the whole graph before it
    return constant_value(program, node)


def _check_shape(node: fx.Node, what: str, value: torch.Tensor, expected: tuple[int, ...] | None) -> None:
    if expected is None or tuple(value.shape) == expected:
        return
    raise VerifyError(
        f"The shape of a {what} does not fit its tensor.",
        where=locate(node),
        seen=tuple(value.shape),
        expected=expected,
        next_step=f"one {what} a channel or group along the axis",
    )


def _check_range(
    node: fx.Node, what: str, value: torch.Tensor, range_: tuple[int, int], next_step: str
) -> None:
    if value.numel() == 0:
        return
    low, high = (int(bound) for bound in value.aminmax())
    if low < range_[0] or high > range_[1]:
        raise VerifyError(
            what,
            where=locate(node),
            seen=f"{low} to {high}",
            expected=f"{range_[0]} to {range_[1]}",
            next_step=next_step,
        )


def _check_accumulator(program: Program, layer: Layer) -> None:
    data, weight = layer.data, layer.weight_value
    if data is None or not (_is(data, "dequantize") and _is(weight, "dequantize")):
        return
    low, high = _range(data)
    if not layer.operator.integer or high - low > 255:
        return  # integer kernels take data of 8 bits; wider data is computed in floating point
    widest = _widest(program, data)
    bias = 0 if layer.bias is None else _largest_bias(program, layer.bias)
    weights = program.tensor(layer.weight)
    depth = max(1, weights.numel() // max(1, weights.shape[layer.operator.out_axis]))
    largest = depth * widest * _widest(program, weight) + bias
    if largest > _INT32_MAX:
        # Only then: the weights are known, and their sum is far below that of the largest codes.
        largest = _largest_sum(program, layer, weight) * widest + bias
    if largest > _INT32_MAX:
        raise VerifyError(
            "The int32 accumulator of an integer layer can overflow.",
            where=locate(layer.node),
            seen=f"K = {depth}, |a| ≤ {widest}, |bias| ≤ {bias}: up to {largest}",
            expected=f"at most {_INT32_MAX}",
            next_step="use fewer bits for the activations or the weights of this layer",
        )


def _widest(program: Program, node: fx.Node) -> int:
    """Return the largest |code − zero point| that a dequantize node can see."""
    low, high = _range(node)
    zero_point = _parameter(program, argument(node, 2))
    if zero_point is None:
        return high - low
    if zero_point.numel() == 0:
        return 0
    least, most = (int(bound) for bound in zero_point.aminmax())
    return max(high - least, most - low)


def _largest_sum(program: Program, layer: Layer, weight: fx.Node) -> int:
    """Return the largest sum of |code − zero point| over the weights of one output."""
    codes = _parameter(program, argument(weight, 0))
    assert codes is not None
    scale, zero_point = (_parameter(program, argument(weight, position)) for position in (1, 2))
    if scale is None or zero_point is None:  # parameters that depend on the inputs
        return codes.numel() // codes.shape[layer.operator.out_axis] * _widest(program, weight)
    axis, group_size = argument(weight, 3), argument(weight, 4)
    assert axis is None or isinstance(axis, int)
    assert group_size is None or isinstance(group_size, int)
    steps = affine.dequantize(codes, torch.ones_like(scale), zero_point, axis, group_size).abs().double()
    out_axis = layer.operator.out_axis % steps.dim()
    if out_axis == 1 and layer.groups > 1:  # a transposed convolution: each group sums its own inputs
        steps, out_axis = steps.unflatten(0, (layer.groups, -1)).movedim(0, 1).flatten(1, 2), 1
    return int(steps.sum([axis for axis in range(steps.dim()) if axis != out_axis]).max())


def _largest_bias(program: Program, node: fx.Node) -> int:
    source = argument(node, 0)
    if not _is(node, "dequantize") or not isinstance(source, fx.Node) or source.op != "get_attr":
        return 0
    codes = program.tensor(source)
    return max(abs(int(bound)) for bound in codes.aminmax()) if codes.numel() else 0


def _check_promise(program: Program, layer: Layer, promise: Sparsity) -> None:
    sources = constant_sources(layer.weight_value)
    if sources is None:
        return
    tensors = [*(program.tensor(node) for node in sources), promise.mask]
    structure = f"{layer.weight_value.target}:{layer.weight_value.args}:{promise.pattern}"
    if _is_checked(layer.node, "sparsity_checked", tensors, structure):
        return
    value = constant_value(program, layer.weight_value)
    assert value is not None
    broken = promise.violations(value) or _pattern_violation(layer, promise)
    if broken:
        raise VerifyError(
            f"The weight of '{layer.name}' no longer has the sparsity that was promised for it.",
            where=f"tensor @{layer.weight_name}, {locate(layer.node)}",
            seen=broken,
            expected=str(promise),
            next_step="multiply with the mask again, or prune after this pass",
        )
    _set_checked(layer.node, "sparsity_checked", tensors, structure)


def _pattern_violation(layer: Layer, promise: Sparsity) -> str | None:
    entry, pattern = layer.operator, promise.pattern
    if pattern.is_unstructured:
        return None
    obstacle = pattern.obstacle(tuple(promise.mask.shape), entry.out_axis, entry.in_axis, layer.groups)
    if obstacle:
        return f"a mask without the pattern {pattern}: {obstacle}"
    held = pattern.holds(as_matrix(promise.mask, entry.out_axis, entry.in_axis))
    return None if held else f"a mask without the pattern {pattern}"


def _is_pruned(program: Program, layer: Layer) -> bool:
    if layer.weight_name in program.sparsity:
        return True
    value = layer.weight_value
    while value is not layer.weight:
        if _is(value, "mask"):
            return True
        source = argument(value, 0)
        assert isinstance(source, fx.Node)
        value = source
    return False


def _scale_shape(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape that stored parameters must have, or None where a symbolic size decides."""
    source = argument(node, 0)
    recorded = source.meta.get("val") if isinstance(source, fx.Node) else None
    if recorded is None:
        return None
    shape = scale_shape(recorded.shape, argument(node, 3), argument(node, 4))  # type: ignore[arg-type]
    return shape if all(isinstance(size, int) for size in shape) else None


def _range(node: fx.Node) -> tuple[int, int]:
    qmin, qmax = argument(node, 5), argument(node, 6)
    assert isinstance(qmin, int) and isinstance(qmax, int)
    return qmin, qmax


def _is(node: object, *names: str) -> bool:
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    target = node.target
    return target.namespace == "sqcompile" and target._schema.name.removeprefix("sqcompile::") in names


def _is_checked(node: fx.Node, slot: str, tensors: Sequence[torch.Tensor], rest: str) -> bool:
    """Whether these very tensors, unwritten since, passed the check that `slot` names at this node."""
    references, key = node.meta.get(slot, ((), None))
    # By reference and not by address alone: a new tensor can lie where a freed one was.
    same = len(references) == len(tensors) and all(
        reference() is tensor for reference, tensor in zip(references, tensors, strict=True)
    )
    return same and key == _state(tensors, rest)


def _set_checked(node: fx.Node, slot: str, tensors: Sequence[torch.Tensor], rest: str) -> None:
    node.meta[slot] = tuple(weakref.ref(tensor) for tensor in tensors), _state(tensors, rest)


def _state(tensors: Sequence[torch.Tensor], rest: str) -> str:
    return "|".join([*map(tensor_identity, tensors), rest])
