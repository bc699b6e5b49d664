"""Model -> program, through torch.export."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sqcompile.errors import InputError, TraceError
from sqcompile.program import Program, graph_module_of
from sqcompile.signature import Signature, Value
from sqcompile.tracing.inline import inline_regions
from sqcompile.text import rename_symbols, source_frame

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""


def trace(
    model: nn.Module | ExportedProgram | fx.GraphModule,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
) -> Program:
    """Trace a model into a program at level `ATEN`.

    The model is not modified. Parameters and buffers are shared with it, under its own names.

    Args:
        model: A module in eval mode, an exported program, or an FX graph module.
        example_inputs: A tuple (positional), a dict (keyword), a pair (tuple, dict), or one tensor.
        dynamic_shapes: As `torch.export.export` takes it.

    Raises:
        TraceError: If the model cannot be traced; the text names the model's own line.
        InputError: If there are no example inputs, or they do not fit the model.
    """
    if isinstance(model, Program):
        return model.snapshot()
    if isinstance(model, ExportedProgram):
        return from_exported_program(model)
    if not isinstance(model, nn.Module):
        raise TraceError(
            "Only modules can be traced.",
            seen=type(model).__name__,
            expected="torch.nn.Module, torch.export.ExportedProgram or torch.fx.GraphModule",
            next_step="wrap the function in an nn.Module",
        )
    args, kwargs = normalize_inputs(example_inputs)
    exported = _export(model, args, kwargs, dynamic_shapes)
    return from_exported_program(exported, arg_names=argument_names(model), dynamic_shapes=dynamic_shapes)


def normalize_inputs(example_inputs: Any) -> Inputs:
    """Return example inputs as (args, kwargs), from any of the forms that `compile` takes."""
    if example_inputs is None:
        raise InputError(
            "There are no example inputs to trace the model with.",
            next_step="pass example_inputs=(tensor, …) or a dict of keyword inputs",
        )
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        if (
            len(example_inputs) == 2
            and isinstance(example_inputs[0], (tuple, list))
            and isinstance(example_inputs[1], Mapping)
        ):
            return tuple(example_inputs[0]), dict(example_inputs[1])
        return tuple(example_inputs), {}
    return (torch.as_tensor(example_inputs),), {}


def argument_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the parameters of `model.forward`, without `*args` and `**kwargs`."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def from_exported_program(
    exported: ExportedProgram, *, arg_names: Sequence[str] = (), dynamic_shapes: Any = None
) -> Program:
    """Turn an exported program into a program, sharing its tensors."""
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, {}, return_output_node=True)
    assert isinstance(output, tuple)
    graph.output(output[0]).meta = dict(output[1].meta)
    inline_regions(graph, module)
    for node in list(graph.nodes):
        if node.op == "call_module" and str(node.target) == "_guards_fn":
            graph.erase_node(node)  # Signature.bind checks the inputs, with better errors
        elif node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # the verifier checks types; passes may change them
    graph_module = graph_module_of(module, graph)
    in_spec, out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec
    names = tuple(arg_names) or tuple(exported.module_call_graph[0].signature.forward_arg_names or ())  # type: ignore[union-attr]
    program = Program(
        graph_module,
        _signature(graph_module, exported, in_spec, out_spec, names, dynamic_shapes),
        constraints=exported.range_constraints,
    )
    program.graph_module.eval()
    return program


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise _explain(error, model) from error


def _explain(error: Exception, model: nn.Module) -> TraceError:
    """Say what torch.export could not take, where in the model, and what to do."""
    frame = None
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/torch/" not in file and "/sqcompile/" not in file:
            frame = (file, trace.tb_lineno)
        trace = trace.tb_next
    text = str(error)
    if frame is None and (found := source_frame(text)) is not None:
        frame = found[:2]
    return TraceError(
        f"{type(model).__name__} cannot be traced.",
        where=None if frame is None else f"{frame[0]}:{frame[1]}",
        seen=f"{type(error).__name__}: {text.strip().splitlines()[0] if text.strip() else ''}",
        next_step="rewrite that line without control flow on tensor values, or compile a part of the model",
    )


def _signature(
    module: fx.GraphModule,
    exported: ExportedProgram,
    in_spec: pytree.TreeSpec,
    out_spec: pytree.TreeSpec,
    arg_names: tuple[str, ...],
    dynamic_shapes: Any,
) -> Signature:
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    output = next(node for node in module.graph.nodes if node.op == "output")
    values = [node.meta.get("val") for node in placeholders]
    symbols = _symbol_names(values, in_spec, arg_names, dynamic_shapes)
    input_names = _leaf_names(in_spec, arg_names)
    results = list(output.args[0])
    output_names = _output_names(out_spec, len(results))
    bounds: dict[str, tuple[int, int | None]] = {}
    for symbol, limits in exported.range_constraints.items():
        name = symbols.get(str(symbol))
        if name is not None:
            bounds[name] = (max(int(limits.lower), 0), None if limits.upper > 2**62 else int(limits.upper))
    return Signature(
        inputs=tuple(_value(name, val, symbols) for name, val in zip(input_names, values, strict=True)),
        outputs=tuple(
            _value(name, item.meta.get("val") if isinstance(item, fx.Node) else item, symbols)
            for name, item in zip(output_names, results, strict=True)
        ),
        in_spec=in_spec,
        out_spec=out_spec,
        arg_names=arg_names,
        dims=bounds,
    )


def _value(name: str, value: Any, symbols: dict[str, str]) -> Value:
    if not isinstance(value, torch.Tensor):
        return Value(name, constant=value)
    shape = tuple(size if isinstance(size, int) else rename_symbols(size, symbols) for size in value.shape)
    return Value(name, shape, value.dtype)


def _symbol_names(
    values: Sequence[Any], in_spec: pytree.TreeSpec, arg_names: tuple[str, ...], dynamic_shapes: Any
) -> dict[str, str]:
    """Map the tracer's symbols to the names of the user's `Dim`s, else to s0, s1, … in input order."""
    given = _dim_names(in_spec, arg_names, dynamic_shapes, len(values))
    symbols: dict[str, str] = {}
    for value, names in zip(values, given, strict=True):
        if not isinstance(value, torch.Tensor):
            continue
        for axis, size in enumerate(value.shape):
            symbol = str(size)
            if isinstance(size, int) or symbol in symbols or not symbol.isidentifier():
                continue
            name = names.get(axis) or f"s{len(symbols)}"
            symbols[symbol] = name if name not in symbols.values() else f"{name}_{len(symbols)}"
    return symbols


def _dim_names(
    in_spec: pytree.TreeSpec, arg_names: tuple[str, ...], dynamic_shapes: Any, count: int
) -> list[dict[int, str]]:
    """Return, for each input leaf, the user's name of each dynamic axis."""
    if dynamic_shapes is None:
        return [{} for _ in range(count)]
    args_spec, kwargs_spec = in_spec.children()
    names = [*arg_names[: args_spec.num_children], *(kwargs_spec.context or [])]
    if isinstance(dynamic_shapes, Mapping):
        per_argument = [dynamic_shapes.get(name) for name in names]
    else:
        per_argument = list(dynamic_shapes)
    found: list[dict[int, str]] = []
    children = [*args_spec.children(), *kwargs_spec.children()]
    for spec, shapes in zip(children, per_argument, strict=False):
        leaves: list[dict[int, str]] = []
        _collect_dims(shapes, spec, leaves)
        found += leaves
    return (found + [{} for _ in range(count)])[:count]


def _collect_dims(shapes: Any, spec: pytree.TreeSpec, found: list[dict[int, str]]) -> None:
    if spec.is_leaf():
        axes = shapes.items() if isinstance(shapes, Mapping) else enumerate(shapes or ())
        found.append({axis: dim.__name__ for axis, dim in axes if hasattr(dim, "__name__")})
        return
    keys = spec.context if isinstance(shapes, Mapping) and isinstance(spec.context, list) else None
    for index, child in enumerate(spec.children()):
        if shapes is None:
            inner = None
        elif keys is not None:
            inner = shapes.get(keys[index])
        else:
            inner = shapes[index]
        _collect_dims(inner, child, found)


def _leaf_names(spec: pytree.TreeSpec, arg_names: tuple[str, ...]) -> list[str]:
    """Name the leaves of `(args, kwargs)` by the model's parameters, with dots for nesting."""
    names: list[str] = []
    dummy = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    for path, _ in pytree.tree_flatten_with_path(dummy)[0]:
        side, key, *rest = path
        if side.idx == 0:
            first = arg_names[key.idx] if key.idx < len(arg_names) else f"input_{key.idx}"
        else:
            first = str(key.key)
        names.append(".".join([first, *(_key_text(item) for item in rest)]))
    return names


def _output_names(spec: pytree.TreeSpec, count: int) -> list[str]:
    if spec.is_leaf():
        return ["output"]
    dummy = pytree.tree_unflatten(list(range(count)), spec)
    try:
        paths = [path for path, _ in pytree.tree_flatten_with_path(dummy)[0]]
        names = [".".join(_key_text(item) for item in path) for path in paths]
    except (ValueError, TypeError, AttributeError):
        names = []
    if len(names) != count:
        names = [str(index) for index in range(count)]
    return [f"output_{name}" if name.isdigit() else name for name in names]


def _key_text(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
