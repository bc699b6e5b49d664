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
from sqcompile.infer import fake_mode_of, fake_tensor, infer_node
from sqcompile.levels import Level
from sqcompile.program import Program
from sqcompile.quantization.format import storage_dtype
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
    count = 0
    for node in list(program.graph.nodes):
        name = operator_name(node)
        if name is None:
            continue
        convert = _CONVERSIONS.get(name)
        if convert is None:
            raise _unsupported(node, name, f"one of {', '.join(sorted(_CONVERSIONS))}")
        convert(_Rewriter(program, node))
        count += 1
    if count:
        program.graph.eliminate_dead_code()
        program.recompile()
        program.level = Level.QDQ
    return count


def operator_name(node: fx.Node) -> str | None:
    """Return the name of a `quantized_decomposed` operator without its namespace, else None."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._schema.name
    return name.removeprefix(_NAMESPACE) if name.startswith(_NAMESPACE) else None


class _Rewriter:
    """One operator that is being replaced: its arguments by name, and how to make new nodes."""

    def __init__(self, program: Program, node: fx.Node) -> None:
        self.program = program
        self.node = node
        self._mode = fake_mode_of(program)
        assert isinstance(node.target, torch._ops.OpOverload)
        self.arguments: dict[str, Any] = {}
        for index, parameter in enumerate(node.target._schema.arguments):
            given = node.args[index] if index < len(node.args) else node.kwargs.get(parameter.name)
            self.arguments[parameter.name] = given

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

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

    def stored(
        self, suffix: str, value: Any, dtype: torch.dtype, shape: tuple[int, ...] | None = None
    ) -> fx.Node:
        """Return a node of a stored tensor: an argument that is a number, or a stored tensor converted."""
        if isinstance(value, fx.Node):
            if value.op != "get_attr":
                return self._converted(value, dtype)
            tensor = self.program.tensor(value)
            if tensor.dtype is dtype and (shape is None or tuple(tensor.shape) == shape):
                return value
            tensor = tensor.detach().to(dtype)
        else:
            tensor = torch.tensor(value, dtype=dtype)
        name = self.program.free_name(f"{self._base_name()}_{suffix}")
        self.program.set_tensor(name, tensor if shape is None else tensor.reshape(shape))
        with self.program.graph.inserting_before(self.node):
            node = self.program.graph.get_attr(name)
        node.meta["val"] = fake_tensor(self.program.tensor(name), self._mode)
        return node

    def replace(self, operator: torch._ops.OpOverload, *args: Any, dtype: torch.dtype | None = None) -> None:
        """Put `operator(*args)` in the node's place, converted to `dtype` if that is another one."""
        new = self.call(operator, *args)
        if dtype is not None and new.meta["val"].dtype is not dtype:
            new = self.call(torch.ops.aten.to.dtype, new, dtype)
        self.node.replace_all_uses_with(new)
        self.program.graph.erase_node(self.node)

    def call(self, operator: torch._ops.OpOverload, *args: Any) -> fx.Node:
        """Insert a call before the node, with the node's origin and its own recorded value."""
        with self.program.graph.inserting_before(self.node):
            new = self.program.graph.call_function(operator, args)
        new.meta = {key: value for key, value in self.node.meta.items() if key not in ("val", "tensor_meta")}
        self.record(new)
        return new

    def record(self, node: fx.Node) -> None:
        """Record the value that a node has now."""
        node.meta.pop("tensor_meta", None)
        node.meta["val"] = infer_node(node, self._mode)

    def _converted(self, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        recorded = value.meta.get("val")
        if isinstance(recorded, torch.Tensor) and recorded.dtype is dtype:
            return value
        return self.call(torch.ops.aten.to.dtype, value, dtype)

    def _number(self, name: str) -> int:
        value = self[name]
        if isinstance(value, fx.Node):  # the overload `tensor2` stores even the range in tensors
            return int(self.program.tensor(value).item())
        return int(value)

    def _base_name(self) -> str:
        value = self["input"]
        return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else self.node.name


def _quantize(rewriter: _Rewriter, axis: int | None, group_size: int | None) -> None:
    qmin, qmax = rewriter.code_range()
    scale, zero_point = _parameters(rewriter, axis)
    rewriter.replace(
        torch.ops.sqcompile.quantize.default,
        rewriter["input"],
        scale,
        zero_point,
        axis,
        group_size,
        qmin,
        qmax,
    )


def _dequantize(rewriter: _Rewriter, axis: int | None, group_size: int | None) -> None:
    qmin, qmax = rewriter.code_range()
    scale, zero_point = _parameters(rewriter, axis)
    dtype = rewriter.arguments.get("out_dtype") or rewriter.arguments.get("output_dtype")
    rewriter.replace(
        torch.ops.sqcompile.dequantize.default,
        rewriter["input"],
        scale,
        zero_point,
        axis,
        group_size,
        qmin,
        qmax,
        dtype=dtype,
    )


def _parameters(rewriter: _Rewriter, axis: int | None) -> tuple[fx.Node, fx.Node]:
    """Return the nodes of scale (float32) and zero point (int32), of the shape that the granularity has."""
    arguments = rewriter.arguments
    # Per tensor, a stored scale may have one element and any shape; ours is a scalar.
    shape = () if axis is None else None
    scale = rewriter.stored("scale", arguments.get("scale", arguments.get("scales")), torch.float32, shape)
    zero = arguments.get("zero_point", arguments.get("zero_points"))
    if zero is None:
        zero = torch.zeros(scale.meta["val"].shape).tolist()
    zero_point = rewriter.stored("zero_point", zero, torch.int32, shape)
    if axis is None:
        scale, zero_point = (_scalar(rewriter, value) for value in (scale, zero_point))
    return scale, zero_point


def _scalar(rewriter: _Rewriter, value: fx.Node) -> fx.Node:
    if value.meta["val"].dim() == 0:
        return value
    return rewriter.call(torch.ops.aten.reshape.default, value, [])


def _choose(rewriter: _Rewriter, symmetric: bool) -> None:
    qmin, qmax = rewriter.code_range()
    users = list(rewriter.node.users)
    rewriter.replace(
        torch.ops.sqcompile.dynamic_scale.default, rewriter["input"], None, None, qmin, qmax, symmetric
    )
    for user in users:  # getitem: the recorded values were of float64 [1] and int64 [1]
        rewriter.record(user)


def _unsupported(node: fx.Node, seen: str, expected: str) -> TraceError:
    return TraceError(
        "The program holds a quantized operator that has no counterpart here.",
        where=locate(node),
        seen=f"{_NAMESPACE}{seen}" if "codes" not in seen else seen,
        expected=expected,
        next_step="hand in the float model, and quantize it with sqcompile's own passes",
    )


_CONVERSIONS: dict[str, Callable[[_Rewriter], None]] = {
    "quantize_per_tensor": lambda r: _quantize(r, None, None),
    "dequantize_per_tensor": lambda r: _dequantize(r, None, None),
    "quantize_per_channel": lambda r: _quantize(r, r["axis"], None),
    "dequantize_per_channel": lambda r: _dequantize(r, r["axis"], None),
    "quantize_per_channel_group": lambda r: _quantize(r, -1, r["group_size"]),
    "dequantize_per_channel_group": lambda r: _dequantize(r, -1, r["group_size"]),
    "quantize_per_token": lambda r: _quantize(r, -1, -1),
    "dequantize_per_token": lambda r: _dequantize(r, -1, -1),
    "choose_qparams": lambda r: _choose(r, symmetric=False),
    "choose_qparams_symmetric": lambda r: _choose(r, symmetric=True),
}
