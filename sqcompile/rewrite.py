"""How passes edit a program: new nodes get their recorded value, their origin and their source line.

Example::

    edit = Rewriter(program)
    with edit.before(node):
        codes = edit.call(torch.ops.sqcompile.quantize.default, x, scale, zero, None, None, 0, 255, like=x)
    edit.replace(node, codes)
    edit.finish()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from sqcompile.errors import Error, VerifyError
from sqcompile.fingerprint import tensor_identity
from sqcompile.infer import fake_mode_of, fake_tensor, infer_node, misfit, note_derived
from sqcompile.operators.table import argument
from sqcompile.program import Program
from sqcompile.text import locate, node_text, operator_name

if TYPE_CHECKING:
    from sqcompile.layers import Layer
    from sqcompile.rotation import Rotation

_KEPT_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")


class Rewriter:
    """Edits one program's graph and keeps its metadata right.

    Args:
        program: The program to edit; only its graph and its table of tensors change.
        origin: Name of the pass; recorded on every new node.
    """

    def __init__(self, program: Program, origin: str = "") -> None:
        self.program = program
        self.graph = program.graph
        self.origin = origin
        self.changes = 0
        self._mode = fake_mode_of(program)

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """Insert what is called inside before `node`."""
        with self.graph.inserting_before(node):
            yield

    @contextmanager
    def after(self, node: fx.Node) -> Iterator[None]:
        """Insert what is called inside after `node`, in the order of the calls."""
        following = node.next
        with self.graph.inserting_before(following):
            yield

    def call(
        self, target: Callable[..., Any], *args: Any, like: fx.Node | None = None, **kwargs: Any
    ) -> fx.Node:
        """Insert a call of an operator, with its value inferred.

        Args:
            target: The operator, such as `torch.ops.aten.relu.default`.
            *args: Its arguments; nodes and plain values.
            like: The node it stands for: source line and module path are taken from it.
            **kwargs: Its keyword arguments.

        Raises:
            VerifyError: If the arguments do not fit the operator; nothing is inserted.
        """
        # Named as the tracer names operators: `quantize_1`, where torch.fx would say `quantize_default_1`.
        name = target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else None
        node: fx.Node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        self.describe(node, like)
        try:
            self.infer(node)
        except Error:
            self.graph.erase_node(node)
            raise
        self.changes += 1
        return node

    def constant(self, name: str, tensor: torch.Tensor, like: fx.Node | None = None) -> fx.Node:
        """Add a tensor under `name` (or the next free name) and return the node that reads it."""
        name = self.program.free_name(name)
        self.program.set_tensor(name, tensor)
        return self.read(name, like)

    def read(self, name: str, like: fx.Node | None = None) -> fx.Node:
        """Return the node that reads a stored tensor; the program has one a tensor."""
        node: fx.Node
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                return node
            if node.op not in ("get_attr", "placeholder"):
                break
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.get_attr(name)
        self.describe(node, like)
        node.meta["val"] = fake_tensor(self.program.tensor(name), self._mode)
        self.changes += 1
        return node

    def replace_tensor(self, node: fx.Node, tensor: torch.Tensor) -> None:
        """Give a `get_attr` node a new tensor under the same name; all its users see it."""
        old = tensor_identity(self.program.tensor(node))
        self.program.set_tensor(str(node.target), tensor)
        for reader in self.graph.nodes:
            if reader.op == "get_attr" and reader.target == node.target:
                reader.meta["val"] = fake_tensor(tensor, self._mode)
        self.changes += tensor_identity(self.program.tensor(node)) != old

    def replace(self, old: fx.Node, new: fx.Node, *, only: Callable[[fx.Node], bool] | None = None) -> None:
        """Let the users of `old` (all, or those that `only` admits) use `new` instead.

        Where `old` is left without users, `new` stands for it from now on: comparisons of programs pair
        it with the original value of `old`, and not with that of the node which has its name.
        """
        replaced = old.replace_all_uses_with(new, delete_user_cb=only or (lambda user: user is not new))
        stands_for = old.meta.get("stands_for", None if "origin" in old.meta else old.name)
        if stands_for is not None and not old.users:
            new.meta["stands_for"] = stands_for
            new.meta.update({key: old.meta[key] for key in ("rescaled", "rotated") if key in old.meta})
        self.changes += bool(replaced)

    def rescale(self, node: fx.Node, factor: torch.Tensor) -> None:
        """Record that a node's value is now the original one times `factor`, channel by channel.

        Comparisons divide by it; otherwise they would blame the node for an error that is none.

        Args:
            node: The node; its operator and arguments are the caller's business.
            factor: Factors, of a shape that the value broadcasts with: [C, 1, 1] for [N, C, H, W].
        """
        node.meta["rescaled"] = node.meta.get("rescaled", 1.0) * factor

    def rotate(self, node: fx.Node, rotation: Rotation) -> None:
        """Record that a node's value is now the original one (or what it was rescaled to), rotated.

        Comparisons undo it, as they undo what is rescaled afterwards.

        Args:
            node: The node, which is not rotated yet; its operator and arguments are the caller's business.
            rotation: Along the last axis, by blocks.
        """
        factor = torch.as_tensor(node.meta.pop("rescaled", 1.0)).flatten()
        if factor.numel() > 1 or bool(factor != 1):
            rotation = rotation.after(factor.expand(max(factor.numel(), rotation.size)))
        node.meta["rotated"] = rotation

    def set_argument(self, node: fx.Node, index: int, value: Any) -> None:
        """Replace one positional argument and infer the node's value again.

        Arguments before it that were left at their defaults, or given by name, become positional.

        Raises:
            VerifyError: If the new argument does not fit the operator; the node is then as it was.
        """
        arguments: list[Any] = list(node.args)
        named = dict(node.kwargs)
        for position in range(len(arguments), index + 1):
            arguments.append(argument(node, position))
            named.pop(_parameter_name(node, position), None)
        old = node.args, node.kwargs
        arguments[index] = value
        node.args, node.kwargs = tuple(arguments), named
        try:
            self.infer(node)
        except Error:
            node.args, node.kwargs = old
            raise
        self.changes += (node.args, node.kwargs) != old

    def infer(self, node: fx.Node) -> None:
        """Record the node's value anew, after its arguments changed.

        Raises:
            VerifyError: If the arguments do not fit the operator.
        """
        try:
            node.meta["val"] = infer_node(node, self._mode)
            note_derived(node)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:
            seen, expected = misfit(error)
            raise VerifyError(
                f"The arguments of '{operator_name(node)}' do not fit together.",
                where=locate(node),
                seen=f"{seen}; {node_text(node)}",
                expected=expected,
                next_step="check the arguments that the pass gives to the operator",
            ) from error

    def erase(self, node: fx.Node) -> None:
        """Remove a node that has no users."""
        self.graph.erase_node(node)
        self.changes += 1

    def discard(self, node: fx.Node) -> None:
        """Take back a call that was made to see its type: it does not count as a change."""
        self.graph.erase_node(node)
        self.changes -= 1

    def describe(self, node: fx.Node, like: fx.Node | None) -> None:
        """Copy source line and module path, and record which pass made the node."""
        if like is not None:
            for key in _KEPT_META:
                if key in like.meta:
                    node.meta[key] = like.meta[key]
        if self.origin:
            node.meta["origin"] = self.origin

    def finish(self) -> int:
        """Remove dead nodes and unused tensors, make the program callable again, return the changes."""
        self.changes += remove_dead_nodes(self.program)
        self.program.recompile()
        return self.changes


def set_bias(edit: Rewriter, layer: Layer, value: torch.Tensor) -> None:
    """Give a layer another bias, or its first one.

    The bias keeps its name if no other layer reads it; else it becomes a parameter of its own, beside
    the weight.

    Args:
        edit: The rewriter.
        layer: A layer whose operator takes a bias.
        value: The bias, [O], in the type of the layer's output.
    """
    assert layer.operator.bias is not None
    old = layer.bias
    if old is not None and old.op == "get_attr":
        users = [user for node in edit.graph.nodes if node.target == old.target for user in node.users]
        if len(users) == 1:
            edit.replace_tensor(old, value)
            return
    owner, _, leaf = layer.weight_name.rpartition(".")
    name = "bias" if leaf.startswith("weight") else f"{leaf}_bias"
    stored = edit.constant(f"{owner}.{name}" if owner else name, nn.Parameter(value), like=layer.node)
    edit.set_argument(layer.node, layer.operator.bias, stored)


def _parameter_name(node: fx.Node, position: int) -> str:
    target = node.target
    parameters = target._schema.arguments if isinstance(target, torch._ops.OpOverload) else ()
    return parameters[position].name if position < len(parameters) else ""


def remove_dead_nodes(program: Program) -> int:
    """Remove calls and tensor reads that nothing uses, and the tensors that nothing reads.

    Placeholders stay: they are the interface. Operators with side effects stay.

    Returns:
        How many nodes were removed.
    """
    removed = 0
    for node in reversed(list(program.graph.nodes)):
        if node.users or node.op in ("placeholder", "output") or has_side_effect(node):
            continue
        program.graph.erase_node(node)
        removed += 1
    delete_unused_tensors(program)
    return removed


def has_side_effect(node: fx.Node) -> bool:
    """Whether a node does something beside making its value: writes into a tensor, or asserts.

    Unlike `Node.is_impure`, random operators do not count: a dead dropout may go.
    """
    if isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable:
        return torch.Tag.nondeterministic_seeded not in node.target.tags and node.is_impure()
    return node.is_impure()


def delete_unused_tensors(program: Program) -> None:
    """Drop parameters and buffers that no node reads, so that they are neither kept nor saved."""
    used = {str(node.target) for node in program.graph.nodes if node.op in ("get_attr", "call_module")}
    module = program.graph_module
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in module.named_buffers(remove_duplicate=False)]
    for name in names:
        parts = name.split(".")
        if not any(".".join(parts[:count]) in used for count in range(1, len(parts) + 1)):
            program.delete_tensor(name)
