"""Model -> program, through torch.export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

import sqcompile.operators.library  # noqa: F401 - registers the operators that programs hold
from sqcompile.errors import InputError, TraceError
from sqcompile.program import Program, graph_module_of
from sqcompile.signature import describe_type, short_dtype
from sqcompile.tracing.explain import explain, model_line, quiet
from sqcompile.tracing.functionalize import fake_mode_in, refuse_mutated_state, remove_in_place
from sqcompile.tracing.inline import inline_regions
from sqcompile.tracing.inputs import (
    Inputs,
    argument_names,
    check_call,
    check_dynamic_shapes,
    check_weights,
    enlarge_dynamic_sizes,
    normalize_inputs,
    register_containers,
    register_dataclass,
)
from sqcompile.tracing.interface import signature_of
from sqcompile.tracing.masks import recognize_masks
from sqcompile.tracing.quantized_decomposed import convert_quantized_decomposed
from sqcompile.tracing.recompose import recompose
from sqcompile.tracing.refuse import refuse_random, refuse_running_statistics

__all__ = ["Inputs", "argument_names", "from_exported_program", "normalize_inputs", "trace"]

_aten = torch.ops.aten

# Checks that torch.export writes into graphs. Signature.bind checks inputs, with better errors, and the
# verifier checks types, which passes may change.
_ASSERTIONS = frozenset(
    {
        _aten._assert_tensor_metadata.default,
        _aten._assert_scalar.default,
        _aten._assert_async.msg,
        _aten.sym_constrain_range.default,
        _aten.sym_constrain_range_for_size.default,
    }
)


def trace(
    model: nn.Module | ExportedProgram | fx.GraphModule | Program,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
) -> Program:
    """Trace a model into a program at level `ATEN`.

    The model is traced as in eval mode, without gradients, and is left as it was. Parameters and
    buffers are shared with it, under its own names; tied ones stay one tensor. The program computes the
    same results and writes into nothing: an input that the model changes in place stays as it was.

    Args:
        model: A module, an exported program, or an FX graph module. A program is copied.
        example_inputs: A tuple (positional), a dict (keyword), a pair (tuple, dict), or one tensor. Along
            dynamic dimensions an example of size 1 is as good as any.
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
    inputs = normalize_inputs(example_inputs)
    check_call(model, *inputs)
    check_weights(model)
    register_containers(inputs, model)
    names = argument_names(model)
    inputs = enlarge_dynamic_sizes(inputs, names, dynamic_shapes)
    check_dynamic_shapes(inputs, names, dynamic_shapes)
    exported = _export(model, inputs, dynamic_shapes)
    return from_exported_program(exported, arg_names=names, dynamic_shapes=dynamic_shapes)


def from_exported_program(
    exported: ExportedProgram, *, arg_names: Sequence[str] = (), dynamic_shapes: Any = None
) -> Program:
    """Turn an exported program into a program, sharing its tensors.

    Raises:
        TraceError: If it writes into its own tensors, draws random numbers, or holds quantized operators
            that have no counterpart here.
    """
    signature = exported.module_call_graph[0].signature
    names = tuple(arg_names) or tuple(signature.forward_arg_names or () if signature else ())
    module, graph = _flat_graph(exported)
    recompose(graph)
    program = Program(
        graph_module_of(module, graph),
        signature_of(graph, exported, names, dynamic_shapes),
        constraints=exported.range_constraints,
    )
    recognize_masks(program)
    convert_quantized_decomposed(program)
    program.graph_module.eval()
    return program


def _export(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> ExportedProgram:
    args, kwargs = inputs

    def export() -> ExportedProgram:
        # As inference runs: blocks under torch.no_grad() then leave no regions in the graph.
        with quiet(), torch.no_grad(), _eval_mode(model):
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)

    try:
        return export()
    except Exception as error:
        outputs = _run_eagerly(model, inputs, error)
        if not any([register_dataclass(type(leaf)) for leaf in pytree.tree_leaves(outputs)]):
            raise explain(error, model) from error
    try:
        return export()
    except Exception as error:
        raise explain(error, model) from error


def _run_eagerly(model: nn.Module, inputs: Inputs, reason: Exception) -> Any:
    """Run the model on its examples, to tell inputs that it does not take from code that cannot be traced."""
    args, kwargs = inputs
    try:
        with torch.no_grad(), _eval_mode(model), _buffers_kept(model):
            return model(*args, **kwargs)
    except Exception as error:
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
        shown = ", ".join(describe_type(leaf.dtype, tuple(leaf.shape)) for leaf in tensors)
        raise InputError(
            f"{type(model).__name__} fails on the example inputs, traced or not.",
            where=model_line(error.__traceback__, model) or "example_inputs",
            seen=f"{type(error).__name__}: {error} (inputs: {shown})",
            expected="inputs that model(*args, **kwargs) accepts; those of size 1 along a dynamic "
            "dimension are repeated to size 2",
            next_step=_way_to_fit(model, tensors),
        ) from reason


def _way_to_fit(model: nn.Module, inputs: Sequence[torch.Tensor]) -> str:
    """Return a next step for inputs on which the model fails: it may be their type, or the weights'."""
    weights = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    given = {tensor.dtype for tensor in inputs if tensor.is_floating_point()}
    if given == {torch.float32} and weights and torch.float32 not in weights:
        names = " and ".join(sorted(map(short_dtype, weights)))
        return f"the model's weights are {names}, the inputs float32: convert the model, with model.float()"
    return "give inputs (data) of the sizes and element types that the model takes, or correct the model"


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and each back into its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    # Set directly: exported modules refuse eval(), and some models override train().
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Undo what a run writes into buffers: counters, statistics, caches."""
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in values:
            buffer.copy_(value)


def _flat_graph(exported: ExportedProgram) -> tuple[nn.Module, fx.Graph]:
    """Return a flat graph without in-place operators or assertions, and the module with its tensors."""
    signature = exported.graph_signature
    _refuse_mutated_state(exported)
    module, graph = _copy_graph(exported)
    refuse_random(graph)
    refuse_running_statistics(graph)
    if remove_in_place(graph, {*signature.parameters, *signature.buffers}, fake_mode_in(graph)):
        graph.eliminate_dead_code()
        return module, graph
    with quiet(), torch.no_grad():
        functional = exported.run_decompositions({})
    _refuse_mutated_state(functional)
    module, graph = _copy_graph(functional)
    if not remove_in_place(graph, (), fake_mode_in(graph)):
        raise TraceError(
            "The model writes into views of its values in a way that cannot be unfolded.",
            seen=", ".join(sorted({str(node.target) for node in graph.nodes if node.op == "call_function"})),
            next_step="write that part of the model without in-place operators",
        )
    graph.eliminate_dead_code()
    return module, graph


def _refuse_mutated_state(exported: ExportedProgram) -> None:
    signature = exported.graph_signature
    mutated = {**signature.buffers_to_mutate, **signature.parameters_to_mutate}
    refuse_mutated_state(exported.graph_module, mutated)


def _copy_graph(exported: ExportedProgram) -> tuple[nn.Module, fx.Graph]:
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    graph = fx.Graph()
    output = graph.graph_copy(module.graph, {}, return_output_node=True)
    assert isinstance(output, tuple)
    graph.output(output[0]).meta = dict(output[1].meta)
    inline_regions(graph, module)
    for node in reversed(list(graph.nodes)):
        guard = node.op == "call_module" and str(node.target) == "_guards_fn"
        if (guard or node.target in _ASSERTIONS) and not node.users:
            graph.erase_node(node)
    return module, graph
