"""What lowering works on: the plan under construction, and what has become of each node so far."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx

from sqcompile.backends.native.file import as_size
from sqcompile.backends.native.kernel_times import KernelTimes, kernel_times
from sqcompile.backends.native.lower.choice import Candidate, Product, Workload, workload_of
from sqcompile.backends.native.plan import Plan, Shape, Size, SymbolRange, Value
from sqcompile.operators.table import argument
from sqcompile.program import Program
from sqcompile.text import module_path, symbol_names

# Element types that values of a plan have. What a program computes in bfloat16 is computed in float32, without
# rounding in between; its large weights stay bfloat16.
DTYPES: dict[torch.dtype, str] = {
    torch.float32: "f32",
    torch.bfloat16: "f32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "boolean",
}

# Of dimensions without an upper bound; products of several still fit in 64 bits.
_LARGEST_SIZE = 2**31 - 1

Results = list[Value]


class Lowering:
    """A plan under construction.

    Attributes:
        program: The program that is lowered.
        exact: Whether products round nothing that the program does not round.
        plan: Steps so far.
        notes: What the report should say about the choices made.
        shared: Whatever several layers share, by a key of their own.
        rounded: Layers whose activation is rounded to 8 bits though the program does not say so.
        products: Products with stored weights, by layer.
    """

    def __init__(self, program: Program, *, exact: bool = False) -> None:
        self.program = program
        self.exact = exact
        self.plan = Plan(symbols=_symbols(program))
        self.notes: list[str] = []
        self.shared: dict[Any, Any] = {}
        self.rounded = 0
        self.products: dict[str, Product] = {}
        self._workloads: dict[Size, Workload] = {}
        self._fixed = constant_nodes(program)
        self._values: dict[fx.Node, Value | Results] = {}
        self._constants: dict[fx.Node, torch.Tensor | None] = {}
        self._name = ""

    # --- nodes -----------------------------------------------------------------------------------

    def begin(self, node: fx.Node) -> None:
        """Say which node the next steps come from."""
        self._name = module_path(node) or node.name

    def define(self, node: fx.Node, result: Value | Results) -> None:
        """Say what a node has become."""
        self._values[node] = result

    @property
    def times(self) -> KernelTimes:
        """What products take on this machine."""
        times, remark = kernel_times()
        if remark and remark not in self.notes:
            self.notes.append(remark)
        return times

    def workload(self, rows: Size) -> Workload:
        """Return what a product of so many rows of activations has to do."""
        if rows not in self._workloads:
            self._workloads[rows] = workload_of(self.program, rows)
        return self._workloads[rows]

    def add_product(
        self,
        form: str,
        choice: Candidate,
        n: int,
        k: int,
        rows: Size,
        remark: str = "",
        share: float = 1.0,
    ) -> None:
        """Say that the node of the next steps is a product with a stored weight."""
        cached = self.workload(rows).cached
        self.products[self._name] = Product(form, choice, n, k, rows, cached, remark, share)

    def is_defined(self, node: fx.Node) -> bool:
        """Whether a node has become something already."""
        return node in self._values

    def value(self, item: object, dtype: str | None = None) -> Value:
        """Return the value of an argument: a node, or a number that becomes a constant.

        Args:
            item: The argument.
            dtype: The element type that is wanted; None for a node leaves its own.
        """
        if not isinstance(item, fx.Node):
            return self.number(item, dtype or "f32")
        if is_size(item):
            return self.number(self.size(item), dtype or "i64")
        if item not in self._values:
            tensor = self.constant(item)
            assert tensor is not None, f"%{item.name} is not lowered yet"
            self._values[item] = self.stored(tensor)
        value = self._values[item]
        assert isinstance(value, Value)
        return value if dtype is None else self.cast(value, dtype)

    def values(self, node: fx.Node) -> Results:
        """Return what a node with several results has become."""
        value = self._values[node]
        assert isinstance(value, list)
        return value

    def constant(self, item: object) -> torch.Tensor | None:
        """Return the tensor that a node always is, or None if it depends on a call.

        Nodes are computed in PyTorch when they are first asked for, so that what only a quantized layer
        uses is never computed.
        """
        if not isinstance(item, fx.Node):
            return None
        if item not in self._constants:
            self._constants[item] = self._compute(item)
        return self._constants[item]

    def is_constant(self, item: object) -> bool:
        """Whether an argument never depends on a call."""
        return not isinstance(item, fx.Node) or item in self._fixed

    def _compute(self, node: fx.Node) -> torch.Tensor | None:
        if not self.is_constant(node):
            return None
        if node.op == "get_attr":
            return self.program.tensor(node).detach()
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.constant)
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        return result if isinstance(result, torch.Tensor) else None

    # --- sizes -----------------------------------------------------------------------------------

    def size(self, item: object) -> Size:
        """Return an integer argument: a number, or an expression of symbols."""
        if isinstance(item, fx.Node):
            item = item.meta["val"]
        if isinstance(item, torch.SymInt):
            item = item.node.expr
        assert isinstance(item, (int, sympy.Expr))
        return as_size(item)

    def shape(self, node: fx.Node) -> Shape:
        """Return the recorded shape of a node."""
        return tuple(self.size(size) for size in tensor_of(node).shape)

    # --- steps -----------------------------------------------------------------------------------

    def steps(
        self,
        operation: str,
        inputs: Iterable[Value | None],
        outputs: Sequence[tuple[str, Shape]],
        ints: Iterable[Size] = (),
        floats: Iterable[float] = (),
    ) -> Results:
        """Add a step with any number of outputs."""
        return self.plan.add_step(operation, inputs, outputs, ints, floats, self._name)

    def step(
        self,
        operation: str,
        inputs: Iterable[Value | None],
        dtype: str,
        shape: Iterable[Size],
        ints: Iterable[Size] = (),
        floats: Iterable[float] = (),
    ) -> Value:
        """Add a step with one output."""
        return self.steps(operation, inputs, [(dtype, tuple(shape))], ints, floats)[0]

    def stored(self, tensor: torch.Tensor, layout: str = "plain") -> Value:
        """Return a tensor as a constant of the plan."""
        tensor = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
        return self.plan.add_constant(tensor.detach().contiguous().numpy(), layout)

    def number(self, number: Any, dtype: str) -> Value:
        """Return a number as a constant without dimensions; symbolic ones are computed."""
        number = as_size(number) if isinstance(number, (int, sympy.Expr)) else number
        if isinstance(number, sympy.Expr):
            value = self.step("iota", (), "i64", (1,), (number, 0))
            return self.cast(self.reshape(value, ()), dtype)
        from sqcompile.backends.native.plan import NUMPY_DTYPES

        return self.plan.add_constant(np.array(number, NUMPY_DTYPES[dtype]))

    def cast(self, value: Value, dtype: str) -> Value:
        """Return a value with another element type."""
        return value if value.dtype == dtype else self.step("cast", [value], dtype, value.shape)

    def reshape(self, value: Value, shape: Iterable[Size]) -> Value:
        """Return a value with another shape; the engine copies only where strides cannot say it."""
        shape = tuple(shape)
        return value if value.shape == shape else self.step("reshape", [value], value.dtype, shape)

    def permute(self, value: Value, order: Sequence[int]) -> Value:
        """Return a view with dimension order[i] in place i."""
        if list(order) == list(range(value.rank)):
            return value
        return self.step("permute", [value], value.dtype, [value.shape[axis] for axis in order], order)

    def expand(self, value: Value, shape: Iterable[Size]) -> Value:
        """Return a view that repeats what has size 1, or is not there."""
        shape = tuple(shape)
        return value if value.shape == shape else self.step("expand", [value], value.dtype, shape)

    def slice(self, value: Value, axis: int, first: Size, length: Size, step: int = 1) -> Value:
        """Return a view of part of a dimension."""
        if first == 0 and length == value.shape[axis] and step == 1:
            return value
        shape = [*value.shape[:axis], length, *value.shape[axis + 1 :]]
        return self.step("slice", [value], value.dtype, shape, (axis, first, step))

    def contiguous(self, value: Value) -> Value:
        """Return a value in row-major order; the engine copies only what is not."""
        if value.kind != "computed":
            return value
        return self.step("contiguous", [value], value.dtype, value.shape)

    def binary(self, operation: str, a: Value, b: Value, dtype: str | None = None) -> Value:
        """Add an elementwise step on two values of one type, with broadcasting."""
        return self.step(operation, [a, b], dtype or a.dtype, broadcast(a.shape, b.shape))


Lower = Callable[[Lowering, fx.Node], Value | Results]

TABLE: dict[object, Lower] = {}
"""How each operator becomes steps."""

CHECKS: dict[object, Callable[[fx.Node], str | None]] = {}
"""Why a call of an operator cannot become steps, for operators of which only some can."""


def lowers(
    *targets: object, check: Callable[[fx.Node], str | None] | None = None
) -> Callable[[Lower], Lower]:
    """Register how operators become steps."""

    def register(lower: Lower) -> Lower:
        for target in targets:
            TABLE[target] = lower
            if check is not None:
                CHECKS[target] = check
        return lower

    return register


def tensor_of(node: fx.Node) -> torch.Tensor:
    """Return the recorded value of a node that is a tensor."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def dtype_of(node: fx.Node) -> str:
    """Return the plan's name of a node's element type."""
    return DTYPES[tensor_of(node).dtype]


def is_float(node: fx.Node) -> bool:
    """Whether a node is a tensor of numbers that the engine computes in float32."""
    return DTYPES.get(tensor_of(node).dtype) == "f32"


def constant_nodes(program: Program) -> set[fx.Node]:
    """Return the nodes that never depend on a call: PyTorch computes them when the program is lowered."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            found.add(node)
        elif (
            node.op == "call_function"
            and isinstance(node.target, torch._ops.OpOverload)
            and torch.Tag.nondeterministic_seeded not in node.target.tags
            and all(source in found for source in node.all_input_nodes)
        ):
            found.add(node)
    return found


def is_size(node: fx.Node) -> bool:
    """Whether a node is a number computed from sizes, which are known before anything runs."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt)) and not isinstance(
        node.meta.get("val"), bool
    )


def int_argument(node: fx.Node, position: int, default: int | None = None) -> int:
    """Return an argument that is a whole number."""
    value = argument(node, position, default)
    assert isinstance(value, int), f"argument {position} of %{node.name}"
    return value


def axis_argument(node: fx.Node, position: int, rank: int, default: int | None = None) -> int:
    """Return an argument that is a dimension, counted from the front."""
    axis = int_argument(node, position, default)
    return axis % rank if rank else 0


def node_argument(node: fx.Node, position: int) -> fx.Node:
    """Return an argument that is a node."""
    value = argument(node, position)
    assert isinstance(value, fx.Node), f"argument {position} of %{node.name}"
    return value


def broadcast(a: Shape, b: Shape) -> Shape:
    """Return the common shape; where neither size is 1, both are the same at run time."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    added = len(longer) - len(shorter)
    return (
        *longer[:added],
        *(other if size == 1 else size for size, other in zip(longer[added:], shorter, strict=True)),
    )


def product(sizes: Iterable[Size]) -> Size:
    """Return the product of sizes."""
    return as_size(math.prod(sizes))


def is_getitem(node: fx.Node) -> bool:
    """Whether a node takes one of several results."""
    return node.target is operator.getitem


def _symbols(program: Program) -> dict[sympy.Symbol, SymbolRange]:
    names = symbol_names(program)
    found: dict[sympy.Symbol, SymbolRange] = {}
    for node in program.placeholders:
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            expression = size.node.expr if isinstance(size, torch.SymInt) else size
            if isinstance(expression, sympy.Symbol) and expression not in found:
                name = names.get(str(expression), str(expression))
                low, high = program.signature.dims.get(name, (0, None))
                found[expression] = SymbolRange(name, low, _LARGEST_SIZE if high is None else high)
    return found
