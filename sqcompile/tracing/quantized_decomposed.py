"""Taking over programs that PyTorch's own quantization (PT2E, torchao) has made.

Such programs hold operators of the namespace `quantized_decomposed`. They are recognized by name, so
that nothing of `torch.ao` or `torchao` is imported here: who hands in such a program has done so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sqcompile.errors import TraceError
from sqcompile.levels import Level
from sqcompile.operators.table import argument
from sqcompile.program import Program
from sqcompile.quantization.format import storage_dtype
from sqcompile.rewrite import Rewriter
from sqcompile.text import locate

_NAMESPACE = "quantized_decomposed::"


def convert_quantized_decomposed(program: Program) -> int:
    """Replace `quantized_decomposed` operators by ours; the program's level becomes `QDQ`.

    The codes are the same, except where rounding is a tie: these operators multiply by 1 / scale, ours
    divide by the scale, as ONNX does. Dynamic scales follow our rule, which is ONNX's, too.

    Returns:
        How many operators were replaced.

    Raises:
        TraceError: If there is one without a counterpart here; the text names it.
    """
    edit = Rewriter(program)
    count = 0
    for node in list(program.graph.nodes):
        name = operator_name(node)
        if name is None:
            continue
        convert = _CONVERSIONS.get(name)
        if convert is None:
            raise _unsupported(node, f"{_NAMESPACE}{name}", f"one of {', '.join(sorted(_CONVERSIONS))}")
        convert(_Call(edit, node))
        count += 1
    if count:
        edit.finish()
        program.level = Level.QDQ
    return count


def operator_name(node: fx.Node) -> str | None:
    """Return the name of a `quantized_decomposed` operator without its namespace, else None."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._schema.name
    return name.removeprefix(_NAMESPACE) if name.startswith(_NAMESPACE) else None


class _Call:
    """One operator that is being replaced: its arguments by name, and what replaces it."""

    def __init__(self, edit: Rewriter, node: fx.Node) -> None:
        self.edit = edit
        self.node = node
        assert isinstance(node.target, torch._ops.OpOverload)
        names = [parameter.name for parameter in node.target._schema.arguments]
        self.arguments = {name: argument(node, index) for index, name in enumerate(names)}

    def __getitem__(self, names: str) -> Any:
        """Return an argument by its name, or by the first of `names` that the operator has."""
        return next((self.arguments[name] for name in names.split("|") if name in self.arguments), None)

    def code_range(self) -> tuple[int, int]:
        """Return (qmin, qmax), checking that our storage type for them is the one that was asked for."""
        qmin, qmax = self._number("quant_min"), self._number("quant_max")
        dtype = self["dtype"]
        if storage_dtype(qmin, qmax) is not dtype:
            raise _unsupported(
                self.node,
                f"codes {qmin}..{qmax} stored as {dtype}",
                f"{qmin}..{qmax} stored as {storage_dtype(qmin, qmax)}",
            )
        return qmin, qmax

    def parameter(self, names: str, suffix: str, dtype: torch.dtype, *, scalar: bool) -> fx.Node:
        """Return the node of a scale or zero point, with our type and shape."""
        value = self[names]
        if value is None:  # symmetric formats may leave the zero points out
            scales = self["scales"]
            value = torch.zeros(scales.meta["val"].shape)
        if isinstance(value, fx.Node) and value.op != "get_attr":
            return self._computed(value, dtype, scalar=scalar)
        tensor = self.edit.program.tensor(value) if isinstance(value, fx.Node) else torch.as_tensor(value)
        stored = tensor.detach().to(dtype)
        stored = stored.reshape(()) if scalar else stored
        if isinstance(value, fx.Node) and stored.shape == tensor.shape and tensor.dtype is dtype:
            return value
        source = self["input"]
        base = source.target if source.op == "get_attr" else self.node.name
        return self.edit.constant(f"{base}_{suffix}", stored, like=self.node)

    def replace(
        self, operator: torch._ops.OpOverload, *args: Any, dtype: torch.dtype | None = None
    ) -> fx.Node:
        """Put `operator(*args)` in the node's place, converted to `dtype` if that is another one."""
        with self.edit.before(self.node):
            new = self.edit.call(operator, *args, like=self.node)
            if dtype is not None and new.meta["val"].dtype is not dtype:
                new = self.edit.call(torch.ops.aten.to.dtype, new, dtype, like=self.node)
        self.node.replace_all_uses_with(new)
        self.edit.erase(self.node)
        return new

    def _computed(self, value: fx.Node, dtype: torch.dtype, *, scalar: bool) -> fx.Node:
        with self.edit.before(self.node):
            if value.meta["val"].dtype is not dtype:
                value = self.edit.call(torch.ops.aten.to.dtype, value, dtype, like=self.node)
            if scalar and value.meta["val"].dim() > 0:
                value = self.edit.call(torch.ops.aten.reshape.default, value, [], like=self.node)
        return value

    def _number(self, name: str) -> int:
        value = self[name]
        # The overload `tensor2` stores even the range in tensors.
        return int(self.edit.program.tensor(value).item() if isinstance(value, fx.Node) else value)


def _convert(call: _Call, operator: torch._ops.OpOverload, axis: int | None, group_size: int | None) -> None:
    qmin, qmax = call.code_range()
    scale = call.parameter("scale|scales", "scale", torch.float32, scalar=axis is None)
    zero_point = call.parameter("zero_point|zero_points", "zero_point", torch.int32, scalar=axis is None)
    dtype = call["out_dtype|output_dtype"]
    call.replace(operator, call["input"], scale, zero_point, axis, group_size, qmin, qmax, dtype=dtype)


def _quantize(call: _Call, axis: int | None, group_size: int | None) -> None:
    _convert(call, torch.ops.sqcompile.quantize.default, axis, group_size)


def _dequantize(call: _Call, axis: int | None, group_size: int | None) -> None:
    _convert(call, torch.ops.sqcompile.dequantize.default, axis, group_size)


def _choose(call: _Call, *, symmetric: bool) -> None:
    qmin, qmax = call.code_range()
    users = list(call.node.users)
    call.replace(torch.ops.sqcompile.dynamic_scale.default, call["input"], None, None, qmin, qmax, symmetric)
    for user in users:  # getitem: what it recorded was float64 [1] or int64 [1]
        call.edit.infer(user)


def _unsupported(node: fx.Node, seen: str, expected: str) -> TraceError:
    return TraceError(
        "The program holds a quantized operator that has no counterpart here.",
        where=locate(node),
        seen=seen,
        expected=expected,
        next_step="hand in the float model, and quantize it with sqcompile's own passes",
    )


_CONVERSIONS: dict[str, Callable[[_Call], None]] = {
    "quantize_per_tensor": lambda call: _quantize(call, None, None),
    "dequantize_per_tensor": lambda call: _dequantize(call, None, None),
    "quantize_per_channel": lambda call: _quantize(call, call["axis"], None),
    "dequantize_per_channel": lambda call: _dequantize(call, call["axis"], None),
    "quantize_per_channel_group": lambda call: _quantize(call, -1, call["group_size"]),
    "dequantize_per_channel_group": lambda call: _dequantize(call, -1, call["group_size"]),
    "quantize_per_token": lambda call: _quantize(call, -1, -1),
    "dequantize_per_token": lambda call: _dequantize(call, -1, -1),
    "choose_qparams": lambda call: _choose(call, symmetric=False),
    "choose_qparams_symmetric": lambda call: _choose(call, symmetric=True),
}
