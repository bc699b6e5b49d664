"""The reference backend: the program itself, run in PyTorch. Slow, exact, and everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from sqcompile.backend import Artifact, Backend, Session, check_threads
from sqcompile.errors import BackendError
from sqcompile.program import Program


class ReferenceArtifact(Artifact):
    """A program, as it is."""

    suffix: ClassVar[str] = ".pt2"

    def __init__(self, program: Program) -> None:
        self.program = program

    @property
    def size_bytes(self) -> int:
        """Size of the stored tensors as PyTorch holds them, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.program.tensors())

    def save(self, path: Path) -> list[Path]:
        """Write the program as a `.pt2` file."""
        self.program.save(path)
        return [path]


class ReferenceSession(Session):
    """Runs a program in PyTorch, without gradients."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.signature = program.signature

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Run on flat inputs."""
        with torch.no_grad():
            return self.program.run(inputs)


class ReferenceBackend(Backend):
    """Runs every program in PyTorch."""

    name: ClassVar[str] = "reference"

    def supports(self, program: Program, node: fx.Node) -> str | None:
        """Support everything."""
        return None

    def lower(self, program: Program) -> ReferenceArtifact:
        """Keep a snapshot of the program."""
        return ReferenceArtifact(program.snapshot())

    def load(self, source: Artifact | Path, *, threads: int | None = None) -> ReferenceSession:
        """Load a program from memory or from a `.pt2` file; PyTorch's own thread setting counts."""
        check_threads(threads)
        if isinstance(source, ReferenceArtifact):
            return ReferenceSession(source.program)
        if isinstance(source, Artifact):
            raise BackendError(
                "The reference backend runs programs only.",
                where="backend reference",
                seen=type(source).__name__,
                expected="ReferenceArtifact or the path of a .pt2 file",
                next_step="load the artifact with the backend that made it",
            )
        return ReferenceSession(Program.load(source))

    def facts(self) -> dict[str, str]:
        """Return the version and the threads of PyTorch."""
        return {"torch": str(torch.__version__), "threads": str(torch.get_num_threads())}


BACKEND = ReferenceBackend()
