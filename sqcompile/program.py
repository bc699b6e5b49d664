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
from torch.fx.graph import CodeGen

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
        """Run on flat inputs (one a placeholder) and return flat outputs."""
        return list(self.graph_module(*inputs))

    # --- tensors ---------------------------------------------------------------------------------

    def tensor(self, source: str | fx.Node) -> torch.Tensor:
        """Return the tensor of a name, or of a `get_attr` node."""
        name = source if isinstance(source, str) else str(source.target)
        owner, leaf = self._owner(name)
        value = getattr(owner, leaf)
        if not isinstance(value, torch.Tensor):
            raise KeyError(name)
        return value

    def has_tensor(self, name: str) -> bool:
        """Whether the program holds a parameter or buffer of that name."""
        try:
            self.tensor(name)
        except (KeyError, AttributeError):
            return False
        return True

    def set_tensor(self, name: str, value: torch.Tensor) -> None:
        """Replace a tensor, or add one. Parameters stay parameters if the type can be trained.

        Args:
            name: Dotted name, such as `layer1.0.conv1.weight`.
            value: The new tensor; its storage must not be written to afterwards.
        """
        owner, leaf = self._owner(name, create=True)
        was_parameter = leaf in owner._parameters or isinstance(value, nn.Parameter)
        owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)
        owner.__dict__.pop(leaf, None)
        if was_parameter and value.is_floating_point():
            owner.register_parameter(
                leaf, value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=True)
            )
        else:
            owner.register_buffer(leaf, value.detach() if isinstance(value, nn.Parameter) else value)

    def delete_tensor(self, name: str) -> None:
        """Remove a tensor that no node uses."""
        owner, leaf = self._owner(name)
        owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)
        owner.__dict__.pop(leaf, None)

    def free_name(self, name: str) -> str:
        """Return `name`, or `name_1`, `name_2`, … if it is taken."""
        taken = name
        count = 0
        while self.has_tensor(taken):
            count += 1
            taken = f"{name}_{count}"
        return taken

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) of every tensor that the graph uses, each once, in graph order."""
        seen: set[str] = set()
        for node in self.graph.nodes:
            if node.op != "get_attr" or not node.users or str(node.target) in seen:
                continue
            seen.add(str(node.target))
            if self.has_tensor(str(node.target)):
                yield str(node.target), self.tensor(node)

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
        """Return an independent copy that shares every tensor."""
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
            observers=self.observers,
            sparsity=self.sparsity,
            constraints=self.constraints,
        )
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

    def fingerprint(self) -> str:
        """Return a hash of structure, recorded shapes and tensor identities."""
        from sqcompile.fingerprint import fingerprint

        return fingerprint(self)

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
    return fx.GraphModule(root, graph, class_name="Program")


def value_of(node: fx.Node) -> Any:
    """Return the recorded value (a fake tensor, or a tuple of them) of a node, or None."""
    return node.meta.get("val")
