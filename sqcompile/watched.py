"""A runtime that shows values on the way: the program lowered once more, with these values among its outputs.

A file holds no more than its outputs, and runtimes keep nothing else. What a layer makes in a runtime is found by
asking the runtime for it: its kernels compute every value that is handed over. A value that is asked for cannot
be fused away, so the lowered program may differ from the file; `apart` says by how much its outputs do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from sqcompile.backend import Backend, Session
from sqcompile.metrics import Distance, DistanceMeter
from sqcompile.program import Program, value_of
from sqcompile.signature import Value
from sqcompile.text import rename_symbols, symbol_names


class WatchedSession:
    """Runs a program in a backend's runtime and hands over values on the way; as `run_watched` does in PyTorch.

    Args:
        program: The program; it is not changed.
        backend: What lowers and runs it.
        unwatched: The session of the file that was made from the program.
        threads: Threads within an operator; None leaves the choice to the runtime.
    """

    def __init__(
        self, program: Program, backend: Backend, unwatched: Session, *, threads: int | None = None
    ) -> None:
        self._program = program
        self._backend = backend
        self._unwatched = unwatched
        self._threads = threads
        self._nodes: list[fx.Node] = []
        self._session: Session | None = None
        self._meter = DistanceMeter()

    @property
    def apart(self) -> Distance:
        """Distance of the outputs, on all that it ran on, from those of the session that nobody watches."""
        return self._meter.result()

    def __call__(
        self, inputs: Sequence[Any], watched: Collection[fx.Node], on_value: Callable[[fx.Node, Any], None]
    ) -> list[Any]:
        """Run, and hand over the values of the watched nodes in graph order; the same nodes at each call.

        Returns:
            Flat outputs of the program.

        Raises:
            BackendError: If the program cannot be lowered with these outputs.
        """
        if self._session is None:
            self._nodes = [node for node in self._program.compute_nodes() if node in watched]
            artifact = self._backend.lower(with_outputs(self._program, self._nodes))
            self._session = self._backend.load(artifact, threads=self._threads)
        results = self._session.run(inputs)
        count = len(results) - len(self._nodes)
        for expected, seen in zip(self._unwatched.run(inputs), results[:count], strict=True):
            if isinstance(expected, torch.Tensor):
                self._meter.add(expected, seen)
        for node, value in zip(self._nodes, results[count:], strict=True):
            on_value(node, value)
        return results[:count]


def with_outputs(program: Program, nodes: Sequence[fx.Node]) -> Program:
    """Return a copy of a program that also returns the values of nodes of it, behind its own outputs."""
    copy = program.snapshot()
    twins = {node.name: node for node in copy.graph.nodes}
    symbols = symbol_names(program)
    own = copy.output.args[0]
    assert isinstance(own, (tuple, list))
    copy.output.args = ((*own, *(twins[node.name] for node in nodes)),)
    recorded = copy.output.meta.get("val")
    if isinstance(recorded, (tuple, list)):
        copy.output.meta["val"] = (*recorded, *(value_of(node) for node in nodes))
    outputs = (*copy.signature.outputs, *(_described(node, symbols) for node in nodes))
    copy.signature = dataclasses.replace(
        copy.signature, outputs=outputs, out_spec=pytree.tree_structure(tuple(range(len(outputs))))
    )
    copy.recompile()
    return copy


def _described(node: fx.Node, symbols: dict[str, str]) -> Value:
    value = value_of(node)
    assert isinstance(value, torch.Tensor)
    shape = tuple(size if isinstance(size, int) else rename_symbols(size, symbols) for size in value.shape)
    # No model names an output so: it cannot be taken for one of the model's own.
    return Value(f"watched:{node.name}", shape, value.dtype)
