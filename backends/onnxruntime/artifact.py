"""A lowered program as an ONNX model: in memory, or in a file with its data beside it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sqcompile.backend import Artifact
from sqcompile.backends.onnxruntime.generation.folder import CONFIG, genai_config
from sqcompile.backends.onnxruntime.generation.rewrite import Generation, NoGenerationError
from sqcompile.errors import FileError
from sqcompile.files import atomic_file, sync, write_errors
from sqcompile.signature import SIGNATURE, Signature

GENERATION = "sqcompile.generation"
"""Key under which a model that takes only new tokens says what it keeps of earlier ones, as JSON."""

EXTERNAL_ABOVE_BYTES = 2**31 - 2**26
"""Tensors of more bytes than this go to a file beside the model: protobuf messages end at 2 GiB."""

_EXTERNAL_TENSOR_BYTES = 1024


class OnnxArtifact(Artifact):
    """An ONNX model.

    Attributes:
        model: The model, as onnx_ir holds it; its tensors share memory with the program's.
        signature: The program's interface.
        notes: What the report should say about the choices made.
        external_above_bytes: Tensors of more bytes in all are written to `<name>.data`.
    """

    suffix = ".onnx"

    def __init__(
        self,
        model: ir.Model,
        signature: Signature,
        notes: Sequence[str] = (),
        generating: Callable[[], OnnxArtifact] | None = None,
    ) -> None:
        self.model = model
        self.signature = signature
        self.notes = tuple(notes)
        self.external_above_bytes = EXTERNAL_ABOVE_BYTES
        self._generating = generating
        self._generator: OnnxArtifact | NoGenerationError | None = None

    def generator(self) -> OnnxArtifact:
        """Return the model that takes only new tokens, with a cache; it is made at the first call.

        Raises:
            NoGenerationError: If this is no causal language model, as far as the rules can show.
            BackendError: If the exporter fails.
        """
        if GENERATION in self.model.metadata_props:
            return self
        if self._generator is None:
            try:
                if self._generating is None:
                    raise NoGenerationError("it was lowered without the program")
                self._generator = self._generating()
                self._generator.external_above_bytes = self.external_above_bytes
            except NoGenerationError as error:
                self._generator = error
        if isinstance(self._generator, NoGenerationError):
            raise self._generator
        return self._generator

    @property
    def tensor_bytes(self) -> int:
        """Size of all stored tensors."""
        tensors = (value.const_value for value in self.model.graph.initializers.values())
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def external(self) -> bool:
        """Whether the tensors need a file of their own."""
        return self.tensor_bytes > self.external_above_bytes

    @property
    def size_bytes(self) -> int:
        """Size of all its files."""
        if not self.external:
            return len(self.to_bytes())
        return self.tensor_bytes + len(_without_tensors(self.model))

    def to_bytes(self) -> bytes:
        """Return the model as one protobuf message; only possible below 2 GiB."""
        message: bytes = ir.to_proto(self.model).SerializeToString()
        return message

    def save(self, path: Path) -> list[Path]:
        """Write the model, whole or not at all; tensors above the limit go to `<name>.data` beside it.

        Raises:
            FileError: If it cannot be written.
        """
        path = Path(path)
        if not self.external:
            with atomic_file(path) as temporary:
                temporary.write_bytes(self.to_bytes())
            return [path]
        return self._save_external(path)

    def save_folder(self, folder: Path, config: Mapping[str, Any]) -> list[Path]:
        """Write it into a folder; a language model as onnxruntime-genai runs it, with `genai_config.json`.

        Raises:
            FileError: If it cannot be written.
        """
        path = folder / f"model{self.suffix}"
        try:
            generator = self.generator() if config else None
        except NoGenerationError:
            generator = None
        if generator is None:
            return self.save(path)
        generation = Generation.from_json(generator.model.metadata_props[GENERATION])
        with atomic_file(folder / CONFIG) as temporary:
            temporary.write_text(genai_config(generation, config, path.name), encoding="utf-8")
        return [*generator.save(path), folder / CONFIG]

    def _save_external(self, path: Path) -> list[Path]:
        data = path.with_name(f"{path.name}.data")
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
        try:
            with write_errors(path):
                ir.save(
                    self.model,
                    folder / path.name,
                    external_data=data.name,
                    size_threshold_bytes=_EXTERNAL_TENSOR_BYTES,
                )
                # The tensors first: a model without its tensors is worth nothing, the other way round is harmless.
                for file in (data, path):
                    sync(folder / file.name)
                    os.replace(folder / file.name, file)
                sync(path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return [path, data]


def read_signature(metadata: dict[str, str], path: Path | None) -> Signature:
    """Return the signature that a model carries.

    Raises:
        FileError: If it carries none: another tool wrote it.
    """
    text = metadata.get(SIGNATURE)
    if text is None:
        raise FileError(
            "The ONNX model was not written by sqcompile.",
            where=None if path is None else str(path),
            seen=f"no '{SIGNATURE}' in its metadata",
            expected="a file that compiled.save wrote",
            next_step="load it with onnxruntime.InferenceSession",
        )
    return Signature.from_json(text)


def _without_tensors(model: ir.Model) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="model.data", size_threshold_bytes=_EXTERNAL_TENSOR_BYTES)
        return path.read_bytes()
