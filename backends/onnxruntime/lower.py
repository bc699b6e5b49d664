"""Program -> ONNX, through torch's exporter."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version

import onnx_ir as ir
import torch
from torch import fx
from torch.utils import _pytree as pytree

from sqcompile.backends.onnxruntime import cleanup, compact, saturation, weights
from sqcompile.backends.onnxruntime.artifact import GENERATION, OnnxArtifact
from sqcompile.backends.onnxruntime.generation.rewrite import Generation, generating
from sqcompile.backends.onnxruntime.generation.wire import wire
from sqcompile.backends.onnxruntime.selection import select
from sqcompile.backends.onnxruntime.translations import OPSET, TABLE
from sqcompile.compare import ProgramValues
from sqcompile.errors import BackendError
from sqcompile.layer_values import LAYERS, LayerValues, layers_to_json, original_name
from sqcompile.program import Program
from sqcompile.signature import SIGNATURE
from sqcompile.text import locate, symbol_names

_Values = dict[str, tuple[ir.Value, fx.Node]]

_TAG = "sqcompile.node"
"""Key under which nodes carry their names through the exporter."""

_LARGEST_IR_VERSION = 10
"""The file format that belongs to opset 21; runtimes older than the exporter read no later one."""


def lower(program: Program) -> OnnxArtifact:
    """Lower a program to ONNX: choose the form of each layer, export, clean up, guard against saturation.

    The artifact can also make the model that takes only new tokens, if the program is a language model.

    Raises:
        BackendError: If the exporter fails.
    """
    source = program.snapshot()
    model, notes = _lowered(program, None)
    model.metadata_props[SIGNATURE] = program.signature.to_json()
    return OnnxArtifact(model, program.signature, notes, generating=lambda: lower_generating(source))


def lower_generating(program: Program) -> OnnxArtifact:
    """Lower a language model so that it takes only the tokens that are new, with a cache.

    Raises:
        NoGenerationError: If the program is no causal language model, as far as the rules can show.
        BackendError: If the exporter fails.
    """
    rewritten, generation = generating(program)
    model, notes = _lowered(rewritten, generation)
    model.metadata_props[SIGNATURE] = program.signature.to_json()
    model.metadata_props[GENERATION] = generation.to_json()
    return OnnxArtifact(model, program.signature, notes)


def _lowered(program: Program, generation: Generation | None) -> tuple[ir.Model, list[str]]:
    selected, notes = select(program)
    model, values = _export(selected)
    cleanup.clean(model, program.signature, symbol_names(program))
    if generation is not None:
        wire(model, generation)
    weights.look_up_at_load(model)
    weights.dequantize_at_load(model)
    compact.store_few_bits(model)
    guarded = saturation.guard(model)
    if guarded:
        notes.append(f"{guarded} int8 weights choose their form at load, so that no CPU saturates")
    cleanup.drop_inner_shapes(model.graph)
    model.metadata_props[LAYERS] = layers_to_json(_layers_of_file(program, model, values))
    model.producer_name = "sqcompile"
    model.producer_version = version("sqcompile")
    model.ir_version = min(model.ir_version, _LARGEST_IR_VERSION)
    return model, notes


def _values_of_nodes(model: ir.Model, exported: torch.export.ExportedProgram, program: Program) -> _Values:
    """Return the exported values that are those of nodes, by the names of the traced nodes that they stand for.

    The exporter traces the program again and names values after nodes of its own; the tags come through.
    """
    traced: dict[str, str] = {}  # of what one node becomes, the last has its value
    for node in exported.graph.nodes:
        if _TAG in node.meta.get("custom", {}):
            traced[node.meta["custom"][_TAG]] = node.name
    values = {value.name: value for operator in model.graph for value in operator.outputs}
    found: _Values = {}
    for node in program.compute_nodes():
        value = values.get(traced.get(node.name, ""))
        if value is not None and "rotated" not in node.meta:  # a rotated value is none of the model's
            found.setdefault(original_name(node), (value, node))
    return found


def _layers_of_file(program: Program, model: ir.Model, values: _Values) -> list[LayerValues]:
    """Return which values of the finished graph are those of the program's layers."""
    present = {id(value) for operator in model.graph for value in operator.outputs}
    layers = []
    for layer in ProgramValues(program).layers():
        known = {
            name: values[name] for name in layer.values if name in values and id(values[name][0]) in present
        }
        factor = next((node.meta["rescaled"] for _, node in known.values() if "rescaled" in node.meta), None)
        if factor is not None:
            factor = torch.as_tensor(factor)
            factor = None if bool((factor == 1).all()) else factor
        named = {name: str(value.name) for name, (value, _) in known.items()}
        layers.append(LayerValues(layer.name, named, factor))
    return layers


def _export(program: Program) -> tuple[ir.Model, _Values]:
    """Return a program as ONNX, and its values by the names of the traced nodes that they stand for."""
    _drop_constant_results(program)
    for node in program.compute_nodes():
        node.meta["custom"] = {**(node.meta.get("custom") or {}), _TAG: node.name}
    try:
        exported = program.to_exported_program()
        with _quiet(), torch.no_grad():
            result = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                optimize=True,
                verbose=False,
                custom_translation_table=TABLE,
            )
    except Exception as error:
        raise _explain(error) from error
    assert result is not None and result.exported_program is not None
    return result.model, _values_of_nodes(result.model, result.exported_program, program)


def _drop_constant_results(program: Program) -> None:
    """Leave out of the graph what the signature knows: results that are no tensors.

    Raises:
        BackendError: If such a result is computed: a size, say.
    """
    results = program.output.args[0]
    assert isinstance(results, (tuple, list))
    for item, value in zip(results, program.signature.outputs, strict=True):
        if isinstance(item, fx.Node) and not value.is_tensor:
            raise BackendError(
                "The program returns a number that it computes from sizes.",
                where=f"output '{value.name}', {locate(item)}",
                seen=str(item.meta.get("val")),
                expected="tensors and constants",
                next_step="return the tensor instead, whose shape says the same",
            )
    kept = tuple(item for item in results if isinstance(item, fx.Node))
    program.output.args = (kept,)
    program.signature = replace(
        program.signature,
        outputs=tuple(value for value in program.signature.outputs if value.is_tensor),
        out_spec=pytree.tree_structure(kept, is_leaf=lambda item: isinstance(item, fx.Node)),
    )


def _explain(error: BaseException) -> BackendError:
    """Say which node the exporter stopped at, and its first cause instead of its last."""
    node = ""
    cause = error
    while True:
        found = re.search(r"%(\w+)[ :].*?target=([\w.]+)", str(cause))
        if found and not node:
            node = f"node %{found[1]}, {found[2].removeprefix('torch.ops.')}"
        if cause.__cause__ is None:
            break
        cause = cause.__cause__
    first_line = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
    return BackendError(
        "The program cannot be exported to ONNX.",
        where=node or "torch.onnx.export",
        seen=f"{type(cause).__name__}: {first_line}",
        next_step="compile with backend='reference', or leave that operator out of the model",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks, on packages that are not installed say, out of the user's terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
