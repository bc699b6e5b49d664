"""Removing operators that hand on a value unchanged."""

from __future__ import annotations

import operator
from typing import ClassVar

import torch
from torch import fx

from sqcompile.infer import same_type
from sqcompile.levels import Level
from sqcompile.matching import is_call, is_returned, scalar_value, sole_user
from sqcompile.operators.table import argument
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program, value_of
from sqcompile.rewrite import Rewriter

aten = torch.ops.aten

# Operators that hand on their first argument's values if type and shape stay, and its memory with them.
_ALIASES = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.expand.default,
        aten.expand_as.default,
        aten.slice.Tensor,
        aten.to.device,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.other,
        aten.type_as.default,
    }
)
# The same, with memory of their own or perhaps another order in memory.
_COPIES = frozenset(
    {
        aten._to_copy.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.lift_fresh_copy.default,
        aten.repeat.default,
    }
)
# Operators that keep the order of the elements and change only the shape: views, and what may copy.
_VIEWS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.unflatten.int,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
    }
)
_KEEP_ORDER = _VIEWS | frozenset({aten.reshape.default, aten.flatten.using_ints})
_RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
_DROPOUTS = frozenset({aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default})
_PIECES = frozenset({aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default})
_POOLS = frozenset(
    {aten.avg_pool1d.default, aten.avg_pool2d.default, aten.max_pool1d.default, aten.max_pool2d.default}
)
_ADAPTIVE = frozenset({aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default})
# Operators whose meaning depends on how a value lies in memory.
_READ_LAYOUT = frozenset({aten.as_strided.default, aten.view.dtype, aten.view_as_complex.default})

_NEUTRAL: dict[object, int] = {
    aten.add.Tensor: 0,
    aten.add.Scalar: 0,
    aten.sub.Tensor: 0,
    aten.sub.Scalar: 0,
    aten.mul.Tensor: 1,
    aten.mul.Scalar: 1,
    aten.div.Tensor: 1,
    aten.div.Scalar: 1,
    aten.pow.Tensor_Scalar: 1,
    # Of booleans; integers have other neutral elements.
    aten.__and__.Tensor: 1,
    aten.bitwise_and.Tensor: 1,
    aten.logical_and.default: 1,
    aten.__or__.Tensor: 0,
    aten.bitwise_or.Tensor: 0,
    aten.logical_or.default: 0,
}
_LOGICAL = frozenset(
    {
        aten.__and__.Tensor,
        aten.bitwise_and.Tensor,
        aten.logical_and.default,
        aten.__or__.Tensor,
        aten.bitwise_or.Tensor,
        aten.logical_or.default,
    }
)
_COMMUTATIVE = _LOGICAL | {aten.add.Tensor, aten.mul.Tensor}


class RemoveNoops(Pass):
    """Remove operators that hand on a value unchanged, and what nothing uses.

    Models are full of them: dropout, casts to the type that a value has, slices of everything, copies
    for the sake of layout. Each keeps other rewrites from seeing what lies behind it.

    Rewrites:
        dropout, identity, clone, contiguous, detach, to(same type), slice(0..end), expand, view and
        repeat to the same shape, cat and split of one piece, pooling over one element, padding by
        nothing, x + 0, x · 1, x / 1, x ** 1  ==>  x;
        reshape(reshape(x))  ==>  reshape(x), or x;  permute(permute(x))  ==>  permute(x), or x;
        dead operators and tensors  ==>  nothing.
        Where a copy made memory contiguous, views behind it become reshapes.
    Keeps: close(rtol=1e-4): every rule is exact (but -0 counts as 0 in x + 0), and yet a matrix product
        may add in another order when its operand lies in another order in memory.
    Rejects: a copy that is returned, since its caller may write to it; dropout in training mode; a
        copy before an operator that reads memory (as_strided).
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.close(rtol=1e-4, atol=1e-6)
    local: ClassVar[bool] = True

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Remove them in graph order, so that each sees what is left of those before it."""
        edit = Rewriter(program, self.name)
        for node in list(program.compute_nodes()):
            if node.target in _DROPOUTS and not _is_off(node):
                context.remark(node, "it drops values at random: the model is in training mode")
                continue
            found = _unchanged(program, node)
            if found is None:
                _merge_with_argument(edit, node)
                continue
            source, shares_memory = found
            reason = None if shares_memory else _need_of_copy(node)
            if reason is not None:
                context.remark(node, reason)
                continue
            if not shares_memory:
                _relax_views(edit, node)
            edit.replace(node, source)
            edit.erase(node)
        return PassResult(changes=edit.finish())


def _unchanged(program: Program, node: fx.Node) -> tuple[fx.Node, bool] | None:
    """Return the value that a node hands on, and whether its memory too; None if it computes something."""
    for source, shares_memory in _candidates(program, node):
        if source is not node and _same_type_and_device(source, node):
            return source, shares_memory
    return None


def _candidates(program: Program, node: fx.Node) -> list[tuple[fx.Node, bool]]:
    """Return values that equal a node's, provided that type and shape are the same."""
    first = node.args[0] if node.args else None
    if node.target in _NEUTRAL:
        return [(value, False) for value in _beside_neutral(program, node)]
    if is_call(node, operator.getitem):
        assert isinstance(first, fx.Node)
        whole = first.args[0] if first.target in _PIECES else None
        return [(whole, True)] if isinstance(whole, fx.Node) else []
    if is_call(node, aten.cat.default) and isinstance(first, (list, tuple)):
        return [(item, False) for item in first if len(first) == 1 and isinstance(item, fx.Node)]
    if not isinstance(first, fx.Node):
        return []
    if node.target in _ALIASES:
        return [(first, not _asks_for_memory(node))]
    if node.target in _DROPOUTS:
        return [(first, True)]
    if node.target in _COPIES or _pools_one_element(node) or _pads_nothing(node):
        return [(first, False)]
    if node.target in _KEEP_ORDER:
        return _same_order(node)
    if _permutation(node) is not None:
        return _permuted_back(node)
    return []


def _same_type_and_device(source: fx.Node, node: fx.Node) -> bool:
    left, right = value_of(source), value_of(node)
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return False
    return same_type(left, right) and left.device == right.device


def _beside_neutral(program: Program, node: fx.Node) -> list[fx.Node]:
    pairs = [(node.args[0], node.args[1])]
    if node.target in _COMMUTATIVE:
        pairs.append((node.args[1], node.args[0]))
    neutral = _NEUTRAL[node.target]
    if node.target in _LOGICAL and value_of(node).dtype is not torch.bool:
        return []
    return [
        value for value, other in pairs if isinstance(value, fx.Node) and _known(program, other) == neutral
    ]


def _known(program: Program, value: object) -> float | int | None:
    """Return a known number, or a known truth value as 0 or 1."""
    if isinstance(value, fx.Node) and value.op == "get_attr" and program.has_tensor(str(value.target)):
        tensor = program.tensor(value)
        if tensor.dtype is torch.bool:
            return int(tensor.item()) if tensor.numel() == 1 else None
    return scalar_value(program, value)


def _is_off(node: fx.Node) -> bool:
    return argument(node, 2) is False or argument(node, 1) == 0


def _asks_for_memory(node: fx.Node) -> bool:
    """Whether a cast is told to copy, or how to lay out its result."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [parameter.name for parameter in node.target._schema.arguments]
    asked = (argument(node, names.index(name)) for name in ("copy", "memory_format") if name in names)
    return any(value not in (None, False) for value in asked)


def _pools_one_element(node: fx.Node) -> bool:
    if node.target in _ADAPTIVE:
        return True  # with the shape kept, as all rules require: each output is the mean of one input
    if node.target not in _POOLS:
        return False
    kernel = argument(node, 1)
    assert isinstance(kernel, (list, tuple))
    divides_by = argument(node, 6) if node.target is aten.avg_pool2d.default else None
    return set(kernel) == {1} and divides_by is None  # with the shape kept, the stride is 1 too


def _pads_nothing(node: fx.Node) -> bool:
    if not is_call(node, aten.pad.default, aten.constant_pad_nd.default):
        return False
    amounts = argument(node, 1)
    return isinstance(amounts, (list, tuple)) and all(isinstance(n, int) and n == 0 for n in amounts)


def _same_order(node: fx.Node) -> list[tuple[fx.Node, bool]]:
    """Return the values before a chain of changes of shape, farthest first."""
    found = []
    shares_memory = True
    while node.target in _KEEP_ORDER and isinstance(source := node.args[0], fx.Node):
        shares_memory = shares_memory and node.target in _VIEWS
        found.append((source, shares_memory))
        node = source
    return found[::-1]


def _permutation(node: fx.Node) -> list[int] | None:
    """Return where each axis of a permuted value comes from, or None if the node is no permutation."""
    source = node.args[0] if node.args else None
    recorded = value_of(source) if isinstance(source, fx.Node) else None
    if not isinstance(recorded, torch.Tensor):
        return None
    rank = recorded.dim()
    if is_call(node, aten.permute.default):
        axes = argument(node, 1)
        return [int(axis) % rank for axis in axes]  # type: ignore[attr-defined]
    swapped: tuple[object, object]
    if is_call(node, aten.transpose.int):
        swapped = argument(node, 1), argument(node, 2)
    elif is_call(node, aten.t.default) and rank == 2:
        swapped = 0, 1
    else:
        return None
    order = list(range(rank))
    left, right = (int(axis) % rank for axis in swapped)  # type: ignore[call-overload]
    order[left], order[right] = order[right], order[left]
    return order


def _permuted_back(node: fx.Node) -> list[tuple[fx.Node, bool]]:
    """Return the values before a chain of permutations that undo each other."""
    found = []
    total: list[int] | None = None
    item = node
    while (order := _permutation(item)) is not None:
        total = order if total is None else [order[axis] for axis in total]
        source = item.args[0]
        assert isinstance(source, fx.Node)
        if total == sorted(total):
            found.append((source, True))
        item = source
    return found[::-1]


def _merge_with_argument(edit: Rewriter, node: fx.Node) -> None:
    """Let a reshape or permutation start from what was reshaped or permuted before it."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return
    if node.target in _RESHAPES and source.target in _KEEP_ORDER:
        with edit.before(node):
            shape = list(node.args[1])  # type: ignore[arg-type]
            # A reshape: memory may lie so that no view of that shape exists.
            merged = edit.call(aten.reshape.default, source.args[0], shape, like=node)
        if not same_type(value_of(merged), value_of(node)):
            edit.discard(merged)
            return
        edit.replace(node, merged)
        edit.erase(node)
        return
    outer, inner = _permutation(node), _permutation(source)
    if outer is None or inner is None or sole_user(source) is not node:
        return
    with edit.before(node):
        merged = edit.call(aten.permute.default, source.args[0], [inner[axis] for axis in outer], like=node)
    edit.replace(node, merged)
    edit.erase(node)
    edit.erase(source)


def _need_of_copy(node: fx.Node) -> str | None:
    """Say what depends on the memory that a node makes, or return None."""
    if is_returned(node):
        return "its copy is returned, and callers may write to what they get"
    for user in _downstream(node):
        if user.target in _READ_LAYOUT:
            return f"%{user.name} depends on how it lies in memory"
    return None


def _relax_views(edit: Rewriter, node: fx.Node) -> None:
    """Turn the views behind a copy into reshapes, which accept any order in memory."""
    for user in _downstream(node):
        if is_call(user, aten.view.default, aten._unsafe_view.default):
            user.target = aten.reshape.default
            edit.changes += 1


def _downstream(node: fx.Node) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found[user] = None
                pending.append(user)
    return list(found)
