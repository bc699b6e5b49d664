"""Evaluating, once and for all, what does not depend on the inputs."""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch
from torch import fx, nn

from sqcompile.levels import Level
from sqcompile.matching import is_returned
from sqcompile.operators.table import operator_of
from sqcompile.pipeline import Keeps, Pass, PassContext, PassResult
from sqcompile.program import Program, value_of
from sqcompile.rewrite import Rewriter, has_side_effect
from sqcompile.text import module_path, operator_name

aten = torch.ops.aten

# These look at the shape and type of their first argument, never at its values.
_READ_ONLY_TYPE = frozenset(
    {
        aten.full_like.default,
        aten.new_full.default,
        aten.new_ones.default,
        aten.new_zeros.default,
        aten.ones_like.default,
        aten.zeros_like.default,
    }
)
# Memory that nobody wrote to has no value to keep.
_UNINITIALIZED = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)


class FoldConstants(Pass):
    """Evaluate operators whose inputs are all known, and store what they make.

    Reparametrized weights, position indices and scaled tables become plain tensors, which other passes
    recognize and which cost nothing at run time.

    Rewrites: the largest part of the graph that depends on stored tensors alone  ==>  stored tensors. A
        weight so made is named after the layer that uses it, and stays trainable if it was.
    Keeps: bitwise: the same operators run on the same values, only earlier.
    Rejects: results that would make the program larger by more than `max_growth_bytes`; sizes that
        depend on an input; what is returned. Masks, observers and quantizers stay, and so does what
        follows them: they are there to be changed.

    Attributes:
        max_growth_bytes: How many bytes a stored result may have beyond those of the tensors that it
            makes unnecessary.
    """

    requires = produces = Level.ATEN
    keeps: ClassVar[Keeps] = Keeps.bitwise()
    local: ClassVar[bool] = True

    max_growth_bytes: int = 1 << 20

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Find what is known, shrink it until nothing in it grows too much, and evaluate it."""
        if self.max_growth_bytes < 0:
            raise self.reject_option("max_growth_bytes", "a number of bytes, 0 or more")
        edit = Rewriter(program, self.name)
        known = self._known(program, context)
        for node in [node for node in known if _is_needed(node, known)]:
            value = _evaluate(program, node)
            name = program.free_name(_name(node))
            program.set_tensor(name, _as_stored(program, node, value))
            edit.replace(node, edit.read(name, like=node))
        return PassResult(changes=edit.finish())

    def _known(self, program: Program, context: PassContext) -> dict[fx.Node, None]:
        """Return the operators to evaluate, in graph order."""
        known: dict[fx.Node, None] = {}
        for node in program.compute_nodes():
            if not _is_pure(node):
                continue
            unknown = [item for item in _inputs(node) if item.op != "get_attr" and item not in known]
            if unknown or not _has_fixed_size(node):
                if _would_be_known(node, unknown, known):
                    context.remark(node, "its size depends on an input")
                continue
            known[node] = None
        # What is not evaluated makes its own inputs results, which may be too large in their turn.
        for node in list(known)[::-1]:
            if not _is_needed(node, known):
                continue
            if is_returned(node):
                context.remark(node, "it is returned, and a stored tensor must not be handed out")
                del known[node]
            elif (growth := _growth(program, node)) > self.max_growth_bytes:
                context.remark(
                    node,
                    f"stored, it would add {growth} bytes, and max-growth-bytes is {self.max_growth_bytes}",
                )
                del known[node]
        return known


def _is_pure(node: fx.Node) -> bool:
    """Whether a node's value follows from its inputs, and is worth keeping."""
    if node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or has_side_effect(node):
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags and target not in _UNINITIALIZED


def _inputs(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose values a node needs."""
    if node.target in _READ_ONLY_TYPE:
        return [item for item in node.all_input_nodes if item is not node.args[0]]
    return node.all_input_nodes


def _has_fixed_size(node: fx.Node) -> bool:
    value = value_of(node)
    leaves = value if isinstance(value, (tuple, list)) else [value]
    return all(
        isinstance(leaf, torch.Tensor) and all(isinstance(size, int) for size in leaf.shape)
        for leaf in leaves
    )


def _would_be_known(node: fx.Node, unknown: list[fx.Node], known: dict[fx.Node, None]) -> bool:
    """Whether only a size stands between a node and being known, and a known tensor is at stake."""
    if not isinstance(value_of(node), torch.Tensor):
        return False
    reads_tensor = any(item.op == "get_attr" or item in known for item in _inputs(node))
    return reads_tensor and not any(
        isinstance(value_of(item), (torch.Tensor, tuple, list)) for item in unknown
    )


def _is_needed(node: fx.Node, known: dict[fx.Node, None]) -> bool:
    """Whether something that is not evaluated uses a node; tuples are used through their elements."""
    if not isinstance(value_of(node), torch.Tensor):
        return False
    return any(user not in known for user in node.users)


def _sources(node: fx.Node) -> set[fx.Node]:
    """Return a node and everything that it is computed from."""
    found = {node}
    pending = [node]
    while pending:
        for item in _inputs(pending.pop()):
            if item not in found:
                found.add(item)
                pending.append(item)
    return found


def _growth(program: Program, node: fx.Node) -> int:
    """Return the bytes of a result less those of the tensors that only it needs."""
    value = value_of(node)
    size_bytes = value.numel() * value.element_size()
    sources = _sources(node)
    for item in sources:
        if item.op == "get_attr" and all(user in sources for user in item.users):
            tensor = program.tensor(item)
            size_bytes -= tensor.numel() * tensor.element_size()
    return int(size_bytes)


def _evaluate(program: Program, node: fx.Node) -> torch.Tensor:
    """Run what a node is computed from, in memory of its own but with the same layout."""
    sources = _sources(node)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for item in program.graph.nodes:
            if item not in sources:
                continue
            if item.op == "get_attr":
                values[item] = program.tensor(item).detach()
                continue
            args, kwargs = fx.node.map_arg((item.args, item.kwargs), lambda n: values.get(n, n))
            if item.target in _READ_ONLY_TYPE:
                args = (_stand_in(item.args[0]), *args[1:])
            values[item] = item.target(*args, **kwargs)
    result: torch.Tensor = values[node]
    # Contiguous weights would take another path through the matrix product, and round differently.
    return result.clone(memory_format=torch.preserve_format)


def _stand_in(node: Any) -> torch.Tensor:
    """Return a tensor of a node's type and shape that takes no memory."""
    value = value_of(node)
    assert isinstance(value, torch.Tensor)
    shape = [size if isinstance(size, int) else 1 for size in value.shape]
    return torch.empty((), dtype=value.dtype, device=value.device).expand(shape)


def _as_stored(program: Program, node: fx.Node, value: torch.Tensor) -> torch.Tensor:
    sources = [program.tensor(item) for item in _sources(node) if item.op == "get_attr"]
    if not value.is_floating_point() or not any(isinstance(source, nn.Parameter) for source in sources):
        return value
    return nn.Parameter(value, requires_grad=any(source.requires_grad for source in sources))


def _name(node: fx.Node) -> str:
    """Name a result after the layer whose weight or bias it is, else after its operator."""
    for user in node.users:
        entry = operator_of(user)
        path = module_path(user)
        if entry is None or entry.weight is None or not path:
            continue
        for position, leaf in ((entry.weight, "weight"), (entry.bias, "bias")):
            if position is not None and position < len(user.args) and user.args[position] is node:
                return f"{path}.{leaf}"
    return f"folded_{operator_name(node).replace('.', '_')}"
