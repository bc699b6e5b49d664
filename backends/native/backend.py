"""The native backend: Program -> plan -> `.sqm` file -> session of the C++ engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from sqcompile.backend import Artifact, Backend, Session
from sqcompile.errors import BackendError
from sqcompile.program import Program
from sqcompile.progress import Progress
from sqcompile.quantization.format import Format
from sqcompile.sparsity import Pattern

if TYPE_CHECKING:
    from sqcompile.bundle import BundleJob, BundlePart


class NativeBackend(Backend):
    """Lowers programs to plans, and runs them in the C++ engine."""

    name: ClassVar[str] = "native"
    exact: ClassVar[bool] = False
    """Whether products round nothing that the program does not round."""

    def supports(self, program: Program, node: fx.Node) -> str | None:
        """Return None if the engine can run the node, else the reason why not."""
        from sqcompile.backends.native.lower import constant_nodes, reason_against

        return reason_against(node, constant_nodes(program))

    def unsupported(self, program: Program) -> list[tuple[fx.Node, str]]:
        """Return every node that the engine cannot run, with the reason."""
        from sqcompile.backends.native.lower import constant_nodes, reason_against

        constants = constant_nodes(program)
        reasons = [(node, reason_against(node, constants)) for node in program.compute_nodes()]
        return [(node, reason) for node, reason in reasons if reason is not None]

    def lower(self, program: Program) -> Artifact:
        """Lower a program to a plan with packed weights.

        Raises:
            UnsupportedError: If it holds operators that the engine does not have; all are listed.
            BackendError: If the program returns a number that is no tensor.
        """
        from sqcompile.backends.native.artifact import NativeArtifact
        from sqcompile.backends.native.lower import lower

        self.require_support(program)
        plan, notes, products = lower(program, exact=self.exact)
        return NativeArtifact(plan, notes, products)

    def load(self, source: Artifact | Path, *, threads: int | None = None) -> Session:
        """Load a plan, from memory or from its file.

        Args:
            source: The artifact, or the path of the `.sqm` file.
            threads: Threads within an operator; None: one a core.

        Raises:
            FileError: If the file is missing, damaged, or another tool's.
            BackendError: If the artifact is another backend's, or there cannot be so many threads.
        """
        from sqcompile.backends.native.artifact import NativeArtifact
        from sqcompile.backends.native.session import load

        if isinstance(source, Artifact) and not isinstance(source, NativeArtifact):
            raise BackendError(
                "The artifact belongs to another backend.",
                seen=type(source).__name__,
                expected=NativeArtifact.__name__,
                next_step="load it with the backend that lowered it",
            )
        return load(source, threads)

    def calibrate(self, *, threads: int | None = None, progress: Progress | None = None) -> Path:
        """Measure the kernels on this machine, and keep their times in the user's cache.

        Args:
            threads: Threads of each product; None: as many as a session has. Lowering asks for those only.
            progress: Where it reports.

        Raises:
            BackendError: If there cannot be so many threads.
            FileError: If the file cannot be written.
        """
        from sqcompile.backends.native.kernel_times import cache_file
        from sqcompile.backends.native.measure_kernels import measure_kernels
        from sqcompile.backends.native.session import threads_of

        threads = threads_of(threads)
        return measure_kernels(threads=threads, progress=progress).save(cache_file(threads))

    def product_ns(
        self, shape: tuple[int, int], format: Format, sparsity: float, pattern: Pattern
    ) -> float | None:
        """Return what the product of one row with a weight takes by the times measured for its kernels, in ns."""
        from sqcompile.backends.native.kernel_times import form_names, kernel_times

        times, _ = kernel_times()
        forms = form_names(format, sparsity, pattern)
        return min(
            (times.predict(form, 1, *shape, density, cached=False) for form, density in forms), default=None
        )

    def bundle(self, job: BundleJob, folder: Path) -> BundlePart:
        """Write the model, `sqrun`, the library with its header, and an example in C.

        Raises:
            BackendError: If there is no runtime for the target, and none can be built here.
            FileError: If the given runtime is for another machine.
        """
        from sqcompile.backends.native.bundle import write_native_bundle

        return write_native_bundle(job, folder)

    def facts(self) -> dict[str, str]:
        """Return the instruction set, the threads of a session, and by what times kernels are chosen."""
        from sqcompile.backends.native.cpu import cpu_features
        from sqcompile.backends.native.kernel_times import default_threads, kernel_times
        from sqcompile.backends.native.kernels import default_isa

        times, remark = kernel_times()
        return {
            "instruction set": default_isa(),
            "threads": str(default_threads()),
            "CPU": str(cpu_features()),
            "kernels chosen by": remark or f"times of {times.cpu}, {times.isa}, {times.threads} threads",
        }


BACKEND = NativeBackend()
