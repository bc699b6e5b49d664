"""Cutting a program into parts that run one after the other, and joining what became of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sqcompile.blocks import find_blocks
from sqcompile.infer import fake_mode_of, fake_tensor, infer_node, note_derived
from sqcompile.layers import matches
from sqcompile.program import Program, graph_module_of, value_of
from sqcompile.signature import Signature, Value
from sqcompile.text import module_path, rename_symbols, symbol_names


@dataclass(frozen=True)
class Part:
    """A run of operators of a program, as a program of its own.

    Attributes:
        name: The block that it holds; `start` and `end` for what lies before and behind all blocks.
        program: The part; its tensors are those of the whole.
        inputs: Names of the values of the whole program that it takes.
        outputs: Names of the values that it makes for later parts; of the last one, the model's outputs.
    """

    name: str
    program: Program
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def cut(program: Program) -> list[Part]:
    """Cut a program before its first block, between blocks, and behind the last one.

    Values that are no tensors (sizes, tuples) do not pass from part to part: each part computes those that
    it needs again.

    Returns:
        The parts, in order; one if the program has less than two blocks.
    """
    runs = _runs(program)
    needs = [_Needs(nodes) for _, nodes in runs]
    results = [item for item in program.output.args[0] if isinstance(item, fx.Node)]  # type: ignore[union-attr]
    needs[-1].add(results)
    parts = []
    for index, (name, nodes) in enumerate(runs):
        later = {node for need in needs[index + 1 :] for node in need.inputs}
        made = [node for node in nodes if node in later]
        parts.append(_part(program, name, needs[index], made, last=index == len(runs) - 1))
    return parts


def join(whole: Program, parts: Sequence[Part], done: Iterable[Program]) -> Program:
    """Put compressed parts together: the program that the passes would have made of the whole.

    Args:
        whole: The program that was cut.
        parts: Its parts.
        done: What became of each part, in their order; taken one at a time.
    """
    mode = fake_mode_of(whole)
    graph = fx.Graph()
    joined = _Joined(graph, mode)
    values: dict[str, fx.Node] = {}
    for node in whole.placeholders:
        values[node.name] = graph.node_copy(node)
    outputs: list[Any] = []
    for part, program in zip(parts, done, strict=True):
        joined.level = program.level
        outputs = joined.add(program, [values[name] for name in part.inputs])
        if part is not parts[-1]:
            values.update(zip(part.outputs, outputs, strict=True))
    node = graph.output(tuple(outputs))
    node.meta = dict(whole.output.meta)
    return Program(
        graph_module_of(joined.tensors.graph_module, graph),
        whole.signature,
        level=joined.level,
        sparsity=joined.tensors.sparsity,
        constraints=whole.constraints,
    )


# --- cutting --------------------------------------------------------------------------------------------


def _runs(program: Program) -> list[tuple[str, list[fx.Node]]]:
    """Return the operators of each part, in order, under the part's name."""
    nodes = list(program.compute_nodes())
    place = {node: index for index, node in enumerate(nodes)}
    blocks = find_blocks(program)
    if len(blocks) < 2:
        return [("model", nodes)]
    starts = []
    for block in blocks:
        first = next(index for index, node in enumerate(nodes) if matches(block.name, module_path(node)))
        starts.append((first, block.name))
    starts.sort()
    end = 1 + max(place[block.output] for block in blocks)
    edges = [0, *(start for start, _ in starts), end, len(nodes)]
    names = ["start", *(name for _, name in starts), "end"]
    found = [(name, nodes[first:last]) for name, first, last in zip(names, edges, edges[1:], strict=False)]
    return [run for run in found if run[1] or run[0] == "end"]


class _Needs:
    """What a run of operators takes from outside: values as inputs, and operators to compute again."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self._own = set(nodes)
        self.nodes = list(nodes)
        self.again: dict[fx.Node, None] = {}
        self.inputs: dict[fx.Node, None] = {}
        for node in nodes:
            self.add(node.all_input_nodes)

    def add(self, sources: Iterable[fx.Node]) -> None:
        """Take these along, where they are not made inside."""
        for source in sources:
            if source in self._own or source.op == "get_attr" or source in self.again:
                continue
            if source.op == "placeholder" or isinstance(value_of(source), Tensor):
                self.inputs[source] = None
                continue
            self.add(source.all_input_nodes)
            self.again[source] = None


def _part(program: Program, name: str, needs: _Needs, made: Sequence[fx.Node], *, last: bool) -> Part:
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    inputs = sorted(needs.inputs, key=_order(program))
    for node in inputs:
        target = node.target if node.op == "placeholder" else node.name
        nodes[node] = graph.create_node("placeholder", str(target), name=node.name)
        nodes[node].meta = {"val": node.meta.get("val")}
    compute = [*needs.again, *needs.nodes]
    inside = set(compute)
    for node in program.graph.nodes:
        if node.op == "get_attr" and not inside.isdisjoint(node.users):
            nodes[node] = _copied(graph, node, nodes)
    for node in compute:
        nodes[node] = _copied(graph, node, nodes)
    results: tuple[Any, ...]
    if last:
        results = tuple(
            nodes[item] if isinstance(item, fx.Node) else item
            for item in program.output.args[0]  # type: ignore[union-attr]
        )
    else:
        results = tuple(nodes[node] for node in made)
    output = graph.output(results)
    output.meta = {**_lasting(program.output.meta), "inner": not last}
    signature = _signature(program, inputs, None if last else made)
    part = Program(graph_module_of(program.graph_module, graph), signature, constraints=program.constraints)
    part.shared = _shared(program, compute)
    names = [value.name for value in program.signature.outputs] if last else [node.name for node in made]
    return Part(name, part, tuple(node.name for node in inputs), tuple(names))


def _copied(graph: fx.Graph, node: fx.Node, nodes: Mapping[fx.Node, fx.Node]) -> fx.Node:
    copied: fx.Node = graph.node_copy(node, lambda old: nodes[old])
    copied.meta = _lasting(node.meta)
    return copied


def _lasting(meta: Mapping[str, Any]) -> dict[str, Any]:
    # torch.export's `from_node` holds addresses: stored parts would differ from process to process.
    return {key: value for key, value in meta.items() if key != "from_node"}


def _order(program: Program) -> Callable[[fx.Node], int]:
    place = {node: index for index, node in enumerate(program.graph.nodes)}
    return lambda node: place[node]


def _shared(program: Program, compute: Sequence[fx.Node]) -> frozenset[str]:
    """Names of the tensors that a part reads and others read too."""
    inside = set(compute)
    readers: dict[str, set[bool]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), set()).update(user in inside for user in node.users)
    return frozenset(name for name, found in readers.items() if found == {True, False})


def _signature(program: Program, inputs: Sequence[fx.Node], made: Sequence[fx.Node] | None) -> Signature:
    symbols = symbol_names(program)
    declared = dict(zip(program.placeholders, program.signature.inputs, strict=True))
    values = tuple(declared.get(node) or _value(node, symbols) for node in inputs)
    outputs = program.signature.outputs if made is None else tuple(_value(node, symbols) for node in made)
    _, in_spec = pytree.tree_flatten((tuple(range(len(values))), {}))
    _, out_spec = pytree.tree_flatten(tuple(range(len(outputs))))
    return Signature(
        inputs=values,
        outputs=outputs,
        in_spec=in_spec,
        out_spec=out_spec,
        arg_names=tuple(value.name for value in values),
        dims=program.signature.dims,
    )


def _value(node: fx.Node, symbols: dict[str, str]) -> Value:
    value = value_of(node)
    assert isinstance(value, Tensor)
    shape = tuple(size if isinstance(size, int) else rename_symbols(size, symbols) for size in value.shape)
    return Value(node.name, shape, value.dtype)


# --- joining --------------------------------------------------------------------------------------------


class _Joined:
    """A graph that grows by parts, and its tensors."""

    def __init__(self, graph: fx.Graph, mode: Any) -> None:
        self._graph = graph
        self._mode = mode
        self._computed: dict[object, fx.Node] = {}
        self._stored: dict[str, fx.Node] = {}
        self._first: fx.Node | None = None
        self.level: Any = None
        empty = Signature((), (), *(pytree.tree_flatten(())[1],) * 2)
        self.tensors = Program(graph_module_of(nn.Module(), fx.Graph()), empty)

    def add(self, program: Program, inputs: Sequence[fx.Node]) -> list[Any]:
        """Append a part's operators; return its outputs as nodes of this graph."""
        nodes: dict[fx.Node, fx.Node] = dict(zip(program.placeholders, inputs, strict=True))
        for node in program.graph.nodes:
            if node.op == "get_attr":
                nodes[node] = self._read(program, node)
            elif node.op not in ("placeholder", "output"):
                nodes[node] = self._compute(node, nodes)
        return [
            nodes[item] if isinstance(item, fx.Node) else item
            for item in program.output.args[0]  # type: ignore[union-attr]
        ]

    def _read(self, program: Program, node: fx.Node) -> fx.Node:
        name, tensor = str(node.target), program.tensor(node)
        if name in self._stored and not _equal(self.tensors.tensor(name), tensor):
            name = self.tensors.free_name(name)
        if name in self._stored:
            return self._stored[name]
        self.tensors.set_tensor(name, tensor)
        if str(node.target) in program.sparsity:
            self.tensors.sparsity[name] = program.sparsity[str(node.target)]
        # Tensors are read before anything is computed.
        first = next((item for item in self._graph.nodes if item.op not in ("placeholder", "get_attr")), None)
        with self._graph.inserting_before(first):
            read = self._graph.create_node("get_attr", name, name=node.name)
        read.meta = {**node.meta, "val": fake_tensor(self.tensors.tensor(name), self._mode)}
        self._stored[name] = read
        return read

    def _compute(self, node: fx.Node, nodes: Mapping[fx.Node, fx.Node]) -> fx.Node:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda old: nodes[old])
        key = (node.target, str(args), str(kwargs))
        plain = not isinstance(value_of(node), Tensor)
        if plain and key in self._computed:  # a size that several parts compute
            return self._computed[key]
        made = self._graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        made.meta = {**node.meta}
        made.meta["val"] = infer_node(made, self._mode)
        note_derived(made)
        if plain:
            self._computed[key] = made
        return made


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
