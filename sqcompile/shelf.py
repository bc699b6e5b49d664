"""Values that are put away while others are worked on: in memory as far as they fit, on disk beyond."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqcompile.files import write_errors


@dataclass(frozen=True)
class _Stored:
    """A tensor on disk."""

    path: Path
    dtype: torch.dtype
    shape: torch.Size


class Shelf:
    """Takes values and gives them back.

    Args:
        max_bytes: Memory for the tensors that are kept there.
        folder: Where the others go, a file each; None keeps all in memory.
    """

    def __init__(self, max_bytes: int, folder: Path | None = None) -> None:
        self._room = max_bytes
        self._folder = folder
        self._count = 0

    def put(self, value: Any) -> Any:
        """Put a value away; return what it is found by.

        Raises:
            FileError: If the disk is full.
        """
        if not isinstance(value, Tensor):
            return value
        size_bytes = value.numel() * value.element_size()
        if self._folder is None or size_bytes <= self._room or not size_bytes:
            self._room -= size_bytes
            return value
        self._count += 1
        path = self._folder / f"{self._count:08d}"
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        with write_errors(path), path.open("wb", buffering=0) as file:
            view = flat.numpy().data
            while view:
                view = view[file.write(view) :]
        return _Stored(path, value.dtype, value.shape)

    def get(self, item: Any) -> Any:
        """Return a value that was put away, as it was."""
        if not isinstance(item, _Stored):
            return item
        raw = torch.empty(item.shape.numel() * item.dtype.itemsize, dtype=torch.uint8)
        with item.path.open("rb", buffering=0) as file:
            view = raw.numpy().data
            while view:
                count = file.readinto(view)
                if not count:
                    raise EOFError(f"{item.path} was cut off")
                view = view[count:]
        return raw.view(item.dtype).reshape(item.shape)

    def drop(self, item: Any) -> None:
        """Forget a value."""
        if isinstance(item, _Stored):
            item.path.unlink(missing_ok=True)
        elif isinstance(item, Tensor):
            self._room += item.numel() * item.element_size()


class Shelved(Sequence[Any]):
    """A sequence of values on a shelf; each is fetched when it is asked for.

    Args:
        shelf: The shelf.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._items: list[Any] = []

    def append(self, value: Any) -> None:
        """Put one more value away."""
        self._items.append(self._shelf.put(value))

    def drop(self, index: int) -> None:
        """Forget one value; the others keep their places."""
        self._shelf.drop(self._items[index])
        self._items[index] = None

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._shelf.get(item) for item in self._items[index]]
        return self._shelf.get(self._items[index])


@contextmanager
def open_shelf(max_bytes: int, folder: Path | None) -> Iterator[Shelf]:
    """Yield an empty shelf, and remove what it has on disk afterwards.

    Args:
        max_bytes: Memory for the tensors that are kept there.
        folder: Where a folder for the others is made; None keeps all in memory.

    Raises:
        FileError: If the folder cannot be written to.
    """
    if folder is None:
        yield Shelf(max_bytes)
        return
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix="values-", dir=folder))
    try:
        yield Shelf(max_bytes, own)
    finally:
        shutil.rmtree(own, ignore_errors=True)
