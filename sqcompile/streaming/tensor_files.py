"""Reading and writing single tensors of safetensors files, without holding or mapping the rest.

A mapped file counts as resident memory as long as its pages are not reclaimed; what is read here is memory
that goes when the tensor does.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqcompile.errors import FileError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# The format's own limit on the length of a header.
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file.

    Attributes:
        path: The file.
        dtype: Its type.
        shape: Its shape.
        offset: Its first byte in the file.
        size_bytes: Its length.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    def read(self) -> Tensor:
        """Return the tensor.

        Raises:
            FileError: If the file is shorter than its header says.
        """
        raw = torch.empty(self.size_bytes, dtype=torch.uint8)
        view = raw.numpy().data
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                done = 0
                while done < self.size_bytes:
                    count = file.readinto(view[done:])
                    if not count:
                        raise EOFError(f"it ends {self.size_bytes - done} bytes too early")
                    done += count
        except (OSError, EOFError) as error:
            raise _damaged(self.path, str(error)) from error
        return raw.view(self.dtype).reshape(self.shape)


def read_entries(path: Path) -> dict[str, Entry]:
    """Return what a safetensors file holds, by name, from its header alone.

    Raises:
        FileError: If it is missing, or no such file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        return {
            name: _entry(path, 8 + length, item) for name, item in header.items() if name != "__metadata__"
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file. Whoever calls it names a temporary file and renames it.

    Raises:
        OSError: If the disk is full, or the folder cannot be written to.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        size_bytes = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size_bytes],
        }
        end += size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def _entry(path: Path, start: int, item: Any) -> Entry:
    dtype = _DTYPES[item["dtype"]]
    shape = tuple(int(size) for size in item["shape"])
    first, last = item["data_offsets"]
    if last - first != math.prod(shape) * dtype.itemsize or first < 0:
        raise ValueError(f"{last - first} bytes for {dtype} {shape}")
    return Entry(path, dtype, shape, start + first, last - first)


def _damaged(path: Path, seen: str) -> FileError:
    return FileError(
        f"'{path}' cannot be read as a safetensors file.",
        where=str(path),
        seen=seen,
        expected="a whole file in the format of safetensors",
        next_step="copy or download the file again",
    )
