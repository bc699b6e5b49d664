"""Taking atoms out of a program: tensors are cut, constants follow, shapes are derived again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from sqcompile.channels.flow import Dim, Flow, dims_of, labels_of, size_of
from sqcompile.errors import PassContractError
from sqcompile.infer import same_type
from sqcompile.operators.table import argument
from sqcompile.rewrite import Rewriter
from sqcompile.sparsity import Sparsity, as_matrix
from sqcompile.text import locate, node_text


class Shrink:
    """One removal, as the resizing rules see it.

    Args:
        flow: The labels of the program.
        edit: Edits the program.
        removed: Atoms that go.
    """

    def __init__(self, flow: Flow, edit: Rewriter, removed: NDArray[np.int64]) -> None:
        self.flow = flow
        self.edit = edit
        self._removed = np.zeros(flow.atoms.size, dtype=bool)
        self._removed[removed] = True
        self._keeps: dict[int, NDArray[np.bool_]] = {}
        self._touched = False

    # --- asking ------------------------------------------------------------------------------------

    def keep(self, dim: Dim) -> NDArray[np.bool_]:
        """Return which positions of a dimension stay; it must not be symbolic."""
        labels = labels_of(dim)
        assert labels is not None
        return self.keep_labels(labels)

    def keep_labels(self, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which positions stay of those with these labels."""
        known = self._keeps.get(id(labels))
        if known is None:
            resolved = self.flow.resolved(labels)
            known = np.asarray(~(self._removed[resolved] & (resolved >= 0)).any(axis=1))
            self._keeps[id(labels)] = known
        return known

    def shrinks(self, dim: Dim) -> bool:
        """Whether a dimension loses a position."""
        return any(part.labels is not None and not self.keep_labels(part.labels).all() for part in dim)

    def size(self, dim: Dim) -> Any:
        """Return the new size of a dimension."""
        old, new = self.factors(dim)
        size = size_of(dim)
        return new if isinstance(size, int) else size // old * new

    def factors(self, dim: Dim) -> tuple[int, int]:
        """Return the product of a dimension's numbers before and after; symbols are left out."""
        old = new = 1
        for part in dim:
            if part.labels is not None:
                old *= len(part.labels)
                new *= int(self.keep_labels(part.labels).sum())
        return old, new

    # --- changing ------------------------------------------------------------------------------------

    def set_argument(self, node: fx.Node, position: int, value: Any) -> None:
        """Replace an argument; the node's value is derived afterwards."""
        if argument(node, position) == value:
            return
        arguments: list[Any] = list(node.args)
        named = dict(node.kwargs)
        assert isinstance(node.target, torch._ops.OpOverload)
        parameters = node.target._schema.arguments
        for index in range(len(arguments), position + 1):
            arguments.append(argument(node, index))
            named.pop(parameters[index].name, None)
        arguments[position] = value
        node.args, node.kwargs = tuple(arguments), named
        self.changed(node)

    def set_keyword(self, node: fx.Node, name: str, value: Any) -> None:
        """Replace an argument that has to be given by name."""
        node.kwargs = {**node.kwargs, name: value}
        self.changed(node)

    def changed(self, node: fx.Node) -> None:
        """Count a change of a node."""
        self.edit.changes += 1
        self._touched = True

    def compute(self, node: fx.Node, target: Any, *args: Any) -> fx.Node:
        """Insert a computation of sizes before a node."""
        with self.edit.before(node):
            return self.edit.call(target, *args, like=node)

    def constant(self, name: str, tensor: torch.Tensor, node: fx.Node) -> fx.Node:
        """Store a tensor that a node needs."""
        return self.edit.constant(name, tensor, like=node)

    def scale_result(self, node: fx.Node, factor: float) -> None:
        """Multiply a node's value by a number, for all its users."""
        self._scales.append((node, factor))

    _scales: list[tuple[fx.Node, float]]

    # --- running -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Cut every tensor and bring every node up to date.

        Raises:
            PassContractError: If nothing would be left of a dimension; if a derived shape is not the one
                that the labels predict.
        """
        from sqcompile.channels.rules import RESIZES

        self._scales = []
        self._refuse_empty()
        shrunk = self._cut_tensors()
        stale = set(shrunk)
        for node in list(self.flow.program.graph.nodes):
            if node.op != "call_function":
                continue
            resize = RESIZES.get(node.target)
            self._touched = False
            if resize is not None and self._concerns(node):
                resize(self, node)
            if self._touched or any(source in stale for source in node.all_input_nodes):
                before = node.meta.get("val")
                self.edit.infer(node)
                self._check(node)
                if not same_type(before, node.meta["val"]):  # else nothing behind it can have changed
                    stale.add(node)
        for node, factor in self._scales:
            self._insert_scale(node, factor)

    def _refuse_empty(self) -> None:
        """Refuse to take all of a dimension, before anything is changed."""
        for node, value in self.flow.values.items():
            for dim in dims_of(value):
                if self.shrinks(dim) and 0 in self.factors(dim):
                    raise PassContractError(
                        "A removal would leave nothing of a dimension.",
                        where=locate(node),
                        seen=f"all {size_of(dim)} positions of a dimension of {node_text(node)}",
                        expected="at least one position left",
                        next_step="remove less, or leave this layer out",
                    )

    def _concerns(self, node: fx.Node) -> bool:
        """Whether a dimension of a node's arguments or of its value shrinks."""
        values = [self.flow.values.get(item) for item in (node, *node.all_input_nodes)]
        return any(self._any_shrinks(value) for value in values)

    def _any_shrinks(self, value: Any) -> bool:
        if isinstance(value, tuple):
            return any(self.shrinks(dim) for dim in value)
        return isinstance(value, list) and any(self._any_shrinks(item) for item in value)

    def _cut_tensors(self) -> list[fx.Node]:
        program = self.flow.program
        nodes: dict[str, list[fx.Node]] = {}
        for node in program.graph.nodes:
            if node.op == "get_attr" and str(node.target) in self.flow.tensors:
                nodes.setdefault(str(node.target), []).append(node)
        shrunk: list[fx.Node] = []
        for name, readers in nodes.items():
            keeps = {
                axis: torch.from_numpy(np.flatnonzero(self.keep(dim)))
                for axis, dim in enumerate(self.flow.tensors[name])
                if self.shrinks(dim)
            }
            if not keeps:
                continue
            self.edit.replace_tensor(readers[0], _cut(program.tensor(name), keeps))
            promise = program.sparsity.get(name)
            if promise is not None:
                program.sparsity[name] = _cut_promise(promise, keeps)
            shrunk += readers
        return shrunk

    def _check(self, node: fx.Node) -> None:
        """Compare the derived sizes with those that the labels predict."""
        for value, recorded in _leaves(self.flow.values.get(node), node.meta["val"]):
            for dim, size in zip(value, recorded.shape, strict=True):
                if labels_of(dim) is not None and self.size(dim) != size:
                    raise PassContractError(
                        "A dimension has not shrunk as its channel groups say.",
                        where=locate(node),
                        seen=node_text(node),
                        expected=f"{self.size(dim)} of {size_of(dim)} positions",
                        next_step="the dimension rule of this operator is wrong; please report the model",
                    )

    def _insert_scale(self, node: fx.Node, factor: float) -> None:
        with self.edit.after(node):
            scaled = self.edit.call(torch.ops.aten.mul.Tensor, node, factor, like=node)
        self.edit.replace(node, scaled)


def _leaves(value: Any, recorded: Any) -> list[tuple[Any, torch.Tensor]]:
    if isinstance(value, tuple) and isinstance(recorded, torch.Tensor):
        return [(value, recorded)]
    if isinstance(value, list) and isinstance(recorded, (list, tuple)):
        return [leaf for pair in zip(value, recorded, strict=True) for leaf in _leaves(*pair)]
    return []


def _cut(tensor: torch.Tensor, keeps: dict[int, torch.Tensor]) -> torch.Tensor:
    """Return the kept part of a stored tensor; a parameter stays one."""
    result = tensor.detach()
    for axis, keep in keeps.items():
        result = result.index_select(axis, keep)
    result = result.contiguous()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(result, requires_grad=tensor.requires_grad)
    return result


def _cut_promise(promise: Sparsity, keeps: dict[int, torch.Tensor]) -> Sparsity:
    """Return what is promised about the part of a weight that is left."""
    mask = _cut(promise.mask, keeps)
    pattern = promise.pattern
    if not pattern.is_unstructured:
        fits = pattern.obstacle(tuple(mask.shape)) is None and pattern.holds(as_matrix(mask))
        pattern = pattern if fits else type(pattern)()
    return Sparsity(mask, pattern)
