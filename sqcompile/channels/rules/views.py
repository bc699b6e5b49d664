"""Views: dimensions are permuted, merged, split, repeated, added and dropped."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from sqcompile.channels.flow import Dim, Flow, Part, Size, Value, size_of
from sqcompile.channels.rules.registry import overloads, resize, rule
from sqcompile.operators.table import argument
from sqcompile.text import operator_name

if TYPE_CHECKING:
    from sqcompile.channels.shrink import Shrink

_ONE = "it has one element"
_VIEWS = overloads("view", "reshape", "_unsafe_view")
_NEW = overloads(
    *(f"{name}.default" for name in ("zeros", "ones", "full", "empty", "rand", "randn")),
    "empty.memory_format",
)
_NEW_LIKE = overloads(*(f"new_{name}.default" for name in ("zeros", "ones", "full", "empty")))


@rule(*_VIEWS, *overloads("flatten.using_ints", "unflatten.int", "view_as", "reshape_as"))
def view(flow: Flow, node: fx.Node) -> Value:
    """The same elements in the same order: dimensions merge and split."""
    return reshaped(flow, node, flow.value(argument(node, 0)), flow.sizes(node))


def reshaped(flow: Flow, node: fx.Node, value: Value, sizes: Sequence[Size]) -> Value:
    """Return the dimensions of a value that is viewed with other sizes."""
    queue = deque(part for dim in value for part in dim if part.size != 1)
    result: list[Dim] = []
    for size in sizes:
        if size == 1:
            result.append(flow.fixed(1, node, _ONE))
            continue
        taken = _take(flow, node, queue, size)
        if taken is None:
            return _opaque(flow, node, value)
        result.append(flow.merge([(part,) for part in taken]))
    return _opaque(flow, node, value) if queue else tuple(result)


def _take(flow: Flow, node: fx.Node, queue: deque[Part], size: Size) -> list[Part] | None:
    """Take parts that make up a size; the last one may have to be split."""
    taken: list[Part] = []
    left = size
    while left != 1:
        if not queue:
            return None
        part = queue.popleft()
        quotient = _divide(left, part.size)
        if quotient is not None:
            taken.append(part)
            left = quotient
            continue
        rest = _divide(part.size, left)
        if rest is None:
            return None
        text = f"{operator_name(node)} splits it"
        if part.labels is None or not isinstance(left, int):
            first, second = Part(left), Part(rest)
            if part.labels is not None or isinstance(left, int) or isinstance(rest, int):
                return None
        else:
            (first,), (second,) = flow.split((part,), (left, rest), node, text)
        taken.append(first)
        queue.appendleft(second)
        left = 1
    return taken


def _divide(total: Size, part: Size) -> Size | None:
    """Return total / part where that is a whole number (or an expression of symbols), else None."""
    if isinstance(total, int) and isinstance(part, int):
        return None if not part or total % part else total // part
    if total == part:
        return 1
    if isinstance(total, int):
        return None
    quotient = total / part
    if quotient.as_numer_denom()[1] != 1:
        return None
    return int(quotient) if quotient.is_number else quotient


def _opaque(flow: Flow, node: fx.Node, value: Value) -> Value:
    text = f"{operator_name(node)} mixes dimensions in a way that is not understood"
    for dim in value:
        flow.block(dim, node, text)
    result: Value = flow.all_fixed(node.meta["val"], node, text)
    return result


@resize(*_VIEWS)
def resize_view(shrink: Shrink, node: fx.Node) -> None:
    """The sizes that the value has now; -1 stays."""
    shrink.set_argument(node, 1, new_sizes(shrink, node, argument(node, 1)))


@resize(*overloads("unflatten.int"))
def resize_unflatten(shrink: Shrink, node: fx.Node) -> None:
    """The sizes that the parts have now; -1 stays."""
    rank = len(shrink.flow.value(argument(node, 0)))
    axis, sizes = argument(node, 1), argument(node, 2)
    assert isinstance(axis, int)
    shrink.set_argument(node, 2, new_sizes(shrink, node, sizes, offset=axis % rank))


def new_sizes(shrink: Shrink, node: fx.Node, sizes: Any, offset: int = 0) -> list[Any]:
    """Return the sizes in a call as they are after shrinking."""
    value = shrink.flow.value(node)
    result: list[Any] = []
    for size, dim in zip(sizes, value[offset : offset + len(sizes)], strict=True):
        if not shrink.shrinks(dim) or (isinstance(size, int) and size == -1):
            result.append(size)
        elif isinstance(size, fx.Node):  # symbols times numbers: only the numbers shrink
            old, new = shrink.factors(dim)
            product = shrink.compute(node, operator.mul, size, new)
            result.append(shrink.compute(node, operator.floordiv, product, old))
        else:
            result.append(shrink.size(dim))
    return result


@rule(*_NEW, *_NEW_LIKE)
def new(flow: Flow, node: fx.Node) -> Value:
    """A constant of any size."""
    return tuple(
        flow.fixed(size, node, _ONE) if size == 1 else flow.fresh(size, node) for size in flow.sizes(node)
    )


@resize(*_NEW)
def resize_new(shrink: Shrink, node: fx.Node) -> None:
    """The size that is needed now."""
    shrink.set_argument(node, 0, new_sizes(shrink, node, argument(node, 0)))


@resize(*_NEW_LIKE)
def resize_new_like(shrink: Shrink, node: fx.Node) -> None:
    """The size that is needed now."""
    shrink.set_argument(node, 1, new_sizes(shrink, node, argument(node, 1)))


@rule(*overloads("expand", "broadcast_to", "expand_as"))
def expand(flow: Flow, node: fx.Node) -> Value:
    """Dimensions of one element are repeated, as often as is needed."""
    value, sizes = flow.value(argument(node, 0)), flow.sizes(node)
    added = len(sizes) - len(value)
    result: list[Dim] = []
    for axis, size in enumerate(sizes):
        old = value[axis - added] if axis >= added else None
        if old is not None and (size_of(old) != 1 or size == 1):
            result.append(old)
        else:
            result.append(flow.fixed(1, node, _ONE) if size == 1 else flow.fresh(size, node))
    if operator_name(node) == "expand_as":  # it follows the sizes of the other value
        for dim, other in zip(result, flow.value(argument(node, 1)), strict=True):
            if size_of(dim) == size_of(other) != 1:
                flow.unify(dim, other, node)
    return tuple(result)


@resize(*overloads("expand", "broadcast_to"))
def resize_expand(shrink: Shrink, node: fx.Node) -> None:
    """The sizes that the value has now; -1 stays."""
    shrink.set_argument(node, 1, new_sizes(shrink, node, argument(node, 1)))


@rule(*overloads("repeat"))
def repeat(flow: Flow, node: fx.Node) -> Value:
    """Dimensions are repeated as a whole."""
    value, times = flow.value(argument(node, 0)), argument(node, 1)
    assert isinstance(times, (list, tuple))
    added = len(times) - len(value)
    result: list[Dim] = []
    for axis, count in enumerate(times):
        old = value[axis - added] if axis >= added else None
        if old is not None and isinstance(count, int) and count == 1:
            result.append(old)
        elif old is None or size_of(old) == 1:
            result.append(flow.fresh(flow.sizes(node)[axis], node))
        elif isinstance(count, int):
            result.append(flow.merge([flow.fixed(count, node, "it counts repetitions"), old]))
        else:
            return _opaque(flow, node, value)
    return tuple(result)


@resize(*overloads("repeat"))
def resize_repeat(shrink: Shrink, node: fx.Node) -> None:
    """Dimensions of one element are repeated as often as is needed now."""
    times, value = argument(node, 1), shrink.flow.value(argument(node, 0))
    result = shrink.flow.value(node)
    assert isinstance(times, (list, tuple))
    added = len(times) - len(value)
    counts = list(times)
    for axis, count in enumerate(times):
        single = axis < added or size_of(value[axis - added]) == 1
        if single and isinstance(count, int) and shrink.shrinks(result[axis]):
            counts[axis] = shrink.size(result[axis])
    shrink.set_argument(node, 1, counts)


@rule(*overloads("repeat_interleave.self_int"))
def repeat_interleave(flow: Flow, node: fx.Node) -> Value:
    """Every position of a dimension is repeated."""
    value, times, axis = flow.value(argument(node, 0)), argument(node, 1), argument(node, 2)
    if not isinstance(times, int) or not isinstance(axis, int) or argument(node, 3) is not None:
        return _opaque(flow, node, value)
    result = list(value)
    result[axis] = flow.merge([value[axis], flow.fixed(times, node, "it counts repetitions")])
    return tuple(result)


@rule(*overloads("permute"))
def permute(flow: Flow, node: fx.Node) -> Value:
    """Dimensions change places."""
    value, order = flow.value(argument(node, 0)), argument(node, 1)
    assert isinstance(order, (list, tuple))
    return tuple(value[int(axis)] for axis in order)


@rule(*overloads("transpose.int", "swapaxes", "swapdims"))
def transpose(flow: Flow, node: fx.Node) -> Value:
    """Two dimensions change places."""
    value = list(flow.value(argument(node, 0)))
    first, second = argument(node, 1), argument(node, 2)
    assert isinstance(first, int) and isinstance(second, int)
    if value:
        value[first], value[second] = value[second], value[first]
    return tuple(value)


@rule(*overloads("t", "numpy_T", "mT", "adjoint"))
def flip_last(flow: Flow, node: fx.Node) -> Value:
    """The last two dimensions change places."""
    value = flow.value(argument(node, 0))
    return value if len(value) < 2 else (*value[:-2], value[-1], value[-2])


@rule(*overloads("movedim.int", "movedim.intlist"))
def movedim(flow: Flow, node: fx.Node) -> Value:
    """Dimensions move to other places."""
    value = flow.value(argument(node, 0))
    rank = len(value)
    sources, targets = (
        [_int(item) % rank for item in (moved if isinstance(moved, (list, tuple)) else [moved])]
        for moved in (argument(node, 1), argument(node, 2))
    )
    rest = iter([axis for axis in range(rank) if axis not in sources])
    places = dict(zip(targets, sources, strict=True))
    return tuple(value[places[axis] if axis in places else next(rest)] for axis in range(rank))


@rule(*overloads("unsqueeze"))
def unsqueeze(flow: Flow, node: fx.Node) -> Value:
    """A dimension of one element is added."""
    value, axis = flow.value(argument(node, 0)), argument(node, 1)
    assert isinstance(axis, int)
    axis %= len(value) + 1
    return (*value[:axis], flow.fixed(1, node, _ONE), *value[axis:])


@rule(*overloads("squeeze", "squeeze.dim", "squeeze.dims"))
def squeeze(flow: Flow, node: fx.Node) -> Value:
    """Dimensions of one element are dropped."""
    value = flow.value(argument(node, 0))
    dropped = _squeezed(node, value)
    return tuple(dim for axis, dim in enumerate(value) if axis not in dropped)


def _int(value: object) -> int:
    assert isinstance(value, int)
    return value


def _squeezed(node: fx.Node, value: Value) -> set[int]:
    chosen = argument(node, 1)
    axes = range(len(value)) if chosen is None else chosen if isinstance(chosen, (list, tuple)) else [chosen]
    return {_int(axis) % len(value) for axis in axes if size_of(value[_int(axis)]) == 1}


@resize(*overloads("squeeze", "squeeze.dim", "squeeze.dims"))
def resize_squeeze(shrink: Shrink, node: fx.Node) -> None:
    """Drop the dimensions that had one element before, and no others that have one now."""
    value = shrink.flow.value(argument(node, 0))
    if any(shrink.shrinks(dim) and shrink.size(dim) == 1 for dim in value):
        dropped = sorted(_squeezed(node, value))
        node.target = overloads("squeeze.dims")[0]
        node.kwargs = {}
        shrink.set_argument(node, 1, dropped)
