"""Values between parts, on disk: one file a value and batch."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sqcompile.calibration import Calibration
from sqcompile.files import write_errors
from sqcompile.program import Program
from sqcompile.streaming.tensor_files import read_entries, write_tensors

_KEY = "value"


class Stream:
    """The values that one version of the model makes at the edges of its parts.

    Args:
        folder: Where they lie.
        data: The model's own inputs, batch after batch.
        placeholders: Names of the model's inputs, in their order.
    """

    def __init__(self, folder: Path, data: Iterable[Sequence[Any]], placeholders: Sequence[str]) -> None:
        self._folder = folder
        self._data = data
        self._places = {name: index for index, name in enumerate(placeholders)}

    def read(self, names: Sequence[str]) -> Iterator[list[Any]]:
        """Yield these values, batch after batch; only one batch is held.

        Raises:
            FileError: If a file is missing or damaged.
        """
        for index, batch in enumerate(self._data):
            yield [
                batch[self._places[name]] if name in self._places else self._load(name, index)
                for name in names
            ]

    def tokens(self) -> Iterator[Tensor | None]:
        """Yield for each batch which of its tokens are real; None where all are."""
        return self._data.tokens() if isinstance(self._data, Calibration) else (None for _ in self._data)

    def write(self, index: int, names: Sequence[str], values: Sequence[Any]) -> None:
        """Keep values of a batch.

        Raises:
            FileError: If the disk is full; what was there before stays.
        """
        for name, value in zip(names, values, strict=True):
            path = self._path(name, index)
            with write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                # A file that was cut off is written again: it belongs to a part that is not done.
                write_tensors(path, {_KEY: value})

    def drop(self, kept: Iterable[str]) -> None:
        """Remove all values but those of these names."""
        names = {self._path(name, 0).parent.name for name in kept}
        if self._folder.is_dir():
            for folder in self._folder.iterdir():
                if folder.name not in names:
                    shutil.rmtree(folder, ignore_errors=True)

    def _load(self, name: str, index: int) -> Tensor:
        return read_entries(self._path(name, index))[_KEY].read()

    def _path(self, name: str, index: int) -> Path:
        return self._folder / name / f"{index:06d}.safetensors"


class PartData(Calibration):
    """What a part is calibrated with: the values of a stream, read anew each time.

    Unlike a user's batches they are not checked: masks of attention may hold infinities.

    Args:
        stream: The stream.
        names: The values that the part takes, in the order of its inputs.
        part: The part.
        count: Number of batches, if known.
    """

    def __init__(self, stream: Stream, names: Sequence[str], part: Program, count: int | None) -> None:
        self._stream = stream
        self._names = list(names)
        self._count = count
        self.signature = part.signature

    def __len__(self) -> int:
        if self._count is None:
            raise TypeError("the number of batches is not known")
        return self._count

    def __iter__(self) -> Iterator[list[Any]]:
        return self._stream.read(self._names)

    def tokens(self) -> Iterator[Tensor | None]:
        """Yield for each batch which of its tokens are real, as the model's own inputs say."""
        return self._stream.tokens()
