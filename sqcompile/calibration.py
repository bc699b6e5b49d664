"""Calibration data: batches as users have them, checked and bound to a program's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from sqcompile.errors import CalibrationError, InputError
from sqcompile.signature import Signature

LABELS_HINT = "a loader that also gives labels: pass calibration=[batch[0] for batch in loader]"
"""The next step where a batch holds more than the model takes."""

_MASK = "attention_mask"


class Calibration:
    """A re-iterable view of calibration batches as flat inputs.

    Args:
        batches: Each a tensor, a tuple of positional inputs, a dict of keyword inputs, or a pair
            (tuple, dict). An iterator is read once and kept; lists and data loaders are not copied.
        signature: Inputs of the program that the batches are for.

    Raises:
        CalibrationError: If there is no batch.
    """

    def __init__(self, batches: Iterable[Any], signature: Signature) -> None:
        # An iterator can be read only once, and several passes read the data.
        self._batches = keep_iterator(batches)
        self.signature = signature
        if _length(self._batches) == 0:
            reject_empty()

    def __len__(self) -> int:
        """Return the number of batches.

        Raises:
            TypeError: If the data does not know it, as streams do not; they are not read to count them.
        """
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Any]]:
        count = 0
        for index, batch in enumerate(self._batches):
            yield self.bind(batch, f"calibration batch {index}")
            count += 1
        if count == 0:
            reject_empty()

    def tokens(self) -> Iterator[torch.Tensor | None]:
        """Yield for each batch which of its tokens are none of padding, bool [N, T]; None where all are real.

        Padding is what the input `attention_mask` [N, T] hides, as tokenizers name it.
        """
        places = [index for index, value in enumerate(self.signature.inputs) if value.name == _MASK]
        for batch in self:
            mask = batch[places[0]] if places else None
            real = mask.ne(0) if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
            yield None if real is None or bool(real.all()) else real

    def first(self) -> list[Any]:
        """Return the first batch as flat inputs."""
        return next(iter(self))

    def bind(self, batch: Any, where: str) -> list[Any]:
        """Return one batch as flat inputs.

        Raises:
            CalibrationError: If it does not fit the program's inputs, is empty, or holds NaN or infinity.
        """
        args, kwargs = as_call(batch, where)
        try:
            flat = self.signature.bind(args, kwargs)
        except InputError as error:
            next_step = error.next_step
            if not kwargs and len(args) > len(self.signature.tensor_inputs):
                next_step = LABELS_HINT
            raise CalibrationError(
                f"A calibration batch does not fit the model. {error.what}",
                where=f"{where}, {error.where}",
                seen=error.seen,
                expected=error.expected,
                next_step=next_step,
            ) from error
        for value, leaf in zip(self.signature.inputs, flat, strict=True):
            check_data(leaf, f"{where}, input '{value.name}'")
        return flat


def keep_iterator(batches: Any) -> Any:
    """Return what can be read more than once: an iterator's batches as a list, anything else as it is.

    Raises:
        CalibrationError: If it is no collection of batches.
    """
    if isinstance(batches, (torch.Tensor, np.ndarray, Mapping, str)):
        raise CalibrationError(
            "Calibration data must be an iterable of batches.",
            where="calibration",
            seen=type(batches).__name__,
            expected="a list (or data loader) of tensors, tuples or dicts",
            next_step="wrap one batch in a list: calibration=[batch]",
        )
    if isinstance(batches, Iterator):
        return list(batches)
    # Asked without iterating: a data loader would start its workers.
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise CalibrationError(
            "Calibration data cannot be iterated.",
            where="calibration",
            seen=type(batches).__name__,
            expected="an iterable of batches",
            next_step="pass a list of batches",
        )
    return batches


def as_call(batch: Any, where: str = "calibration") -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return a batch as the positional and keyword arguments of a call.

    Raises:
        CalibrationError: If it is neither a tensor, a tuple, a dict, nor a pair of tuple and dict.
    """
    if isinstance(batch, (torch.Tensor, np.ndarray)):
        return (torch.as_tensor(batch),), {}
    if isinstance(batch, Mapping):
        return (), batch
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2 and isinstance(batch[0], (tuple, list)) and isinstance(batch[1], Mapping):
            return batch[0], batch[1]
        return batch, {}
    raise CalibrationError(
        "A calibration batch has a type that cannot be an input.",
        where=where,
        seen=type(batch).__name__,
        expected="a tensor, a tuple of inputs, a dict of named inputs, or a pair (tuple, dict)",
        next_step="turn each batch into one of these",
    )


def check_data(leaf: Any, where: str) -> None:
    """Check that a tensor has elements and that they are finite.

    Raises:
        CalibrationError: If not.
    """
    if not isinstance(leaf, torch.Tensor):
        return
    if leaf.numel() == 0:
        raise CalibrationError(
            "A calibration batch is empty.",
            where=where,
            seen=f"shape {tuple(leaf.shape)}",
            expected="at least one element",
            next_step="drop empty batches",
        )
    if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
        places = (~torch.isfinite(leaf)).nonzero()
        raise CalibrationError(
            "Calibration data holds NaN or infinity.",
            where=where,
            seen=f"{len(places)} of {leaf.numel()} values are not finite, the first at {places[0].tolist()}",
            expected="finite values",
            next_step="clean the data, or drop the batch",
        )


def _length(batches: Any) -> int | None:
    """Return the number of batches, or None if the data does not know it."""
    try:
        return len(batches)
    except TypeError:  # a data loader over a stream has `__len__`, and raises
        return None


def reject_empty() -> NoReturn:
    """Raise the error for data without batches."""
    raise CalibrationError(
        "Calibration data is empty.",
        where="calibration",
        seen="0 batches",
        expected="at least one batch",
        next_step="pass 100 to 500 samples that look like the data in use",
    )
