"""Simplify quantize and dequantize operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import fx

from sqcompile.evaluate import constant_value
from sqcompile.layers import stored_weight
from sqcompile.levels import Level
from sqcompile.operators.table import Scales, argument, data_arguments, operator_of, preserves_scale
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program
from sqcompile.quantization.placement import origin, takers
from sqcompile.quantization.stored import forget_unused_promises, promised
from sqcompile.rewrite import Rewriter

aten = torch.ops.aten
quantize = torch.ops.sqcompile.quantize.default
dequantize = torch.ops.sqcompile.dequantize.default

# PyTorch's CPU kernels of these do not take integers (upsampling takes uint8 only).
_NO_INTEGERS = frozenset(
    {
        aten.max_pool1d.default,
        aten.adaptive_max_pool2d.default,
        aten.upsample_nearest2d.vec,
        aten.upsample_nearest2d.default,
    }
)
_NO_UINT16 = frozenset(
    {aten.max_pool2d.default, aten.pixel_shuffle.default, aten.channel_shuffle.default, aten.pad.default}
)


class FoldQDQ(Pass):
    """Cancel, merge and move quantize (Q) and dequantize (DQ), until codes flow between integer operators.

    Every rule leaves each value on the grid that it was on:

    - DQ -> Q with the same parameters: the codes themselves;
    - equal quantizations of one value, or dequantizations of the same codes: one of them;
    - DQ -> view, transpose, max pooling, zero padding, …: the operator moves codes, DQ behind it; and
      alike cat, where all inputs have the same parameters. Where PyTorch's kernel of the operator takes
      no integers, a Q -> DQ behind it (exact: the values lie on the grid) says that codes go on;
    - integer operator -> view, … -> Q: Q right behind the integer operator;
    - Q of a stored tensor: stored codes.

    Keeps: steps(1): bitwise, but for kernels that sum in another order when strides change.
    Rejects: a cat whose inputs have different scales.
    """

    requires = produces = Level.QDQ
    keeps: ClassVar[Keeps] = Keeps.steps(1)
    local: ClassVar[bool] = True

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Apply the rules until none fires."""
        edit = Rewriter(program, self.name)
        rules = (_quantize_constant, _cancel, _sink, _sink_shared, _hoist)
        fired = True
        while fired:
            fired = _merge(edit)
            for node in list(program.graph.nodes):
                if node.op == "call_function" and node.users:
                    fired |= any(rule(edit, node) for rule in rules)
        _remark_cats(program, context.remark)
        changes = edit.finish()
        forget_unused_promises(program)
        return PassResult(changes)


def _quantize_constant(edit: Rewriter, node: fx.Node) -> bool:
    """Q of a stored tensor ==> stored codes."""
    if node.target is not quantize:
        return False
    codes = constant_value(edit.program, node)
    if codes is None:
        return False
    value = node.args[0]
    assert isinstance(value, fx.Node)
    stored = stored_weight(value)
    base = str(stored.target) if stored is not None else node.name
    constant = edit.constant(f"{base}_codes", codes, like=value)
    promise = None if stored is None else promised(edit.program, value, stored)
    if promise is not None:
        edit.program.sparsity[str(constant.target)] = promise
    edit.replace(node, constant)
    return True


def _cancel(edit: Rewriter, node: fx.Node) -> bool:
    """DQ -> Q with the same parameters ==> the codes."""
    if node.target is not quantize:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.target is not dequantize or not _same_grid(edit.program, source, node):
        return False
    codes = source.args[0]
    assert isinstance(codes, fx.Node)
    edit.replace(node, codes)
    return True


def _sink(edit: Rewriter, node: fx.Node) -> bool:
    """DQ -> operator that moves elements ==> operator on codes -> DQ."""
    if not preserves_scale(node):
        return False
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.target is not dequantize or source.args[3] is not None:
        return False
    codes = source.args[0]
    assert isinstance(codes, fx.Node)
    parts = _parts(node)
    if parts is None:
        return False
    if not _takes(node, codes):
        return any([_requantize(edit, part, source) for part in parts])
    if not _set_padding(edit, node, source):
        return False
    edit.set_argument(node, 0, codes)
    for part in parts:
        if part is not node:
            edit.infer(part)
        with edit.after(part):
            _behind(edit, part, dequantize, source)
    return True


def _sink_shared(edit: Rewriter, node: fx.Node) -> bool:
    """DQ, DQ, … -> cat with equal parameters ==> cat of codes -> DQ."""
    entry = operator_of(node)
    if entry is None or entry.scales is not Scales.SHARES:
        return False
    sources = data_arguments(node)
    if any(source.target is not dequantize or source.args[3] is not None for source in sources):
        return False
    if not all(_same_grid(edit.program, sources[0], source) for source in sources):
        return False
    edit.set_argument(node, 0, [source.args[0] for source in sources])
    with edit.after(node):
        _behind(edit, node, dequantize, sources[0])
    return True


def _hoist(edit: Rewriter, node: fx.Node) -> bool:
    """Integer operator -> … -> operator that moves elements -> Q ==> Q in front of it."""
    if node.target is not quantize or node.args[3] is not None:
        return False
    mover = node.args[0]
    assert isinstance(mover, fx.Node)
    if not preserves_scale(mover) or len(mover.users) != 1 or not isinstance(mover.meta["val"], torch.Tensor):
        return False
    value, entry = mover.args[0], operator_of(origin(mover))
    assert isinstance(value, fx.Node)
    alone = value.target is not dequantize and len(value.users) == 1
    if not alone or entry is None or not (entry.integer or entry.activation) or not _takes(mover, node):
        return False
    if not _set_padding(edit, mover, node):
        return False
    with edit.before(mover):
        codes = edit.call(quantize, value, *node.args[1:], like=mover)
    edit.set_argument(mover, 0, codes)
    edit.replace(node, mover)
    return True


def _merge(edit: Rewriter) -> bool:
    """Keep the first of equal quantizations of one value, and of equal dequantizations of the same codes."""
    kept: dict[tuple[object, ...], fx.Node] = {}
    fired = False
    for node in list(edit.program.compute_nodes()):
        if node.target not in (quantize, dequantize) or not node.users:
            continue
        first = kept.setdefault((node.target, node.args[0], *_parameters(edit.program, node)), node)
        if first is not node:
            edit.replace(node, first)
            fired = True
    return fired


def _parts(node: fx.Node) -> list[fx.Node] | None:
    """Return the values that an operator makes out of its input's elements; None if not all are such."""
    if not isinstance(node.meta["val"], (list, tuple)):
        return [node]
    parts = [user for user in node.users if user.users]
    # Of a pooling that also returns indices, only the first result holds elements.
    return parts if all(origin(part) is origin(node) for part in parts) else None


def _requantize(edit: Rewriter, node: fx.Node, source: fx.Node) -> bool:
    """Put Q -> DQ behind an operator without integer kernel, if integer operators follow."""
    following = [
        user for user in node.users if user.target is quantize and _same_grid(edit.program, source, user)
    ]
    if following or not any(_is_integer(user) for user in takers(node)):
        return False
    with edit.after(node):
        codes = _behind(edit, node, quantize, source)
        _behind(edit, codes, dequantize, source)
    return True


def _behind(edit: Rewriter, node: fx.Node, target: Callable[..., object], like: fx.Node) -> fx.Node:
    """Insert Q or DQ with the parameters of `like` between a node and all its users."""
    new = edit.call(target, node, *like.args[1:], like=node)
    edit.replace(node, new, only=lambda user: user is not new)
    return new


def _takes(node: fx.Node, codes: fx.Node) -> bool:
    """Whether PyTorch's kernel of an operator takes the dtype of some codes."""
    dtype = codes.meta["val"].dtype
    if node.target in _NO_INTEGERS:
        return False
    return dtype != torch.uint16 or node.target not in _NO_UINT16


def _set_padding(edit: Rewriter, node: fx.Node, like: fx.Node) -> bool:
    """Let a padding operator write the code of zero; True if it does, or if the node is no such operator."""
    entry = operator_of(node)
    if entry is None or entry.kind != "pad":
        return True
    zero = like.args[2]
    if not isinstance(zero, fx.Node) or zero.op != "get_attr":
        return False  # a dynamic zero point is known only at run time
    code = int(edit.program.tensor(zero))
    if node.target is aten.constant_pad_nd.default:
        node.args = (*node.args[:2], code)
    elif argument(node, 2, "constant") == "constant":
        node.args = (*node.args[:2], "constant", code)
    node.kwargs = {}
    return True


def _same_grid(program: Program, left: fx.Node, right: fx.Node) -> bool:
    return _parameters(program, left) == _parameters(program, right)


def _parameters(program: Program, node: fx.Node) -> tuple[object, ...]:
    """Return what makes two (de)quantizations equal: scale, zero point, granularity and range."""
    shown: list[object] = []
    for item in node.args[1:3]:
        assert isinstance(item, fx.Node)
        single = item.op == "get_attr" and program.tensor(item).numel() == 1
        # Scales of one value are compared by value, others by identity.
        shown.append(program.tensor(item).item() if single else item)
    return (*shown, *node.args[3:])


def _is_integer(node: fx.Node) -> bool:
    entry = operator_of(node)
    return entry is not None and entry.integer


def _remark_cats(program: Program, remark: Callable[[fx.Node, str], None]) -> None:
    for node in program.compute_nodes():
        entry = operator_of(node)
        if entry is None or entry.scales is not Scales.SHARES:
            continue
        sources = data_arguments(node)
        if all(source.target is dequantize for source in sources):
            remark(node, "its inputs have different scales: it stays in floating point")
