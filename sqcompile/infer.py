"""Shape and type inference: what a node's recorded value must be, derived from its operator."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from sqcompile.errors import Error
from sqcompile.program import Program
from sqcompile.signature import describe_type
from sqcompile.text import rename_symbols


def fake_mode_of(program: Program) -> FakeTensorMode:
    """Return the fake mode that the program's recorded values belong to, so that symbols are shared."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def infer_node(node: fx.Node, mode: FakeTensorMode) -> Any:
    """Return the value of a call, computed on fake tensors: shapes and types, no data.

    Calls of one operator on the same types share one value, which must therefore not be written to.

    Raises:
        Exception: Whatever the operator raises on shapes or types that do not fit.
    """
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), _recorded)
    try:
        call = (node.target, _call_type(args), _call_type(kwargs))
    except _UnknownType:
        return _infer(node.target, args, kwargs, mode)
    # The memory is the mode's own, since it holds tensors of that mode: both are freed together.
    known = vars(mode).setdefault("_sqcompile_inferred", {})
    if call in known:
        return known[call]
    value = _infer(node.target, args, kwargs, mode)
    if _depends_on_types_alone(value):
        known[call] = value
    return value


def _infer(target: Any, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    # With the dispatcher that torch.export uses, operators such as lstm can be derived on symbolic shapes.
    symbols = mode.shape_env
    fresh = nullcontext() if symbols is None else symbols.ignore_fresh_unbacked_symbols()
    # It also logs what it raises, with a traceback, which the error that is made of it says shorter.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addFilter(_below_error)
    try:
        with mode, enable_python_dispatcher(), torch.no_grad(), fresh:
            return target(*args, **kwargs)
    finally:
        logger.removeFilter(_below_error)


def _below_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def misfit(error: Exception) -> tuple[str, str]:
    """Return what `infer_node` has seen and expected, in one line each, from what it raised."""
    if isinstance(error, Error) and error.seen and error.expected:
        return f"{error.what}: {error.seen}", error.expected
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}", "shapes and types that the operator takes"


class _UnknownType(Exception):
    """An argument on which a result may depend by more than we can compare."""


def _call_type(value: Any) -> Any:
    """Return what the result of a call can depend on: types of tensors, and all else by value."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or getattr(value, "constant", None) is not None:
            raise _UnknownType
        sizes, strides = map(_call_type, value.shape), map(_call_type, value.stride())
        return value.dtype, value.device, tuple(sizes), tuple(strides)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return torch.SymInt, value.node.expr
    if isinstance(value, (list, tuple)):
        return tuple(map(_call_type, value))
    if isinstance(value, dict):
        return tuple((key, _call_type(item)) for key, item in value.items())
    if isinstance(value, (int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return type(value), value  # with the type, since 1, 1.0 and True are equal
    if value is None:
        return None
    raise _UnknownType


def _depends_on_types_alone(value: Any) -> bool:
    return all(
        isinstance(leaf, torch.Tensor) and not free_unbacked_symbols(leaf)
        for leaf in pytree.tree_leaves(value)
    )


def note_derived(node: fx.Node) -> None:
    """Remember that a node's recorded value has just been derived from its operator and arguments."""
    node.meta["derived"] = _derivation(node)


def is_derived(node: fx.Node) -> bool:
    """Whether operator, arguments and all recorded types are as they were at `note_derived`."""
    return node.meta.get("derived") == _derivation(node)


def _derivation(node: fx.Node) -> str:
    types = [describe_value(argument.meta.get("val")) for argument in node.all_input_nodes]
    return f"{node.target}|{node.args}|{node.kwargs}|{types}|{describe_value(node.meta.get('val'))}"


def describe_value(value: Any, names: dict[str, str] | None = None) -> str:
    """Return a recorded value's type, such as `f32[batch, 3]`, with symbols renamed by `names`."""
    if isinstance(value, torch.Tensor):
        return describe_type(value.dtype, [rename_symbols(size, names or {}) for size in value.shape])
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(describe_value(item, names) for item in value) + ")"
    return "nothing recorded" if value is None else str(value)


def fake_tensor(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """Return the fake counterpart of a stored tensor: its shape, strides and type."""
    with mode:
        return torch.empty_strided(
            tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )


def same_type(left: Any, right: Any, *, match_unknown: bool = False) -> bool:
    """Whether two recorded values agree in structure, shape (symbols included) and dtype.

    Args:
        left: One value.
        right: The other.
        match_unknown: Let a size that depends on data agree with any other such size: each time that it
            is derived it gets a new symbol.
    """
    left_leaves, right_leaves = pytree.tree_leaves(left), pytree.tree_leaves(right)
    if len(left_leaves) != len(right_leaves):
        return False
    return all(_same_leaf(a, b, match_unknown) for a, b in zip(left_leaves, right_leaves, strict=True))


def _recorded(node: fx.Node) -> Any:
    return node.meta.get("val")


def _same_leaf(left: Any, right: Any, match_unknown: bool) -> bool:
    if isinstance(left, torch.Tensor) != isinstance(right, torch.Tensor):
        return False
    if not isinstance(left, torch.Tensor):
        return (left is None) == (right is None)
    if left.dtype != right.dtype or left.dim() != right.dim():
        return False
    return all(_same_size(a, b, match_unknown) for a, b in zip(left.shape, right.shape, strict=True))


def _same_size(left: Any, right: Any, match_unknown: bool) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    if str(left) == str(right):
        return True
    if match_unknown and free_unbacked_symbols(left) and free_unbacked_symbols(right):
        return True
    # Sizes such as 2*s0 and s0*2 are equal without looking equal; ask the symbols themselves.
    left_expr = left.node.expr if isinstance(left, torch.SymInt) else left
    right_expr = right.node.expr if isinstance(right, torch.SymInt) else right
    difference = left_expr - right_expr
    return bool(getattr(difference, "expand", lambda: difference)() == 0)
