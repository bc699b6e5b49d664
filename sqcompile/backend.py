"""What a backend is: it says what it supports, lowers a program to an artifact, and loads it as a session."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from sqcompile.errors import BackendError, UnsupportedError, did_you_mean
from sqcompile.levels import Level
from sqcompile.program import Program
from sqcompile.progress import Progress
from sqcompile.quantization.format import Format
from sqcompile.signature import Signature, short_dtype
from sqcompile.sparsity import Pattern

if TYPE_CHECKING:
    from sqcompile.bundle import BundleJob, BundlePart

# Modules that define `BACKEND`, an instance; imported only when asked for, so that a missing runtime
# hurts nobody who does not use it.
_BACKENDS = {
    "reference": "sqcompile.backends.reference",
    "onnxruntime": "sqcompile.backends.onnxruntime",
    "native": "sqcompile.backends.native.backend",
    "native-exact": "sqcompile.backends.native.exact",
}

PREFERENCE = ("native", "onnxruntime", "reference")
"""The backends that `auto` tries, fastest first."""


class Session(ABC):
    """A loaded artifact: called as the model is, it returns what the model returns."""

    signature: Signature

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.signature}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run with the model's own call and output structure.

        Raises:
            InputError: If the inputs do not fit the signature.
        """
        return self.signature.unflatten(self.run(self.signature.bind(args, kwargs)))

    @abstractmethod
    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Run on flat, checked inputs (`Signature.bind`) and return flat outputs as torch tensors."""

    def profile(
        self, inputs: Sequence[Any], layers: Mapping[str, int], *, runs: int = 10
    ) -> dict[str, float]:
        """Return the median time of layers in ns, by name; backends that cannot tell return nothing.

        Args:
            inputs: Flat, checked inputs of one call.
            layers: The layers that are asked for, by name, with the number of weights of each: layers that run as
                one share its time by that.
            runs: Calls to take the median of.
        """
        return {}

    def peak(self) -> float | None:
        """Return how many multiply-adds of 8-bit codes its threads could do in a ns, or None if that is not known.

        It is measured when asked for, with operands that are in registers already.
        """
        return None

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int,
        *,
        attention_mask: Any = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        on_token: Callable[[int, int], object] | None = None,
        kv_cache: str = "float32",
    ) -> Any:
        """Continue prompts of a language model.

        Args:
            input_ids: Tokens [batch, sequence], or a list of lists of different lengths.
            max_new_tokens: Tokens to choose for each row.
            attention_mask: [batch, sequence], 0 where `input_ids` is padding, on either side.
            temperature: 0 takes the most likely token; else logits are divided by it and one is drawn.
            top_k: Draw among so many of the most likely; 0: among all.
            top_p: Draw among the fewest that together have this probability.
            seed: Of the draws.
            eos_token_id: Tokens that end a row.
            pad_token_id: What follows in rows that ended earlier than others; None: the first that ends one.
            on_token: Called with (row, token) as soon as a token is chosen; False ends the generation.
            kv_cache: How keys and values are kept: `float32` or `int8`.

        Returns:
            Prompts and new tokens: [batch, sequence + new] of int64, or lists where lists were given.

        Raises:
            InputError: If the prompts do not fit the model, or an option is out of range.
            BackendError: If the model is none that generates, or its backend does not.
        """
        raise BackendError(
            "This session does not generate text.",
            where=type(self).__name__,
            expected="a language model compiled for the native engine or ONNX Runtime",
            next_step="compile it with backend='native'",
        )


@dataclass(frozen=True)
class LayerChoice:
    """What a backend made of a layer.

    Attributes:
        form: How its weight is stored and multiplied, such as `int8, bitmask`.
        remark: What the choice costs, or why zeros do not pay; mostly nothing.
    """

    form: str
    remark: str = ""


class Artifact(ABC):
    """A lowered program, in memory or in files of ours, ready to be saved or loaded.

    Attributes:
        suffix: File name suffix, such as `.onnx`.
        notes: What the backend has to say about the choices it made, for the report.
        choices: What became of layers, by name, where the backend had a choice.
    """

    suffix: ClassVar[str]
    notes: Sequence[str] = ()
    choices: Mapping[str, LayerChoice] = MappingProxyType({})

    def __repr__(self) -> str:
        # Not its size, for which some are written first.
        return f"<{type(self).__name__}: {self.suffix}>"

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """Size of all its files, in bytes."""

    def predict(self, inputs: Sequence[Any]) -> dict[str, float]:
        """Return what layers will take in ns, by name; backends without a cost model return nothing.

        Args:
            inputs: Flat, checked inputs of the call.
        """
        return {}

    @abstractmethod
    def save(self, path: Path) -> list[Path]:
        """Write it, whole or not at all (temporary name, fsync, rename), and return the files.

        Raises:
            FileError: If it cannot be written.
        """

    def save_folder(self, folder: Path, config: Mapping[str, Any]) -> list[Path]:
        """Write it into a folder, beside tokenizer and configuration, and return the files.

        Args:
            folder: The folder.
            config: What config.json and generation_config.json of the source say; empty if there is none.

        Raises:
            FileError: If it cannot be written.
        """
        return self.save(folder / f"model{self.suffix}")


class Backend(ABC):
    """Turns programs into artifacts and artifacts into sessions."""

    name: ClassVar[str]

    def __repr__(self) -> str:
        return f"<Backend {self.name}>"

    @abstractmethod
    def supports(self, program: Program, node: fx.Node) -> str | None:
        """Return None if the backend can run the node, else the reason why not."""

    @abstractmethod
    def lower(self, program: Program) -> Artifact:
        """Lower a program.

        Raises:
            UnsupportedError: If it holds operators that the backend cannot run; all are listed.
            BackendError: If lowering fails.
        """

    @abstractmethod
    def load(self, source: Artifact | Path, *, threads: int | None = None) -> Session:
        """Load an artifact, from memory or from its file.

        Args:
            source: The artifact, or the path of its main file.
            threads: Threads within an operator; None leaves the choice to the runtime.

        Raises:
            FileError: If the file is missing, damaged or of another kind.
            BackendError: If the runtime refuses it.
        """

    def calibrate(self, *, threads: int | None = None, progress: Progress | None = None) -> Path:
        """Measure on this machine what the choice of kernels depends on, and keep it in the user's cache.

        Args:
            threads: Threads within an operator; None: as many as a session has.
            progress: Where it reports.

        Returns:
            The file that was written (JSON).

        Raises:
            BackendError: If the backend chooses nothing by measured times.
            FileError: If the file cannot be written.
        """
        raise BackendError(
            f"The {self.name} backend chooses no kernels by measured times.",
            where="calibrate",
            expected="native",
            next_step="measure the native backend's kernels: sqcompile bench --kernels",
        )

    def product_ns(
        self, shape: tuple[int, int], format: Format, sparsity: float, pattern: Pattern
    ) -> float | None:
        """Return what the product of one row with a weight takes by the times measured for its kernels, in ns.

        Args:
            shape: The weight's, [O, K]; it is read from memory.
            format: Format of the weight.
            sparsity: Fraction of the weights, or of the blocks, that is zero.
            pattern: Pattern of the zeros.

        Returns:
            The time in ns; None if the backend knows no times, or has no kernel of that format.
        """
        return None

    def bundle(self, job: BundleJob, folder: Path) -> BundlePart:
        """Write what runs an artifact of this backend without sqcompile; `sqcompile.bundle` writes the rest.

        Args:
            job: The artifact, the target, example inputs and their outputs.
            folder: Where the files go.

        Raises:
            BackendError: If the backend has nothing that runs without sqcompile, or not for the target.
        """
        raise BackendError(
            f"The {self.name} backend needs PyTorch: there is nothing to bundle.",
            where=str(job.source),
            expected="a .sqm or .onnx file",
            next_step="compile to one of them: sqcompile compile MODEL -o model.sqm",
        )

    def facts(self) -> dict[str, str]:
        """Return what the backend runs on here, by name: versions, instruction set, threads."""
        return {}

    def unsupported(self, program: Program) -> list[tuple[fx.Node, str]]:
        """Return every node that the backend cannot run, with the reason."""
        found = []
        for node in program.compute_nodes():
            reason = self.supports(program, node)
            if reason is not None:
                found.append((node, reason))
        return found

    def require_support(self, program: Program) -> None:
        """Check the whole program.

        Raises:
            UnsupportedError: Listing every unsupported node with module path and source line.
        """
        from sqcompile.text import locate, operator_name

        found = self.unsupported(program)
        if not found:
            return
        lines = [f"{operator_name(node)} at {locate(node)}: {reason}" for node, reason in found]
        raise UnsupportedError(
            f"The {self.name} backend cannot run {len(found)} of the program's operators.",
            where=lines[0] if len(lines) == 1 else "\n    " + "\n    ".join(lines),
            seen=", ".join(sorted({operator_name(node) for node, _ in found})),
            next_step=self._way_out(program, [node for node, _ in found]),
        )

    def _way_out(self, program: Program, nodes: Sequence[fx.Node]) -> str:
        """Return what to do about nodes that this backend cannot run: what mends it, or who can."""
        if program.level is Level.OBSERVED:
            return "put calibrate and freeze-observers behind insert-observers: nothing is quantized before"
        values = [node.meta.get("val") for node in nodes]
        kinds = {value.dtype for value in values if isinstance(value, torch.Tensor)}
        odd = kinds & {torch.float16, torch.bfloat16, torch.float64}
        if odd:
            names = " and ".join(sorted(map(short_dtype, odd)))
            return f"convert the model and its inputs from {names} to float32: model.float()"
        able = [
            f"backend='{name}'"
            for name in PREFERENCE
            if not self.name.startswith(name) and _runs(name, program)
        ]
        return f"use {' or '.join(able)}, which can; or compile a part of the model without them"


def _runs(name: str, program: Program) -> bool:
    try:
        return not get_backend(name).unsupported(program)
    except BackendError:  # it is not installed
        return False


def check_threads(threads: object, most: int | None = None) -> None:
    """Check a number of threads.

    Args:
        threads: The number.
        most: The most that a runtime can have, if there is a limit.

    Raises:
        BackendError: If it is neither None nor a whole number from 1 to `most`.
    """
    if threads is None:
        return
    if isinstance(threads, int) and not isinstance(threads, bool) and 1 <= threads <= (most or threads):
        return
    raise BackendError(
        "A session cannot have so many threads.",
        where="threads",
        seen=repr(threads),
        expected=f"1 to {most}, or None" if most else "a whole number from 1 on, or None",
        next_step="pass threads=None, which leaves the choice to the runtime",
    )


def get_backend(name: str) -> Backend:
    """Return a backend by name.

    Raises:
        BackendError: If there is none of that name, or what it needs is not installed.
    """
    if name not in _BACKENDS:
        raise BackendError(
            f"There is no backend '{name}'.",
            where="backend",
            seen=name,
            expected=", ".join(["auto", *_BACKENDS]),
            next_step=did_you_mean(name, ["auto", *_BACKENDS]),
        )
    try:
        module = importlib.import_module(_BACKENDS[name])
    except ImportError as error:
        raise BackendError(
            f"The {name} backend cannot be loaded.",
            where="backend",
            seen=f"{type(error).__name__}: {error}",
            next_step="install what is missing: pip install sqcompile",
        ) from error
    backend: Backend = module.BACKEND
    return backend


def backend_names() -> list[str]:
    """Return the names of the backends, without `auto`."""
    return list(_BACKENDS)
