"""What is known of the values of a program that depend on positions only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import sympy
import torch
from torch import fx

from sqcompile.attention import shape_of
from sqcompile.operators.fills import FILLS, fill_value
from sqcompile.operators.table import argument
from sqcompile.positions import (
    LOW,
    Affine,
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
from sqcompile.program import Program

aten = torch.ops.aten

_INTEGERS = (torch.int64, torch.int32, torch.bool)

Rule = Callable[["Positions", fx.Node], Known | None]


class Positions:
    """What is known of the values of a program.

    Attributes:
        limit: Positions that tables of positions have room for; None: no table ends.

    Args:
        program: The program.
        inputs: What is known of inputs, by node.
    """

    def __init__(self, program: Program, inputs: Mapping[fx.Node, Known]) -> None:
        self.program = program
        self.limit: int | None = None
        self._known: dict[fx.Node, Known] = dict(inputs)
        for node in program.graph.nodes:
            if node in self._known or not _is_integer(node):
                continue
            found = self._stored(node) if node.op == "get_attr" else self._derived(node)
            found = without_ones(found, node.meta["val"].shape)
            if found is not None:
                self._known[node] = found

    def of(self, item: object) -> Known | None:
        """Return what is known of a value: a node's, or a number's."""
        if isinstance(item, fx.Node):
            return self._known.get(item)
        return Affine((), int(item)) if isinstance(item, int) else None

    def seen(self, mask: fx.Node) -> Known | None:
        """Return which keys a mask lets a query see, of booleans or of what is added to scores."""
        if mask.meta["val"].dtype is torch.bool:
            return self.of(mask)
        source = mask.args[0] if mask.args else None
        match mask.target:
            case aten.where.self | aten.where.ScalarOther | aten.where.ScalarSelf | aten.where.Scalar:
                condition, chosen, other = (argument(mask, index) for index in range(3))
                numbers = self._number(chosen), self._number(other)
                if isinstance(condition, fx.Node) and None not in numbers:
                    known = raised(self.of(condition), _rank(condition), _rank(mask))
                    shown, hidden = numbers
                    if shown == 0 and hidden is not None and hidden <= LOW:
                        return known
                    if hidden == 0 and shown is not None and shown <= LOW:
                        return negated(known)
            case aten.expand.default | aten.expand_as.default if isinstance(source, fx.Node):
                return raised(self.seen(source), _rank(source), _rank(mask))
            case aten.unsqueeze.default | aten.view.default | aten.reshape.default if isinstance(
                source, fx.Node
            ):
                return _reshaped(self.seen(source), source, mask)
            case aten.clone.default | aten.contiguous.default | aten.alias.default | aten.to.dtype:
                return self.seen(source) if isinstance(source, fx.Node) else None
            case _:
                return self._one_number(mask)
        return None

    def _one_number(self, mask: fx.Node) -> Known | None:
        number = self._number(mask)
        return Affine((), 1) if number == 0 else None

    def _number(self, item: object) -> float | None:
        """Return the one number that all elements of a value are."""
        if isinstance(item, (int, float)):
            return float(item)
        if not isinstance(item, fx.Node):
            return None
        if item.op == "get_attr":
            stored = self.program.tensor(item)
            return float(stored) if stored.numel() == 1 else None
        if item.target in FILLS:
            filled = fill_value(item)
            return filled if isinstance(filled, (int, float)) else None
        return None

    def _stored(self, node: fx.Node) -> Known | None:
        """Return what is known of a stored tensor: equal elements, or a range along its last dimension."""
        stored = self.program.tensor(node).detach()
        if not stored.numel():
            return None
        first = int(stored.flatten()[0])
        if bool((stored == first).all()):
            return Affine((), first)
        length = stored.shape[-1] if stored.dim() else 1
        if stored.dtype is not torch.bool and stored.numel() == length:
            steps = torch.arange(length, dtype=stored.dtype)
            slope = int(stored.flatten()[1]) - first
            if bool((stored.flatten() == first + slope * steps).all()):
                return affine({stored.dim() - 1: slope}, first)
        return None

    def _derived(self, node: fx.Node) -> Known | None:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return None
        rule = _RULES.get(node.target)
        return None if rule is None else rule(self, node)

    # --- one rule a kind of operator --------------------------------------------------------------

    def _range(self, node: fx.Node) -> Known | None:
        first: object = 0 if node.target is aten.arange.default else argument(node, 0)
        step = argument(node, 2) if node.target is aten.arange.start_step else 1
        return affine({0: step}, first) if isinstance(first, int) and isinstance(step, int) else None

    def _fill(self, node: fx.Node) -> Known | None:
        number = fill_value(node)
        return Affine((), int(number)) if isinstance(number, int) else None

    def _same(self, node: fx.Node) -> Known | None:
        return self.of(node.args[0])

    def _cast(self, node: fx.Node) -> Known | None:
        known = self.of(node.args[0])
        if node.meta["val"].dtype is torch.bool:
            return as_boolean(known)
        return known if isinstance(known, Affine) else None

    def _reshape(self, node: fx.Node) -> Known | None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return _reshaped(self.of(source), source, node)

    def _transpose(self, node: fx.Node) -> Known | None:
        order = list(range(_rank(node)))
        a, b = (0, 1) if node.target is aten.t.default else (_axis(node, 1), _axis(node, 2))
        if len(order) > 1:
            order[a], order[b] = order[b], order[a]
        return moved(self.of(node.args[0]), {old: new for new, old in enumerate(order)})

    def _permute(self, node: fx.Node) -> Known | None:
        dims = argument(node, 1)
        assert isinstance(dims, (list, tuple))
        return moved(self.of(node.args[0]), {old % len(dims): new for new, old in enumerate(dims)})

    def _expand(self, node: fx.Node) -> Known | None:
        return self._raised(node.args[0], node)

    def _slice(self, node: fx.Node) -> Known | None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        axis, start, stride = _axis(node, 1), argument(node, 2), argument(node, 4, 1)
        known = sliced(self.of(source), axis, 0 if start is None else start, stride)
        if isinstance(start, int) and start < 0:
            return None
        size = shape_of(source)[axis]
        if known is not None and isinstance(size, int) and not isinstance(shape_of(node)[axis], int):
            self.limit = size if self.limit is None else min(self.limit, size)
        return known

    def _select(self, node: fx.Node) -> Known | None:
        axis, place = _axis(node, 1, _rank(node) + 1), argument(node, 2)
        known = self.of(node.args[0])
        if known is None or not isinstance(place, int) or place < 0:
            return None
        if not isinstance(known, Affine):
            return moved(known, {d: d - (d > axis) for d in range(_rank(node) + 1) if d != axis})
        rest = affine({d: s for d, s in known.slopes if d != axis}, known.offset + known.slope(axis) * place)
        return moved(rest, {d: d - (d > axis) for d in range(_rank(node) + 1) if d != axis})

    def _raised(self, item: object, node: fx.Node) -> Known | None:
        """Return an operand with the dimensions of the result."""
        return raised(self.of(item), _rank(item) if isinstance(item, fx.Node) else 0, _rank(node))

    def _operands(self, node: fx.Node) -> tuple[Affine, Affine] | None:
        a, b = (self._raised(argument(node, place), node) for place in (0, 1))
        return (a, b) if isinstance(a, Affine) and isinstance(b, Affine) else None

    def _add(self, node: fx.Node) -> Known | None:
        operands = self._operands(node)
        return None if operands is None or argument(node, 2, 1) != 1 else combined(*operands, 1)

    def _subtract(self, node: fx.Node) -> Known | None:
        operands = self._operands(node)
        if operands is None or argument(node, 2, 1) != 1:
            return None
        a, b = operands if node.target is not aten.rsub.Scalar else operands[::-1]
        return combined(a, b, -1)

    def _multiply(self, node: fx.Node) -> Known | None:
        operands = self._operands(node)
        return None if operands is None else multiplied(*operands)

    def _compare(self, node: fx.Node) -> Known | None:
        operands = self._operands(node)
        if operands is None:
            return None
        name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
        if name in ("gt", "ge"):
            return compared("lt" if name == "gt" else "le", operands[1], operands[0])
        return compared(name, *operands)

    def _and(self, node: fx.Node) -> Known | None:
        if node.meta["val"].dtype is not torch.bool:
            return None
        return both(self._raised(argument(node, 0), node), self._raised(argument(node, 1), node))

    def _not(self, node: fx.Node) -> Known | None:
        return negated(self.of(node.args[0])) if node.meta["val"].dtype is torch.bool else None

    def _where(self, node: fx.Node) -> Known | None:
        condition = self.of(node.args[0])
        if not isinstance(condition, Affine) or condition.number is None:
            return None
        return self._raised(argument(node, 1 if condition.number else 2), node)

    def _cat(self, node: fx.Node) -> Known | None:
        items, axis = node.args[0], _axis(node, 1, default=0)
        assert isinstance(items, (list, tuple))
        return joined([(self.of(item), shape_of(item)[axis]) for item in items], axis)  # type: ignore[arg-type]

    def _diff(self, node: fx.Node) -> Known | None:
        """Steps of equal size, the first of them from what stands before."""
        source, before, axis = node.args[0], argument(node, 3), _axis(node, 2)
        if not isinstance(source, fx.Node) or not isinstance(before, fx.Node):
            return None
        if argument(node, 1) != 1 or argument(node, 4) is not None:
            return None
        known = joined([(self.of(item), shape_of(item)[axis]) for item in (before, source)], axis)
        return Affine((), known.slope(axis)) if isinstance(known, Affine) else None

    def _cumsum(self, node: fx.Node) -> Known | None:
        return cumulated(self.of(node.args[0]), _axis(node, 1))

    def _index(self, node: fx.Node) -> Known | None:
        indices = node.args[1]
        assert isinstance(indices, (list, tuple))
        places = [place for place, item in enumerate(indices) if item is not None]
        if places != list(range(places[0], places[-1] + 1)):
            return None
        chosen = [item for item in indices if isinstance(item, fx.Node)]
        if any(item.meta["val"].dtype is torch.bool for item in chosen):
            return None
        return indexed(self.of(node.args[0]), places[0], [(self.of(item), _rank(item)) for item in chosen])

    def _any(self, node: fx.Node) -> Known | None:
        """Of equal elements, and there is at least one."""
        known = self.of(node.args[0])
        return known if isinstance(known, Affine) and known.number is not None else None


def _is_integer(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype in _INTEGERS


def _rank(node: fx.Node) -> int:
    rank: int = node.meta["val"].dim()
    return rank


def _axis(node: fx.Node, place: int, rank: int | None = None, default: int | None = None) -> int:
    value = argument(node, place, default)
    assert isinstance(value, int)
    return value % max(_rank(node) if rank is None else rank, 1)


def _reshaped(known: Known | None, source: fx.Node, node: fx.Node) -> Known | None:
    found = match_dimensions(shape_of(source), shape_of(node))
    return moved(known, {old: new for new, old in (found or {}).items()})


def _table(
    rules: Sequence[tuple[Rule, Sequence[torch._ops.OpOverload]]],
) -> dict[torch._ops.OpOverload, Rule]:
    return {target: rule for rule, targets in rules for target in targets}


_RULES = _table(
    [
        (Positions._range, (aten.arange.default, aten.arange.start, aten.arange.start_step)),
        (Positions._fill, FILLS),
        (
            Positions._same,
            (
                aten.alias.default,
                aten.contiguous.default,
                aten.clone.default,
                aten.detach.default,
                aten.lift_fresh_copy.default,
            ),
        ),
        (
            Positions._cast,
            (
                aten.to.dtype,
                aten.to.dtype_layout,
                aten.to.device,
                aten.to.other,
                aten._to_copy.default,
                aten.type_as.default,
            ),
        ),
        (
            Positions._reshape,
            (
                aten.view.default,
                aten.reshape.default,
                aten._unsafe_view.default,
                aten.flatten.using_ints,
                aten.unflatten.int,
                aten.squeeze.default,
                aten.squeeze.dim,
                aten.squeeze.dims,
                aten.unsqueeze.default,
            ),
        ),
        (Positions._transpose, (aten.transpose.int, aten.t.default)),
        (Positions._permute, (aten.permute.default,)),
        (Positions._expand, (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)),
        (Positions._slice, (aten.slice.Tensor,)),
        (Positions._select, (aten.select.int,)),
        (Positions._add, (aten.add.Tensor, aten.add.Scalar)),
        (Positions._subtract, (aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar)),
        (Positions._multiply, (aten.mul.Tensor, aten.mul.Scalar)),
        (
            Positions._compare,
            (
                *(aten.eq.Tensor, aten.eq.Scalar, aten.ne.Tensor, aten.ne.Scalar),
                *(aten.lt.Tensor, aten.lt.Scalar, aten.le.Tensor, aten.le.Scalar),
                *(aten.gt.Tensor, aten.gt.Scalar, aten.ge.Tensor, aten.ge.Scalar),
            ),
        ),
        (Positions._and, (aten.bitwise_and.Tensor, aten.logical_and.default, aten.__and__.Tensor)),
        (Positions._not, (aten.bitwise_not.default, aten.logical_not.default)),
        (
            Positions._where,
            (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar),
        ),
        (Positions._cat, (aten.cat.default,)),
        (Positions._diff, (aten.diff.default,)),
        (Positions._cumsum, (aten.cumsum.default,)),
        (Positions._index, (aten.index.Tensor,)),
        (Positions._any, (aten.any.default, aten.any.dim, aten.all.default, aten.all.dim)),
    ]
)


def one_symbol(size: object) -> bool:
    """Whether a size is a symbol of its own."""
    return isinstance(size, sympy.Symbol)
