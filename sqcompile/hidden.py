"""Hidden states: what leaves a model's modules, of a dense teacher and of the module that is trained alike.

    teacher, student = HiddenStates(model, names), HiddenStates(module, names)
    with torch.no_grad():
        wanted = model(x)
    loss = distill_logits(module(x), wanted) + distill_states(student, teacher)

The widths of teacher and student must agree: compress inside of the modules that are watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sqcompile.errors import InputError, SelectionError, did_you_mean
from sqcompile.program import Program
from sqcompile.text import module_path


@runtime_checkable
class Watchable(Protocol):
    """A module that runs as one piece of code, and shows what leaves its parts by itself."""

    def watch(self, names: Sequence[str], tell: Callable[[dict[str, Tensor]], None] | None) -> None:
        """Tell a function what leaves the modules of some names, at every call from now on."""


class HiddenStates(Mapping[str, Tensor]):
    """The values that left some modules at the last call, by module path; they carry gradients.

    Ends its watch when it is closed, or left as a context manager.

    Args:
        module: A model, or the module that a training function was given.
        names: Module paths, such as `model.layers.3`. A module that is called twice shows its last value.

    Raises:
        SelectionError: If there is no such module.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        self._values: dict[str, Tensor] = {}
        self._watched: Watchable | None = None
        self._hooks: list[Any] = []
        if isinstance(module, Watchable):
            self._watched = module
            module.watch(self.names, self._values.update)
            return
        modules = dict(module.named_modules())
        for name in self.names:
            if name not in modules:
                raise _unknown(name, list(modules))
        self._hooks = [modules[name].register_forward_hook(self._hook(name)) for name in self.names]

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            if leaves:
                self._values[name] = leaves[0]

        return keep

    def __getitem__(self, name: str) -> Tensor:
        if name in self.names and name not in self._values:
            raise InputError(
                "There are no hidden states yet.",
                where=f"module '{name}'",
                seen="the module was not called, or returned no tensor",
                expected="a call of the model after the states were asked for",
                next_step="run the model, then read what left its modules",
            )
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def close(self) -> None:
        """Stop watching; what was seen last stays."""
        if self._watched is not None:
            self._watched.watch((), None)
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._watched = [], None

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def output_of_module(program: Program, name: str) -> fx.Node:
    """Return the value that leaves a module: the last one that something outside of it reads.

    Raises:
        SelectionError: If no operator of the program comes from such a module.
    """
    found: fx.Node | None = None
    for node in program.compute_nodes():
        if _is_inside(node, name) and any(not _is_inside(user, name) for user in node.users):
            found = node
    if found is None:
        paths = {module_path(node) for node in program.compute_nodes()}
        raise _unknown(name, sorted({parent for path in paths for parent in _parents(path)}))
    return found


def _is_inside(node: fx.Node, name: str) -> bool:
    path = module_path(node)
    return path == name or path.startswith(f"{name}.")


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))] if path else []


def _unknown(name: str, known: list[str]) -> SelectionError:
    return SelectionError(
        f"There is no module '{name}' whose states could be read.",
        where="hidden states",
        seen=name,
        expected="the path of a module of the model that computes something",
        next_step=did_you_mean(name, [item for item in known if item]),
    )
