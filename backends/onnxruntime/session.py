"""A loaded ONNX model, called as the model that it came from."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch

from sqcompile.backend import Session
from sqcompile.backends.onnxruntime.artifact import OnnxArtifact, read_signature
from sqcompile.backends.onnxruntime.profile import layer_times
from sqcompile.errors import BackendError, FileError
from sqcompile.files import require_file
from sqcompile.signature import Signature

_ERRORS_ONLY = 3


class OnnxSession(Session):
    """An ONNX Runtime session with the model's own call and output structure.

    Attributes:
        signature: The program's interface.
        inner: The `onnxruntime.InferenceSession`.
    """

    def __init__(
        self, inner: onnxruntime.InferenceSession, signature: Signature, source: OnnxArtifact | Path
    ) -> None:
        self.inner = inner
        self.signature = signature
        self._source = source
        self._inputs = [item.name for item in inner.get_inputs()]
        self._outputs = [item.name for item in inner.get_outputs()]

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Run on flat, checked inputs and return flat outputs.

        Raises:
            BackendError: If the runtime fails.
        """
        try:
            results = iter(self.inner.run(self._outputs, self._feeds(inputs)))
        except Exception as error:
            raise BackendError(
                "ONNX Runtime failed while running the model.",
                seen=_text(error),
                next_step="compare with the reference: compile with backend='reference'",
            ) from error
        return [
            torch.from_numpy(np.asarray(next(results))) if value.is_tensor else value.constant
            for value in self.signature.outputs
        ]

    def profile(
        self, inputs: Sequence[Any], layers: Mapping[str, int], *, runs: int = 10
    ) -> dict[str, float]:
        """Return the median time of layers in ns, by name, measured by the runtime itself."""
        options = _options(self.inner.get_session_options().intra_op_num_threads or None)
        source = self._source
        if isinstance(source, OnnxArtifact):
            written = ir.to_proto(source.model)

            def open_session(options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
                return _open_artifact(source, options)
        else:
            written = onnx.load(source, load_external_data=False)

            def open_session(options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
                return _open(str(source), options)

        return layer_times(open_session, options, written, self._feeds(inputs), layers, runs)

    def _feeds(self, inputs: Sequence[Any]) -> dict[str, np.ndarray]:
        tensors = [item for item, value in zip(inputs, self.signature.inputs, strict=True) if value.is_tensor]
        return {name: _to_numpy(item) for name, item in zip(self._inputs, tensors, strict=True)}


def load(source: OnnxArtifact | Path, threads: int | None) -> OnnxSession:
    """Load an artifact, from memory or from its file.

    Raises:
        FileError: If the file is missing, damaged, or another tool's.
        BackendError: If the runtime refuses the model.
    """
    options = _options(threads)
    if isinstance(source, OnnxArtifact):
        return OnnxSession(_open_artifact(source, options), source.signature, source)
    path = Path(source)
    require_file(path, "ONNX model")
    try:
        inner = _open(str(path), options)
    except Exception as error:
        raise FileError(
            "The ONNX model cannot be loaded.",
            where=str(path),
            seen=_text(error),
            expected="a whole ONNX file, with its .data file beside it if it has one",
            next_step="save the model again",
        ) from error
    return OnnxSession(inner, read_signature(inner.get_modelmeta().custom_metadata_map, path), path)


def _open_artifact(
    artifact: OnnxArtifact, options: onnxruntime.SessionOptions
) -> onnxruntime.InferenceSession:
    try:
        if not artifact.external:
            return _open(artifact.to_bytes(), options)
        with tempfile.TemporaryDirectory(prefix="sqcompile.") as folder:
            return _open(str(artifact.save(Path(folder) / "model.onnx")[0]), options)
    except FileError:
        raise
    except Exception as error:
        raise BackendError(
            "ONNX Runtime refuses the model.",
            seen=_text(error),
            next_step="compile with backend='reference', and report this with the text of the program",
        ) from error


def _open(model: str | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _options(threads: int | None) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        if threads < 1:
            raise BackendError(
                "A session needs at least one thread.", seen=threads, expected="1 or more, or None"
            )
        options.intra_op_num_threads = threads
    return options


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().numpy()


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
