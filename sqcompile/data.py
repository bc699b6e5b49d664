"""Data in files: `.npz`, `.npy` and `.txt` as batches for calibration, comparison and measurement.

- `.npz`: one array an input, by the input's name; the first axis counts samples. `file.npz:name` takes
  one array for the model's first input.
- `.npy`: one array, for the model's first input.
- `.txt`: texts, tokenized with the tokenizer beside the model; see `sqcompile.data_text`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sqcompile.errors import CalibrationError, FileError, did_you_mean
from sqcompile.expected import ExpectedInputs
from sqcompile.files import require_file
from sqcompile.signature import Signature, short_dtype

DEFAULT_BATCH = 8
"""Samples a batch, where neither the user nor the model says how many."""

SUFFIXES = (".npz", ".npy", ".txt")


@dataclass(frozen=True)
class DataFile:
    """A file with data, and how to read it.

    Attributes:
        path: The file; for `.npz`, `:name` behind it takes one array.
        batch: Samples a batch; None: as many as the model's traced batch has, else 8.
        samples: Read at most so many samples; None: all.
        context: Tokens a sample of text has at most; None: as the model was traced, else 256.
        tokenizer: Folder of the tokenizer; None: beside the model.
    """

    path: str
    batch: int | None = None
    samples: int | None = None
    context: int | None = None
    tokenizer: str | None = None

    def open(self, model: object, source: str | Path | None = None) -> Batches:
        """Read the file for a model.

        Args:
            model: What the data is for: a module, a program, a session, or a signature.
            source: Where the model came from, to find its tokenizer.

        Raises:
            FileError: If the file cannot be read, or is of another kind.
            CalibrationError: If it does not fit the model's inputs.
        """
        expected = ExpectedInputs.of(model)
        path, array = self.check()
        if path.suffix == ".txt":
            from sqcompile.data_text import read_text

            samples = read_text(self, path, expected, source)
        else:
            samples = read_arrays(path, array, expected)
        expected.check_tokens(samples, f"data file '{path}'")
        return Batches(samples, self, expected)

    def check(self) -> tuple[Path, str | None]:
        """Return the path, and the name of the array behind it, if there is such a file.

        Raises:
            FileError: If it cannot be read, or is of another kind.
        """
        head, colon, name = self.path.rpartition(":")
        named = bool(colon) and head.endswith(".npz")
        path, array = (Path(head), name) if named else (Path(self.path), None)
        if path.suffix not in SUFFIXES:
            raise FileError(
                f"'{path}' is no data file.",
                where=str(path),
                seen=f"suffix '{path.suffix}'" if path.suffix else "no suffix",
                expected="one of " + ", ".join(SUFFIXES),
                next_step="save arrays with numpy.savez(path, name=array), one array an input",
            )
        require_file(path, "data file")
        return path, array


class Batches:
    """The batches of a data file: sized, and readable as often as wanted.

    Args:
        samples: Array of each input; the first axis counts samples.
        file: How to read them.
        expected: The inputs that they are for.

    Attributes:
        notes: What the user should know, such as samples that were left out.
    """

    def __init__(self, samples: Mapping[str, Any], file: DataFile, expected: ExpectedInputs) -> None:
        self.notes: list[str] = []
        self._samples = dict(samples)
        self._file = file
        self._expected = expected
        found = min(len(array) for array in self._samples.values())
        self.count = min(found, file.samples or found)
        traced = expected.traced_batch
        if traced is not None and file.batch not in (None, traced):
            raise CalibrationError(
                "The model was traced with another batch size.",
                where="batch",
                seen=file.batch,
                expected=traced,
                next_step="leave the batch size out, or trace the model with a dynamic first dimension",
            )
        self.size = traced or min(file.batch or DEFAULT_BATCH, self.count)
        if self.count < self.size:
            raise CalibrationError(
                "There are fewer samples than the model takes in one call.",
                where=f"data file '{file.path}'",
                seen=f"{self.count} samples",
                expected=f"at least {self.size}",
                next_step="trace the model with a dynamic first dimension, or add samples",
            )
        left_out = self.count % self.size
        if left_out and traced is not None:
            self.count -= left_out
            self.notes.append(
                f"{left_out} of {self.count + left_out} samples are left out: they do not fill a batch of "
                f"{self.size}, which the model was traced with"
            )

    def bind(self, signature: Signature) -> Batches:
        """Return the same samples as batches for the model once it is traced, which fixes what it takes."""
        return Batches(self._samples, self._file, ExpectedInputs.of(signature))

    def __len__(self) -> int:
        return -(-self.count // self.size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, self.count, self.size):
            yield self._batch(start, min(start + self.size, self.count))

    def first(self) -> dict[str, torch.Tensor]:
        """Return the first batch."""
        return next(iter(self))

    def _batch(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        return {
            name: as_tensor(array[start:stop], self._expected.dtype(name), name)
            for name, array in self._samples.items()
        }


def read_arrays(path: Path, array: str | None, expected: ExpectedInputs) -> dict[str, Any]:
    """Read a `.npz` or `.npy` file as one array an input.

    Raises:
        FileError: If it is damaged, or holds Python objects.
        CalibrationError: If names, shapes or lengths do not fit the model.
    """
    where = f"data file '{path}'"
    named = expected.assign(load_arrays(path, array), where)
    _check_lengths(named, where)
    expected.check_shapes(named, where)
    return named


def load_arrays(path: Path, array: str | None = None) -> dict[str, Any]:
    """Return the arrays of a `.npz` file by name, or the one of a `.npy` file or of a name under "".

    Raises:
        FileError: If it is damaged, or holds Python objects.
        CalibrationError: If there is no array of that name.
    """
    try:
        # Mapped, so that a file larger than memory can be read batch by batch.
        loaded = np.load(path, allow_pickle=False, mmap_mode="r" if path.suffix == ".npy" else None)
        arrays = {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise FileError(
            f"'{path}' cannot be read.",
            where=str(path),
            seen=str(error).splitlines()[0] if str(error) else type(error).__name__,
            expected="numeric arrays that numpy.save or numpy.savez wrote",
            next_step="write it again with numpy.savez, without Python objects in it",
        ) from error
    if array is not None:
        if array not in arrays:
            where = f"data file '{path}'"
            raise _name_error(f"'{path}' holds no array '{array}'.", where, array, list(arrays))
        arrays = {"": arrays[array]}
    return arrays


def as_tensor(values: Any, wanted: torch.dtype | None, name: str) -> torch.Tensor:
    """Return an array as a tensor of the wanted type; sizes of numbers may change, kinds may not.

    Without a wanted type, floats become float32 and signed integers int64, as PyTorch has them.

    Raises:
        CalibrationError: If the kinds differ, or a value does not fit.
    """
    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))
    if wanted is None:
        if tensor.is_floating_point():
            return tensor.to(torch.float32)
        return tensor.to(torch.int64) if tensor.dtype in (torch.int8, torch.int16, torch.int32) else tensor
    if _kind(tensor.dtype) != _kind(wanted):
        raise CalibrationError(
            f"The data for input '{name}' has the wrong type.",
            where=f"input '{name}'",
            seen=short_dtype(tensor.dtype),
            expected=short_dtype(wanted),
            next_step="prepare the data as the model's training did, then convert it: "
            f"array.astype(numpy.{str(wanted).removeprefix('torch.')})",
        )
    if _kind(wanted) == "integer" and tensor.numel():
        limits = torch.iinfo(wanted)
        if int(tensor.min()) < limits.min or int(tensor.max()) > limits.max:
            raise CalibrationError(
                f"The data for input '{name}' does not fit its type.",
                where=f"input '{name}'",
                seen=f"{int(tensor.min())} to {int(tensor.max())}",
                expected=f"{limits.min} to {limits.max}",
                next_step="correct the data",
            )
    return tensor.to(wanted)


def _check_lengths(arrays: Mapping[str, Any], where: str) -> None:
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if any(array.ndim == 0 for array in arrays.values()):
        name = next(name for name, array in arrays.items() if array.ndim == 0)
        raise CalibrationError(
            f"The array '{name}' holds one number.",
            where=where,
            seen="no dimensions",
            expected="samples along the first axis",
            next_step="stack the samples: numpy.stack",
        )
    if min(lengths.values()) == 0:
        raise CalibrationError(
            "The data file holds no samples.",
            where=where,
            seen=", ".join(f"{name} {tuple(array.shape)}" for name, array in arrays.items()),
            expected="samples along the first axis; 100 to 500 are usual",
            next_step="write samples that look like the data in use",
        )
    if len(set(lengths.values())) > 1:
        raise CalibrationError(
            "The arrays hold different numbers of samples.",
            where=where,
            seen=", ".join(f"{name} {length}" for name, length in lengths.items()),
            expected="equal first axes",
            next_step="cut them to the same samples",
        )


def _name_error(what: str, where: str, seen: str, known: Sequence[str]) -> CalibrationError:
    return CalibrationError(
        what, where=where, seen=seen, expected=", ".join(known), next_step=did_you_mean(seen, known)
    )


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "integer"
