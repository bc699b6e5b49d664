"""A plan, loaded by the C++ engine and called as the model that it came from."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sqcompile.backend import Session
from sqcompile.backends.native import _native
from sqcompile.backends.native.artifact import NativeArtifact
from sqcompile.backends.native.cpu import cpu_features
from sqcompile.backends.native.kernels import default_isa
from sqcompile.errors import BackendError, FileError, InputError
from sqcompile.files import require_file
from sqcompile.signature import Signature

_MOST_THREADS = 256


class NativeSession(Session):
    """A session of the C++ engine; it may be called from several threads, which then take turns.

    Attributes:
        signature: The program's interface.
        model: The mapped file, which other sessions may share.
        inner: The engine's session.
    """

    def __init__(self, model: _native.Model, threads: int) -> None:
        self.model = model
        self.signature = Signature.from_json(model.metadata)
        self.inner = _native.Session(model, threads, default_isa())

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Run on flat, checked inputs and return flat outputs.

        Raises:
            InputError: If an operator refuses the values, such as a token beyond the vocabulary.
            BackendError: If there is not enough memory.
        """
        try:
            results = iter(self.inner.run(self._arrays(inputs)))
        except ValueError as error:
            raise InputError(
                "The engine refuses the inputs.",
                where="call of the program",
                seen=str(error),
                next_step="check the values: indices have to lie inside what they index",
            ) from None
        except (RuntimeError, MemoryError) as error:
            raise BackendError(
                "The engine failed while running the model.",
                seen=str(error) or type(error).__name__,
                next_step="use smaller inputs, or compare with backend='reference'",
            ) from error
        return [
            torch.from_numpy(next(results)) if value.is_tensor else value.constant
            for value in self.signature.outputs
        ]

    def profile(self, inputs: Sequence[Any], layers: Collection[str], *, runs: int = 10) -> dict[str, float]:
        """Return the median time of layers in ns, by name: of all steps that a layer became."""
        arrays = self._arrays(inputs)
        times = np.median([self.inner.profile(arrays) for _ in range(runs)], axis=0)
        found: dict[str, float] = {}
        for (_, name), time_ns in zip(self.model.steps, times, strict=True):
            if name in layers:
                found[name] = found.get(name, 0.0) + float(time_ns)
        return found

    def _arrays(self, inputs: Sequence[Any]) -> list[NDArray[Any]]:
        return [
            item.detach().contiguous().numpy()
            for item, value in zip(inputs, self.signature.inputs, strict=True)
            if value.is_tensor
        ]


def load(source: NativeArtifact | Path, threads: int | None) -> NativeSession:
    """Load an artifact, from memory or from its file.

    Raises:
        FileError: If the file is missing, damaged, or another tool's.
        BackendError: If there cannot be so many threads.
    """
    if threads is None:
        threads = min(cpu_features().physical_cores, _MOST_THREADS)
    if not 1 <= threads <= _MOST_THREADS:
        raise BackendError(
            "A session cannot have so many threads.",
            where="threads",
            seen=threads,
            expected=f"1 to {_MOST_THREADS}, or None",
            next_step="pass threads=None to use every core",
        )
    if isinstance(source, NativeArtifact):
        # Through a file, so that the weights are in memory once, as the page cache holds them.
        with tempfile.TemporaryDirectory(prefix="sqcompile.") as folder:
            path = source.save(Path(folder) / "model.sqm")[0]
            return NativeSession(_native.Model.open(str(path)), threads)
    path = Path(source)
    require_file(path, "model")
    try:
        model = _native.Model.open(str(path))
        return NativeSession(model, threads)
    except (RuntimeError, ValueError, MemoryError) as error:
        raise FileError(
            "The model cannot be loaded.",
            where=str(path),
            seen=str(error) or "not enough memory",
            expected="a whole .sqm file of a version that this build reads",
            next_step="save the model again",
        ) from error
