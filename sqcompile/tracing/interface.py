"""The signature of a traced program: names for its inputs, outputs and symbolic dimensions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sqcompile.signature import Signature, Value
from sqcompile.text import rename_symbols
from sqcompile.tracing.inputs import dynamic_axes


def signature_of(
    graph: fx.Graph, exported: ExportedProgram, names: Sequence[str], dynamic_shapes: Any
) -> Signature:
    """Describe the inputs and outputs of a flat graph.

    Args:
        graph: The graph, with recorded values.
        exported: Where the graph comes from; it holds the structure of inputs and outputs.
        names: The parameter names of the model's forward.
        dynamic_shapes: What the user gave; its `Dim`s name the symbolic dimensions.
    """
    in_spec, out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec
    assert in_spec is not None and out_spec is not None
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    values = [node.meta.get("val") for node in placeholders]
    results = list(next(node for node in graph.nodes if node.op == "output").args[0])
    given = [_named(axes) for axes in dynamic_axes(in_spec, names, dynamic_shapes)]
    symbols = _symbol_names(values, given)
    chosen = {name for axes in given for name in axes.values()}
    dims: dict[str, tuple[int, int | None]] = {}
    for symbol, limits in exported.range_constraints.items():
        name = symbols.get(str(symbol))
        if name is not None:
            dims[name] = _bounds(limits, named=name in chosen)
    return Signature(
        inputs=tuple(
            dataclasses.replace(_value(name, node.meta.get("val"), symbols), limit=_rows_taken(node))
            for name, node in zip(_input_names(in_spec, names), placeholders, strict=True)
        ),
        outputs=tuple(
            _value(name, item.meta.get("val") if isinstance(item, fx.Node) else item, symbols)
            for name, item in zip(_output_names(out_spec), results, strict=True)
        ),
        in_spec=in_spec,
        out_spec=out_spec,
        arg_names=tuple(names),
        dims=dims,
    )


def _bounds(limits: Any, *, named: bool) -> tuple[int, int | None]:
    low = max(int(limits.lower), 0)
    # `Dim.AUTO` and `Dim.DYNAMIC` say "from 2" for what a named `Dim` traces alike and says "from 0" for.
    low = 0 if low == 2 and not named else low
    return low, None if limits.upper > 2**62 else int(limits.upper)


def _value(name: str, value: Any, symbols: dict[str, str]) -> Value:
    if not isinstance(value, torch.Tensor):
        return Value(name, constant=value)
    shape = tuple(size if isinstance(size, int) else rename_symbols(size, symbols) for size in value.shape)
    return Value(name, shape, value.dtype)


def _rows_taken(placeholder: fx.Node) -> int | None:
    """Return how many rows the smallest embedding has that an input takes rows of; None if it takes none."""
    tables = [
        user.args[0]
        for user in placeholder.users
        if user.target is torch.ops.aten.embedding.default and user.args[1] is placeholder
    ]
    rows = [table.meta["val"].shape[0] for table in tables if isinstance(table, fx.Node)]
    return min((size for size in rows if isinstance(size, int)), default=None)


def _named(axes: dict[int, Any]) -> dict[int, str]:
    return {axis: dim.__name__ for axis, dim in axes.items() if hasattr(dim, "__name__")}


def _symbol_names(values: Sequence[Any], given: Sequence[dict[int, str]]) -> dict[str, str]:
    """Map the tracer's symbols to the names of the user's `Dim`s, else to s0, s1, … in input order."""
    symbols: dict[str, str] = {}
    for value, names in zip(values, given, strict=True):
        if not isinstance(value, torch.Tensor):
            continue
        for axis, size in enumerate(value.shape):
            symbol = str(size)
            if isinstance(size, int) or symbol in symbols or not symbol.isidentifier():
                continue
            name = names.get(axis) or names.get(axis - value.dim()) or f"s{len(symbols)}"
            symbols[symbol] = name if name not in symbols.values() else f"{name}_{len(symbols)}"
    return symbols


def _input_names(spec: pytree.TreeSpec, names: Sequence[str]) -> list[str]:
    """Name the leaves of `(args, kwargs)` by the model's parameters, with dots for what is nested."""
    args, kwargs = spec.children()
    found: list[str] = []
    for index, child in enumerate(args.children()):
        found += _leaf_names(child, names[index] if index < len(names) else f"input_{index}")
    for name, child in zip(kwargs.context or [], kwargs.children(), strict=True):
        found += _leaf_names(child, str(name))
    return found


def _output_names(spec: pytree.TreeSpec) -> list[str]:
    if spec.is_leaf():
        return ["output"]
    return [f"output_{name}" if name[:1].isdigit() else name for name in _leaf_names(spec, "")]


def _leaf_names(spec: pytree.TreeSpec, prefix: str) -> list[str]:
    if spec.is_leaf():
        return [prefix]
    found: list[str] = []
    for key, child in zip(_keys(spec), spec.children(), strict=True):
        found += _leaf_names(child, f"{prefix}.{key}" if prefix else key)
    return found


def _keys(spec: pytree.TreeSpec) -> list[str]:
    """Return what a container calls its children: keys, field names, or numbers."""
    count = spec.num_children
    fields = getattr(spec.context, "_fields", None)  # the context of a namedtuple is its class
    # A dict's context is its keys; dataclasses and caches put a list of names first.
    for keys in (fields, spec.context, *(spec.context if isinstance(spec.context, (list, tuple)) else ())):
        if (
            isinstance(keys, (list, tuple))
            and len(keys) == count
            and all(isinstance(key, str | int) for key in keys)
        ):
            return [str(key) for key in keys]
    return [str(index) for index in range(count)]
