"""Where the weights of a model come from, tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sqcompile.errors import FileError
from sqcompile.program import Program
from sqcompile.streaming.tensor_files import Entry, read_entries


class WeightSource(Protocol):
    """Gives the tensors of a model by name."""

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        ...

    def identity(self) -> str:
        """Return a text that another model does not have."""
        ...


class HeldWeights:
    """The weights of a model that is in memory.

    Args:
        program: The program that holds them.
    """

    def __init__(self, program: Program) -> None:
        self._tensors = dict(program.tensors())

    def read(self, name: str) -> Tensor:
        """Return a tensor: the model's own, not a copy."""
        return self._tensors[name]

    def identity(self) -> str:
        """Return a hash of all weights."""
        total = hashlib.sha256()
        for name, tensor in self._tensors.items():
            total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            total.update(flat.view(torch.uint8).numpy().data)
        return total.hexdigest()


class StoredWeights:
    """The weights in the safetensors files of a Hugging Face folder; floating-point ones are read as float32.

    Args:
        folder: The folder, with `model.safetensors`, or with shards and their index.
        program: The program of the model; tensors that the files lack are taken from it.
        computed: Names of tensors that the model computes itself, such as tables of positions.
        others: Of a tensor that several modules share, its other names.
        prefix: What the files may write before every name, or leave out: the model's own name for its body.

    Raises:
        FileError: If the files cannot be read, or lack weights of the program.
    """

    def __init__(
        self,
        folder: Path,
        program: Program,
        *,
        computed: Collection[str] = (),
        others: Mapping[str, Collection[str]] | None = None,
        prefix: str = "",
    ) -> None:
        self._folder = folder
        stored = _entries(folder)
        self._entries: dict[str, Entry] = {}
        self._computed: dict[str, Tensor] = {}
        missing = []
        for name, tensor in program.tensors():
            names = [name, *(others or {}).get(name, ())]
            spelled = [other for known in names for other in _spellings(known, prefix)]
            entry = next((stored[other] for other in spelled if other in stored), None)
            if entry is not None and entry.shape == tuple(tensor.shape):
                self._entries[name] = entry
            elif name in computed:
                self._computed[name] = tensor
            else:
                seen = "nothing" if entry is None else f"shape {entry.shape} for {tuple(tensor.shape)}"
                missing.append(f"{name} ({seen})")
        if missing:
            raise FileError(
                f"The files in '{folder}' lack weights of the model.",
                where=str(folder),
                seen=", ".join(missing[:5]) + (", …" if len(missing) > 5 else ""),
                expected="every weight, under the model's own names",
                next_step="complete the folder; or compile without work_dir, which loads the whole model as "
                "transformers does, and save it once with save_pretrained",
            )

    def read(self, name: str) -> Tensor:
        """Return a tensor; what is stored in 16 bits as float32.

        Raises:
            FileError: If the file has changed or is damaged.
        """
        if name in self._computed:
            return self._computed[name]
        tensor = self._entries[name].read()
        return tensor.float() if tensor.is_floating_point() else tensor

    def identity(self) -> str:
        """Return a hash of the files' names, lengths and times, and of the configuration."""
        parts: list[object] = [(self._folder / "config.json").read_text(encoding="utf-8")]
        for path in sorted({entry.path for entry in self._entries.values()}):
            status = path.stat()
            parts.append((path.name, status.st_size, status.st_mtime_ns))
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def _entries(folder: Path) -> dict[str, Entry]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return read_entries(folder / "model.safetensors")
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(name) for name in places.values()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FileError(
            f"'{index}' is no index of shards.",
            where=str(index),
            seen=f"{type(error).__name__}: {error}",
            expected="a table weight_map: the file of each tensor",
            next_step="copy or download the file again",
        ) from error
    found: dict[str, Entry] = {}
    for name in files:
        found.update(read_entries(folder / name))
    return found


def _spellings(name: str, prefix: str) -> list[str]:
    if not prefix:
        return [name]
    return [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")]
