"""ONNX Runtime: Program -> ONNX -> session.

selection/       which of ONNX Runtime's forms each layer takes, decided on the graph
operators.py     those forms as operators that run in PyTorch; packing.py: MatMulNBits' weights
translations.py  each of them as an ONNX operator
lower.py         selection, torch's exporter, then cleanup.py, compact.py, saturation.py
artifact.py      the model, in memory and in files
generation/      language models that take only new tokens, with a cache
session.py       the model, loaded
bundle.py        the model with what it needs to run elsewhere; example/: its examples
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from sqcompile.backend import Artifact, Backend, Session
from sqcompile.errors import BackendError
from sqcompile.program import Program

if TYPE_CHECKING:
    from sqcompile.bundle import BundleJob, BundlePart


class OnnxRuntimeBackend(Backend):
    """Lowers programs to ONNX models and runs them in ONNX Runtime."""

    name: ClassVar[str] = "onnxruntime"

    def supports(self, program: Program, node: fx.Node) -> str | None:
        """Return None if the node can become ONNX, else the reason why not."""
        from sqcompile.backends.onnxruntime.support import reason_against

        return reason_against(node)

    def lower(self, program: Program) -> Artifact:
        """Lower a program to an ONNX model.

        Raises:
            UnsupportedError: If it holds operators that ONNX cannot express; all are listed.
            BackendError: If the exporter fails.
        """
        from sqcompile.backends.onnxruntime.lower import lower

        self.require_support(program)
        return lower(program)

    def load(self, source: Artifact | Path, *, threads: int | None = None) -> Session:
        """Load an ONNX model, from memory or from its file.

        Args:
            source: The artifact, or the path of the `.onnx` file.
            threads: Threads within an operator; None leaves the choice to ONNX Runtime.

        Raises:
            FileError: If the file is missing, damaged, or another tool's.
            BackendError: If the runtime refuses the model.
        """
        from sqcompile.backends.onnxruntime.artifact import OnnxArtifact
        from sqcompile.backends.onnxruntime.session import load

        if isinstance(source, Artifact) and not isinstance(source, OnnxArtifact):
            raise BackendError(
                "The artifact belongs to another backend.",
                seen=type(source).__name__,
                expected=OnnxArtifact.__name__,
                next_step="load it with the backend that lowered it",
            )
        return load(source, threads)

    def bundle(self, job: BundleJob, folder: Path) -> BundlePart:
        """Write the model, session options, and examples in Python and C++.

        Raises:
            FileError: If the model cannot be read.
        """
        from sqcompile.backends.onnxruntime.bundle import write_onnx_bundle

        return write_onnx_bundle(job, folder)

    def facts(self) -> dict[str, str]:
        """Return the versions of ONNX Runtime and ONNX."""
        return {name: version(name) for name in ("onnxruntime", "onnx", "onnxscript")}


BACKEND = OnnxRuntimeBackend()
