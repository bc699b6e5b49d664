"""What is known of the values of a plan that depend on positions only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqcompile.backends.native.plan import Plan, Shape, Step, Value
from sqcompile.positions import (
    LOW,
    Affine,
    Band,
    Known,
    affine,
    as_boolean,
    both,
    combined,
    compared,
    cumulated,
    indexed,
    joined,
    match_dimensions,
    moved,
    multiplied,
    negated,
    raised,
    sliced,
    without_ones,
)

_INTEGERS = ("i64", "i32", "boolean")


class Positions:
    """What is known of the values of a plan.

    Args:
        plan: The plan.
        shapes: The shape of each value, by its number.
        inputs: What is known of inputs, by value.
    """

    def __init__(self, plan: Plan, shapes: Mapping[int, Shape], inputs: Mapping[Value, Known]) -> None:
        self.plan = plan
        self.shapes = shapes
        self._known: dict[int, Known] = {}
        self._makers: dict[int, Step] = {}
        self._late: dict[int, float | None] = {}
        for value in plan.values:
            if value.kind == "constant" and value.dtype in _INTEGERS and value.layout == "plain":
                array = plan.tensors[value.source]
                if array.size and (array == array.flat[0]).all():
                    self._known[value.index] = Affine((), int(array.flat[0]))
        for value, known in inputs.items():
            self._known[value.index] = known
        for step in plan.steps:
            for output in step.outputs:
                self._makers[output.index] = step
            rule = _RULES.get(step.operator)
            if rule is None or len(step.outputs) != 1 or step.outputs[0].dtype not in _INTEGERS:
                continue
            found = rule(self, step)
            found = without_ones(found, shapes[step.outputs[0].index])
            if found is not None:
                self._known[step.outputs[0].index] = found

    def of(self, value: Value | None) -> Known | None:
        """Return what is known of a value, or None."""
        return None if value is None else self._known.get(value.index)

    def late(self, value: Value) -> float | None:
        """Return the number that all elements [.., query, key] with key > query are, or are below, or None."""
        if value.index not in self._late:
            self._late[value.index] = self._find_late(value)
        return self._late[value.index]

    def _find_late(self, value: Value) -> float | None:
        known = self.of(value)
        if isinstance(known, Affine):
            return known.number
        if isinstance(known, Band):
            if (known.query, known.key) != (value.rank - 2, value.rank - 1):
                return None
            if known.high is None:
                return 1 if known.low is not None and known.low <= 1 else None
            return 0 if known.high <= 0 else None
        if value.kind == "constant":
            array = self.plan.tensors[value.source]
            return float(array.flat[0]) if array.size == 1 and value.layout == "plain" else None
        step = self._makers.get(value.index)
        if step is None or any(item is None for item in step.inputs):
            return None
        items = [item for item in step.inputs if item is not None]
        match step.operator:
            case "cast" | "contiguous" | "dense_rows":
                return self.late(items[0])
            case "reshape" | "expand":
                shape = self.shapes[items[0].index]
                same = shape[-2:] == self.shapes[value.index][-2:] and value.rank >= 2
                return self.late(items[0]) if same or all(size == 1 for size in shape) else None
            case "logical_not":
                inner = self.late(items[0])
                return None if inner is None else float(not inner)
            case "bit_and":
                found = [self.late(item) for item in items]
                return 0 if 0 in found else None if None in found else 1
            case "where":
                condition = self.late(items[0])
                return None if condition is None else self.late(items[1 if condition else 2])
            case "add":
                found = [self.late(item) for item in items]
                low = [number for number in found if number is not None and number <= LOW]
                return min(low) if low else None
            case "softmax":
                inner = self.late(items[0])
                return 0 if inner is not None and inner <= LOW else None
        return None

    # --- one rule a kind of operator --------------------------------------------------------------

    def _iota(self, step: Step) -> Known | None:
        first, slope = step.ints
        return affine({0: slope}, first) if isinstance(first, int) and isinstance(slope, int) else None

    def _same(self, step: Step) -> Known | None:
        return self.of(step.inputs[0])

    def _reshape(self, step: Step) -> Known | None:
        source = step.inputs[0]
        assert source is not None
        found = match_dimensions(self.shapes[source.index], self.shapes[step.outputs[0].index])
        return moved(self.of(source), {old: new for new, old in (found or {}).items()})

    def _permute(self, step: Step) -> Known | None:
        return moved(self.of(step.inputs[0]), {int(old): new for new, old in enumerate(step.ints)})

    def _expand(self, step: Step) -> Known | None:
        source = step.inputs[0]
        assert source is not None
        return self._raised(source, step)

    def _slice(self, step: Step) -> Known | None:
        axis, first, stride = step.ints
        return sliced(self.of(step.inputs[0]), axis, first, stride) if isinstance(axis, int) else None

    def _cast(self, step: Step) -> Known | None:
        known = self.of(step.inputs[0])
        if step.outputs[0].dtype == "boolean":
            return as_boolean(known)
        return known if isinstance(known, Affine) else None

    def _raised(self, item: Value | None, step: Step) -> Known | None:
        """Return an operand with the dimensions of the result."""
        return None if item is None else raised(self.of(item), item.rank, step.outputs[0].rank)

    def _operands(self, step: Step) -> tuple[Affine, Affine] | None:
        a, b = (self._raised(item, step) for item in step.inputs)
        return (a, b) if isinstance(a, Affine) and isinstance(b, Affine) else None

    def _sum(self, step: Step) -> Known | None:
        operands = self._operands(step)
        return None if operands is None else combined(*operands, 1 if step.operator == "add" else -1)

    def _product(self, step: Step) -> Known | None:
        operands = self._operands(step)
        return None if operands is None else multiplied(*operands)

    def _compare(self, step: Step) -> Known | None:
        operands = self._operands(step)
        return None if operands is None else compared(step.operator, *operands)

    def _and(self, step: Step) -> Known | None:
        if step.outputs[0].dtype != "boolean":
            return None
        a, b = (self._raised(item, step) for item in step.inputs)
        return both(a, b)

    def _not(self, step: Step) -> Known | None:
        return negated(self.of(step.inputs[0]))

    def _where(self, step: Step) -> Known | None:
        condition = self.of(step.inputs[0])
        if not isinstance(condition, Affine) or condition.number is None:
            return None
        return self._raised(step.inputs[1 if condition.number else 2], step)

    def _cat(self, step: Step) -> Known | None:
        axis = step.ints[0]
        assert isinstance(axis, int)
        items = [item for item in step.inputs if item is not None]
        return joined([(self.of(item), self.shapes[item.index][axis]) for item in items], axis)

    def _cumsum(self, step: Step) -> Known | None:
        return cumulated(self.of(step.inputs[0]), step.outputs[0].rank - 1)

    def _index(self, step: Step) -> Known | None:
        first = step.ints[0]
        assert isinstance(first, int)
        indices = [(self.of(item), item.rank) for item in step.inputs[1:] if item is not None]
        return indexed(self.of(step.inputs[0]), first, indices)

    def _any(self, step: Step) -> Known | None:
        """Of equal elements, and there is at least one."""
        known = self.of(step.inputs[0])
        return known if isinstance(known, Affine) and known.number is not None else None


_RULES: dict[str, Any] = {
    "iota": Positions._iota,
    "contiguous": Positions._same,
    "dense_rows": Positions._same,
    "reshape": Positions._reshape,
    "permute": Positions._permute,
    "expand": Positions._expand,
    "slice": Positions._slice,
    "cast": Positions._cast,
    "add": Positions._sum,
    "sub": Positions._sum,
    "mul": Positions._product,
    "eq": Positions._compare,
    "ne": Positions._compare,
    "lt": Positions._compare,
    "le": Positions._compare,
    "bit_and": Positions._and,
    "logical_not": Positions._not,
    "where": Positions._where,
    "cat": Positions._cat,
    "cumsum": Positions._cumsum,
    "index": Positions._index,
    "reduce_any": Positions._any,
    "reduce_all": Positions._any,
    "reduce_max": Positions._any,
    "reduce_min": Positions._any,
}
