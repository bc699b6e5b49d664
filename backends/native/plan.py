"""A plan: what the C++ engine executes, before it becomes a file.

A flat list of steps on values. Sizes are integers or sympy expressions in the program's symbols; the engine
evaluates them when it sees a call. `cpp/engine/operators.inc` lists the operators, and beside each one's
`prepare` in `cpp/engine/ops/` stand its operands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import sympy
from numpy.typing import NDArray

Size: TypeAlias = int | sympy.Expr
Shape: TypeAlias = tuple[Size, ...]

# The engine's name of each element type, and NumPy's.
NUMPY_DTYPES: dict[str, Any] = {
    "f32": np.float32,
    "i64": np.int64,
    "i32": np.int32,
    "i8": np.int8,
    "u8": np.uint8,
    "boolean": np.bool_,
    "f16": np.float16,
    "u64": np.uint64,
    "bf16": np.uint16,  # the upper half of a float32; NumPy has no such type
}
DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in NUMPY_DTYPES.items()}

# Constants below this size are compared by content, so that equal ones are stored once.
_COMPARED_BYTES = 4096


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the plan.

    Attributes:
        index: Its number.
        dtype: Element type, as in `NUMPY_DTYPES`.
        shape: Sizes.
        kind: `input`, `constant` or `computed`.
        source: Number of the input or of the tensor.
        layout: How a constant's bytes are arranged: `plain`, or a kernel's packed form.
    """

    index: int
    dtype: str
    shape: Shape
    kind: str
    source: int = 0
    layout: str = "plain"

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


@dataclass(frozen=True, eq=False)
class Step:
    """One operator and its operands."""

    operator: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    ints: tuple[Size, ...] = ()
    floats: tuple[float, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class SymbolRange:
    """A size that a call decides: its name, and the sizes that it may have."""

    name: str
    low: int
    high: int


@dataclass
class Plan:
    """Steps, values, and the tensors that are stored with them.

    Attributes:
        symbols: What is known of each symbol in sizes.
        values: All values, by number.
        steps: Operators in the order of execution.
        tensors: Stored arrays.
        inputs: (name, value) of each tensor that a call passes.
        outputs: (name, value) of each tensor that a call returns.
        metadata: Text that is kept with the plan; the engine does not read it.
        generation: How the plan takes a text piece by piece, if it does.
    """

    symbols: dict[sympy.Symbol, SymbolRange] = field(default_factory=dict)
    values: list[Value] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    tensors: list[NDArray[Any]] = field(default_factory=list)
    inputs: list[tuple[str, Value]] = field(default_factory=list)
    outputs: list[tuple[str, Value]] = field(default_factory=list)
    metadata: str = ""
    generation: Generation | None = None
    _known: dict[tuple[Any, ...], Value] = field(default_factory=dict, repr=False)

    def add_input(self, name: str, dtype: str, shape: Shape) -> Value:
        """Add a tensor that a call passes."""
        value = self._add(dtype, shape, "input", len(self.inputs))
        self.inputs.append((name, value))
        return value

    def add_constant(self, array: NDArray[Any], layout: str = "plain") -> Value:
        """Add a stored array; equal small ones are one."""
        array = np.asarray(array, order="C")
        key: tuple[Any, ...] = (layout, array.dtype.str, array.shape)
        if array.nbytes <= _COMPARED_BYTES:
            key = (*key, array.tobytes())
            if key in self._known:
                return self._known[key]
        value = self._add(DTYPE_NAMES[array.dtype], array.shape, "constant", len(self.tensors), layout)
        self.tensors.append(array)
        if array.nbytes <= _COMPARED_BYTES:
            self._known[key] = value
        return value

    def share_constant(self, value: Value) -> Value:
        """Return a constant of a plan that has the same tensors as this one."""
        key: tuple[Any, ...] = ("shared", value.index)
        if key not in self._known:
            self._known[key] = self._add(value.dtype, value.shape, "constant", value.source, value.layout)
        return self._known[key]

    def add_step(
        self,
        operator: str,
        inputs: Iterable[Value | None],
        outputs: Sequence[tuple[str, Shape]],
        ints: Iterable[Size] = (),
        floats: Iterable[float] = (),
        name: str = "",
    ) -> list[Value]:
        """Add an operator; its outputs are of these types and shapes."""
        made = [self._add(dtype, shape, "computed") for dtype, shape in outputs]
        self.steps.append(Step(operator, tuple(inputs), tuple(made), tuple(ints), tuple(floats), name))
        return made

    def add_computed(self, dtype: str, shape: Shape) -> Value:
        """Add a value that a step will compute."""
        return self._add(dtype, shape, "computed")

    def add_shared(self, dtype: str, shape: Shape, source: int, layout: str) -> Value:
        """Add a constant whose tensor is stored already."""
        return self._add(dtype, shape, "constant", source, layout)

    def renumber(self, places: Mapping[int, int]) -> None:
        """Number values anew, without those that no step uses; tensor `source` is now `places[source]`."""
        renamed: dict[Value, Value] = {}
        old, self.values, self._known = self.values, [], {}

        def rename(value: Value) -> Value:
            if value not in renamed:
                source = places[value.source] if value.kind == "constant" else value.source
                renamed[value] = self._add(value.dtype, value.shape, value.kind, source, value.layout)
            return renamed[value]

        self.inputs = [(name, rename(value)) for name, value in self.inputs]
        used = {value for step in self.steps for value in (*step.inputs, *step.outputs)}
        used |= {value for _, value in self.outputs}
        for value in old:
            if value in used:
                rename(value)
        self.steps = [
            Step(
                step.operator,
                tuple(None if value is None else rename(value) for value in step.inputs),
                tuple(rename(value) for value in step.outputs),
                step.ints,
                step.floats,
                step.name,
            )
            for step in self.steps
        ]
        self.outputs = [(name, rename(value)) for name, value in self.outputs]

    def _add(self, dtype: str, shape: Shape, kind: str, source: int = 0, layout: str = "plain") -> Value:
        value = Value(len(self.values), dtype, tuple(shape), kind, source, layout)
        self.values.append(value)
        return value

    def without_dead_steps(self) -> Plan:
        """Return the plan with only what its outputs depend on, numbered anew."""
        needed = {value for _, value in self.outputs}
        kept: list[Step] = []
        for step in reversed(self.steps):
            if needed.isdisjoint(step.outputs):
                continue
            kept.append(step)
            needed.update(value for value in step.inputs if value is not None)
        result = Plan(symbols=self.symbols, metadata=self.metadata)
        renamed: dict[Value, Value] = {}
        for name, value in self.inputs:
            renamed[value] = result.add_input(name, value.dtype, value.shape)

        def rename(value: Value) -> Value:
            if value not in renamed:
                assert value.kind == "constant"
                renamed[value] = result.add_constant(self.tensors[value.source], value.layout)
            return renamed[value]

        for step in reversed(kept):
            inputs = [None if value is None else rename(value) for value in step.inputs]
            outputs = [(value.dtype, value.shape) for value in step.outputs]
            made = result.add_step(step.operator, inputs, outputs, step.ints, step.floats, step.name)
            renamed.update(zip(step.outputs, made, strict=True))
        result.outputs = [(name, rename(value)) for name, value in self.outputs]
        return result


@dataclass(frozen=True)
class Generation:
    """A plan that continues texts: of each call's tokens it returns the logits of each row's last one.

    Attributes:
        plan: Its tensors are those of the plan for whole sequences. Inputs: `tokens` [1, tokens], one row's
            behind the other's; `positions` [tokens] in their rows; `last` [rows], the place of each row's
            last token; `keys` [keys], the numbers from 0 on. Output: logits [rows, vocabulary].
        limit: Tokens that a row may have.
        vocabulary: Tokens that can be looked up; 0 if that is not known.
    """

    plan: Plan
    limit: int
    vocabulary: int


def common_name(names: Sequence[str]) -> str:
    """Return what steps of one module are called together: `model.layers.0.mlp.{gate_proj,up_proj}`."""
    places = [name.rpartition(".") for name in names]
    if len({place[0] for place in places}) > 1:
        return names[0]
    return f"{places[0][0]}{places[0][1]}{{{','.join(place[2] for place in places)}}}"


def names_of(name: str) -> list[str]:
    """Return the names that `common_name` put together, or the name itself."""
    before, brace, after = name.partition("{")
    if not brace or not after.endswith("}"):
        return [name]
    return [before + part for part in after[:-1].split(",")]
