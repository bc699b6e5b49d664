"""How far two tensors, or two lists of outputs, are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sqcompile.errors import InputError


@dataclass(frozen=True)
class Distance:
    """Distance of a value from its reference.

    Attributes:
        sqnr_db: Signal to quantization noise, 10·log10(Σ ref² / Σ (ref − value)²), in dB; inf if equal.
        cosine: Cosine of the angle between both, seen as vectors; 1 if both are zero.
        max_error: Largest absolute difference.
        finite: Whether the value holds neither NaN nor infinity where the reference holds none.
    """

    sqnr_db: float
    cosine: float
    max_error: float
    finite: bool = True

    @property
    def noise(self) -> float:
        """Power of the error as a share of the signal's: 0 if equal, 1 at 0 dB, inf if not finite."""
        if not self.finite:
            return math.inf
        return 10 ** (-self.sqnr_db / 10) if self.sqnr_db > -3000 else math.inf

    def __str__(self) -> str:
        if not self.finite:
            return "not finite"
        return f"SQNR {self.sqnr_db:.1f} dB, cosine {self.cosine:.6f}, max error {self.max_error:.3g}"


EQUAL = Distance(math.inf, 1.0, 0.0)


class DistanceMeter:
    """Accumulates a `Distance` over many pairs of tensors, in float64 and without keeping them."""

    def __init__(self) -> None:
        self._signal = self._noise = self._other = self._dot = 0.0
        self._max_error = 0.0
        self._finite = True

    def add(self, reference: torch.Tensor, value: torch.Tensor) -> None:
        """Add one pair. Where the reference is not finite, equal values do not count.

        Raises:
            InputError: If the shapes differ.
        """
        if reference.shape != value.shape:
            raise InputError(
                "Values of different shapes have no distance.",
                where="comparison of two values",
                seen=tuple(value.shape),
                expected=tuple(reference.shape),
                next_step="compare outputs of programs with the same interface, on the same inputs",
            )
        if reference.numel() == 0:
            return
        ref, val = _numbers(reference), _numbers(value)
        regular = torch.isfinite(ref)
        if not bool(regular.all()):  # masks of attention hold -inf: compare only what is finite
            self._finite = self._finite and bool(
                (torch.eq(ref, val) | (torch.isnan(ref) & torch.isnan(val)))[~regular].all()
            )
            ref, val = ref[regular], val[regular]
            if ref.numel() == 0:
                return
        if not bool(torch.isfinite(val).all()):
            self._finite = False
            return
        difference = ref - val
        self._signal += float(ref.dot(ref))
        self._other += float(val.dot(val))
        self._dot += float(ref.dot(val))
        self._noise += float(difference.dot(difference))
        self._max_error = max(self._max_error, float(difference.abs().max()))

    def result(self) -> Distance:
        """Return the distance over everything added."""
        if not self._finite:
            return Distance(-math.inf, 0.0, math.inf, finite=False)
        if self._noise == 0.0:
            return EQUAL
        sqnr = 10 * math.log10(self._signal / self._noise) if self._signal > 0 else -math.inf
        norm = math.sqrt(self._signal) * math.sqrt(self._other)
        cosine = self._dot / norm if norm > 0 else (1.0 if self._signal == self._other else 0.0)
        return Distance(sqnr, min(1.0, cosine), self._max_error)


def _numbers(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    if value.is_complex():
        value = torch.view_as_real(value)
    return value.reshape(-1).to(torch.float64)


def distance(reference: torch.Tensor, value: torch.Tensor) -> Distance:
    """Return the distance of one tensor from its reference.

    Raises:
        InputError: If the shapes differ.
    """
    meter = DistanceMeter()
    meter.add(reference, value)
    return meter.result()


def output_distance(references: Iterable[Sequence[Any]], values: Iterable[Sequence[Any]]) -> Distance:
    """Return the distance over lists of flat outputs; integer and boolean leaves count as numbers."""
    meter = DistanceMeter()
    for reference, value in zip(references, values, strict=True):
        for ref, val in zip(reference, value, strict=True):
            if isinstance(ref, torch.Tensor) and isinstance(val, torch.Tensor):
                meter.add(ref, val)
    return meter.result()
