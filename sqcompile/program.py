"""The program: a model as a torch.fx graph of ATen operators, with its tensors and its signature.

Calling a program runs it in PyTorch; that *is* the reference meaning which every backend is tested
against. A program owns its graph. Its tensors are immutable: a pass replaces a tensor and never
writes into its storage, so snapshots share all weights and cost almost nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.graph import CodeGen

from sqcompile.errors import Error, PassContractError
from sqcompile.levels import Level
from sqcompile.signature import Signature

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from sqcompile.quantization import ObserverState
    from sqcompile.sparsity import Sparsity


class Program:
    """A traced model.

    Attributes:
        graph_module: The graph and its tensors. Parameters and buffers keep the model's own names
            as `get_attr` targets; placeholders and outputs are flat.
        signature: Inputs, outputs and symbolic dimensions.
        level: Which operators the graph may hold.
        observers: What `observe` nodes have collected, by observer name (level `OBSERVED`).
        sparsity: What is promised about zeros, by name of the stored weight; verified after every pass.
        constraints: Ranges of the symbols in recorded shapes, as torch.export gave them.
        shared: Names of tensors that operators outside of this program read too, where it is a part of one.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        signature: Signature,
        *,
        level: Level = Level.ATEN,
        observers: Mapping[str, ObserverState] | None = None,
        sparsity: Mapping[str, Sparsity] | None = None,
        constraints: Mapping[Any, Any] | None = None,
    ) -> None:
        self.graph_module = graph_module
        self.signature = signature
        self.level = level
        self.observers: dict[str, ObserverState] = dict(observers or {})
        self.sparsity: dict[str, Sparsity] = dict(sparsity or {})
        self.constraints = dict(constraints or {})
        self.shared: frozenset[str] = frozenset()

    @property
    def graph(self) -> fx.Graph:
        """The torch.fx graph."""
        return self.graph_module.graph

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program in PyTorch: the model's own call and output structure.

        Raises:
            InputError: If the inputs do not fit the signature.
        """
        return self.signature.unflatten(self.run(self.signature.bind(args, kwargs)))

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Run on flat inputs (one a placeholder) and return flat outputs.

        Raises:
            InputError: If an operator refuses the values, such as a token beyond the vocabulary; the
                text names the operator.
        """
        try:
            return list(self.graph_module(*inputs))
        except Error:
            raise
        except Exception as error:
            from sqcompile.evaluate import explain_failure

            raise explain_failure(self, inputs, error) from error

    # --- tensors ---------------------------------------------------------------------------------

    def tensor(self, source: str | fx.Node) -> torch.Tensor:
        """Return the tensor of a name, or of a `get_attr` node.

        Raises:
            KeyError: If the program holds none of that name.
        """
        name = source if isinstance(source, str) else str(source.target)
        owner, leaf = self._owner(name)
        value = getattr(owner, leaf, None)
        if not isinstance(value, torch.Tensor):
            raise KeyError(name)
        return value

    def has_tensor(self, name: str) -> bool:
        """Whether the program holds a parameter or buffer of that name."""
        try:
            self.tensor(name)
        except KeyError:
            return False
        return True

    def set_tensor(self, name: str, value: torch.Tensor) -> None:
        """Replace a tensor, or add one. Parameters stay parameters if the type can be trained.

        Args:
            name: Dotted name, such as `layer1.0.conv1.weight`.
            value: The new tensor; its storage must not be written to afterwards.

        Raises:
            PassContractError: If something that is no tensor has that name already.
        """
        if not self.has_tensor(name) and not self._is_free(name):
            raise PassContractError(
                f"No tensor can be stored as '{name}': the name is taken.",
                where=f"tensor @{name}",
                seen="a module, or an attribute of one",
                expected="a name of its own",
                next_step="let Program.free_name or Rewriter.constant choose the name",
            )
        owner, leaf = self._owner(name, create=True)
        old = owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)
        owner.__dict__.pop(leaf, None)
        if not value.is_floating_point() or not (isinstance(value, nn.Parameter) or old is not None):
            owner.register_buffer(leaf, value.detach() if value.requires_grad else value)
            return
        if not isinstance(value, nn.Parameter):
            value = nn.Parameter(value.detach(), requires_grad=old is None or old.requires_grad)
        owner.register_parameter(leaf, value)

    def delete_tensor(self, name: str) -> None:
        """Remove a tensor that no node uses, and what was promised about it."""
        owner, leaf = self._owner(name)
        owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)
        owner.__dict__.pop(leaf, None)
        self.sparsity.pop(name, None)

    def free_name(self, name: str) -> str:
        """Return `name`, or `name_1`, `name_2`, … if it is taken; nothing lies inside a tensor."""
        parts = name.split(".")
        for count in range(1, len(parts)):
            if self.has_tensor(".".join(parts[:count])):
                name = ".".join([*parts[: count - 1], "_".join(parts[count - 1 :])])
                break
        free = name
        count = 0
        while not self._is_free(free):
            count += 1
            free = f"{name}_{count}"
        return free

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) of every tensor that the graph uses, each once, in graph order."""
        seen: set[str] = set()
        for node in self.graph.nodes:
            if node.op != "get_attr" or not node.users or str(node.target) in seen:
                continue
            seen.add(str(node.target))
            if self.has_tensor(str(node.target)):
                yield str(node.target), self.tensor(node)

    def _is_free(self, name: str) -> bool:
        """Whether nothing has that name: no tensor, no module, no attribute of a module."""
        *path, leaf = name.split(".")
        owner: nn.Module = self.graph_module
        for part in path:
            if part not in owner._modules:
                return getattr(owner, part, None) is None
            child = owner._modules[part]
            if child is None:
                return True
            owner = child
        return getattr(owner, leaf, None) is None

    def _owner(self, name: str, *, create: bool = False) -> tuple[nn.Module, str]:
        *path, leaf = name.split(".")
        owner: nn.Module = self.graph_module
        for part in path:
            child = owner._modules.get(part)
            if child is None:
                if not create:
                    raise KeyError(name)
                child = nn.Module()
                owner.add_module(part, child)
            owner = child
        return owner, leaf

    # --- copies and views --------------------------------------------------------------------------

    def snapshot(self) -> Program:
        """Return an independent copy that shares every tensor; what observers have seen is copied."""
        graph = fx.Graph()
        output = graph.graph_copy(self.graph, {}, return_output_node=True)
        assert isinstance(output, tuple)
        value, old = output
        new = graph.output(value)
        new.meta = copy.copy(old.meta)
        twin = Program(
            graph_module_of(self.graph_module, graph),
            self.signature,
            level=self.level,
            observers=copy.deepcopy(self.observers),
            sparsity=self.sparsity,
            constraints=self.constraints,
        )
        twin.shared = self.shared
        twin.graph_module.train(self.graph_module.training)
        return twin

    def restore(self, snapshot: Program) -> None:
        """Become what `snapshot` holds; the snapshot must not be used afterwards."""
        self.__dict__.update(snapshot.__dict__)

    def recompile(self) -> None:
        """Make the callable follow the graph after it was edited."""
        self.graph_module.recompile()

    def compute_nodes(self) -> Iterator[fx.Node]:
        """Yield the nodes that compute: neither inputs, nor tensors, nor the output."""
        for node in self.graph.nodes:
            if node.op not in ("placeholder", "get_attr", "output"):
                yield node

    @property
    def placeholders(self) -> list[fx.Node]:
        """The input nodes, in the signature's order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        """The output node; its first argument is the flat tuple of results."""
        return self.graph.output_node()

    def text(self) -> str:
        """Return the canonical text of the graph; see `sqcompile.text`."""
        from sqcompile.text import program_text

        return program_text(self)

    __str__ = text

    def __repr__(self) -> str:
        count = sum(1 for _ in self.compute_nodes())
        operators = f"{count} operator" + ("" if count == 1 else "s")
        return f"<Program: {self.signature}, {operators}, level {self.level}>"

    def fingerprint(self, *, content: bool = False) -> str:
        """Return a hash of everything that a program is; see `sqcompile.fingerprint`."""
        from sqcompile.fingerprint import fingerprint

        return fingerprint(self, content=content)

    def to_exported_program(self) -> ExportedProgram:
        """Return the program as a `torch.export.ExportedProgram` that shares its tensors."""
        from sqcompile.tracing.lift import lift

        return lift(self)

    def save(self, path: str | Path) -> None:
        """Write the program to a `.pt2` file; see `Program.load`."""
        from sqcompile.storage import save_program

        save_program(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Program:
        """Read a program that `save` wrote, or any `.pt2` file of torch.export."""
        from sqcompile.storage import load_program

        return load_program(Path(path))


def graph_module_of(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """Wrap a graph whose inputs and outputs are flat, taking its tensors from `root`."""
    graph.set_codegen(CodeGen())
    # Lazy: its code is made at the first run. Most snapshots never run, and passes edit in steps.
    return _LazyGraphModule(root, graph, class_name="Program")


def value_of(node: fx.Node) -> Any:
    """Return the recorded value (a fake tensor, or a tuple of them) of a node, or None."""
    return node.meta.get("val")
