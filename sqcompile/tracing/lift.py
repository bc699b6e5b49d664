"""Program -> `torch.export.ExportedProgram`, without tracing again.

torch.export keeps tensors as graph inputs ("lifted"); a program keeps them as `get_attr` nodes under
the model's own names. Lifting by hand takes milliseconds, where exporting the graph module again
would trace every operator a second time, and it keeps shapes, names and metadata as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)

if TYPE_CHECKING:
    from sqcompile.program import Program


def lift(program: Program) -> ExportedProgram:
    """Return an exported program that shares the program's tensors and metadata."""
    graph = fx.Graph()
    nodes: dict[fx.Node, Any] = {}
    inputs: list[InputSpec] = []
    state: dict[str, torch.Tensor] = {}
    lifted: dict[str, fx.Node] = {}

    for name, tensor in program.tensors():
        parameter = isinstance(tensor, nn.Parameter)
        node = graph.placeholder(_unused(graph, ("p_" if parameter else "b_") + name.replace(".", "_")))
        lifted[name] = node
        state[name] = tensor
        inputs.append(
            InputSpec(
                InputKind.PARAMETER if parameter else InputKind.BUFFER,
                TensorArgument(node.name),
                name,
                persistent=None if parameter else True,
            )
        )
    submodules: dict[str, Any] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) in lifted:
            nodes[node] = lifted[str(node.target)]
            lifted[str(node.target)].meta = dict(node.meta)
        elif node.op == "get_attr":
            if node.users:  # the graph of a higher-order operator
                submodules[str(node.target)] = program.graph_module.get_submodule(str(node.target))
                nodes[node] = graph.node_copy(node)
        elif node.op == "placeholder":
            copy = graph.placeholder(_unused(graph, node.name))
            copy.meta = dict(node.meta)
            nodes[node] = copy
            inputs.append(InputSpec(InputKind.USER_INPUT, _argument(copy, node.meta.get("val")), None))
        elif node.op != "output":
            nodes[node] = graph.node_copy(node, lambda old: nodes[old])

    results = tuple(nodes[item] if isinstance(item, fx.Node) else item for item in _results(program))
    graph.output(results).meta = dict(program.output.meta)
    outputs = [
        OutputSpec(
            OutputKind.USER_OUTPUT,
            _argument(item, item.meta.get("val"))
            if isinstance(item, fx.Node)
            else ConstantArgument("", item),
            None,
        )
        for item in results
    ]
    signature = program.signature
    return ExportedProgram(
        root=fx.GraphModule(submodules, graph),
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict=state,
        range_constraints=dict(program.constraints),
        module_call_graph=[
            ModuleCallEntry(
                "",
                ModuleCallSignature(
                    inputs=[], outputs=[], in_spec=signature.in_spec, out_spec=signature.out_spec
                ),
            )
        ],
    )


def _results(program: Program) -> tuple[Any, ...]:
    return tuple(program.output.args[0])  # type: ignore[arg-type]


def _argument(node: fx.Node, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TensorArgument(node.name)
    if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
        return SymIntArgument(node.name)
    return ConstantArgument(node.name, value)


def _unused(graph: fx.Graph, name: str) -> str:
    taken = {node.name for node in graph.nodes}
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate
