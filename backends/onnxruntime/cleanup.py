"""What torch's exporter leaves to be desired in a model: names, and what a file should not hold."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from sqcompile.signature import Dim, Signature, Value

_SCOPES = "pkg.torch.onnx.name_scopes"


def clean(model: ir.Model, signature: Signature, symbols: Mapping[str, str]) -> None:
    """Give inputs, outputs and dimensions the program's names, and drop what only the exporter needed.

    Args:
        model: The exported model, changed in place.
        signature: The program's interface.
        symbols: The tracer's symbols (`s77`) and the signature's names for them (`batch`).
    """
    _separate_outputs(model.graph)
    _name_nodes(model.graph)
    _rename_interface(model.graph, signature)
    _rename_dimensions(model.graph, symbols)
    _drop_metadata(model)


def _separate_outputs(graph: ir.Graph) -> None:
    """Give every output a value of its own: neither an input, nor a stored tensor, nor another output."""
    seen: set[ir.Value] = set(graph.inputs) | set(graph.initializers.values())
    for index, value in enumerate(graph.outputs):
        if value in seen:
            node = ir.node("Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[index] = node.outputs[0]
        seen.add(graph.outputs[index])


def _name_nodes(graph: ir.Graph) -> None:
    """Name nodes by the module they come from, so that profiles and viewers show the model's layers."""
    taken: set[str] = set()
    for node in graph:
        scopes = _scopes(node)
        path = scopes[-2] if len(scopes) > 1 else ""
        base = f"{path}/{node.op_type}" if path else node.op_type
        name, count = base, 0
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        node.name = name


def _scopes(node: ir.Node) -> list[str]:
    """Return the module paths that a node lies in, outermost first; the last is the operator's own name."""
    return re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, ""))


def _rename_interface(graph: ir.Graph, signature: Signature) -> None:
    named: list[tuple[ir.Value, Value]] = []
    named += zip(graph.inputs, signature.tensor_inputs, strict=True)
    named += zip(graph.outputs, (value for value in signature.outputs if value.is_tensor), strict=True)
    wanted = {value.name for _, value in named}
    ours = {id(value) for value, _ in named}
    taken = wanted | {str(value.name) for value in _values(graph)}
    for value in _values(graph):
        if value.name in wanted and id(value) not in ours:
            value.name = _free(f"{value.name}_value", taken)
    outputs: set[str] = {value.name for value in signature.tensor_inputs}
    for value, description in named[len(graph.inputs) :]:
        value.name = _free(description.name, outputs)  # an output may be called as an input is
        value.shape = _shape(description.shape or ())
    for value, description in named[: len(graph.inputs)]:
        value.name = description.name
        value.shape = _shape(description.shape or ())


def _values(graph: ir.Graph) -> list[ir.Value]:
    values = [*graph.inputs, *graph.initializers.values()]
    for node in graph:
        values += node.outputs
    return values


def _free(name: str, taken: set[str]) -> str:
    found, count = name, 0
    while found in taken:
        count += 1
        found = f"{name}_{count}"
    taken.add(found)
    return found


def _shape(sizes: Sequence[Dim]) -> ir.Shape:
    return ir.Shape(sizes)


def drop_inner_shapes(graph: ir.Graph) -> None:
    """Forget the shapes of all values but inputs and outputs: runtimes derive them anew, and trust no file."""
    interface = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    for node in graph:
        for value in node.outputs:
            if value not in interface:
                value.shape = None
                value.type = None


def _rename_dimensions(graph: ir.Graph, symbols: Mapping[str, str]) -> None:
    for value in _values(graph):
        if value.shape is None or value.shape.is_static():
            continue
        value.shape = ir.Shape(
            [size if isinstance(size, int) else _renamed(size.value, symbols) for size in value.shape]
        )


def _renamed(text: str | None, symbols: Mapping[str, str]) -> str | None:
    if text is None:
        return None
    return re.sub(r"\b[su]\d+\b", lambda match: symbols.get(match.group(), match.group()), text)


def _drop_metadata(model: ir.Model) -> None:
    """Drop the exporter's notes: paths and source lines of the machine that compiled, at every node."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = None
    model.graph.doc_string = None
    for value in _values(model.graph):
        value.metadata_props.clear()
        value.doc_string = None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        if "block_size" in node.attributes and node.attributes["block_size"].as_int() == 0:
            del node.attributes["block_size"]  # the default
