"""Choosing a token from logits: the same draws as the native engine makes of the same logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sqcompile.errors import InputError

_MASK = (1 << 64) - 1
_HOTTEST = 1e6


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the most likely token; else logits are divided by it and one is drawn.
        top_k: Draw among so many of the most likely; 0: among all.
        top_p: Draw among the fewest that together have this probability.
        seed: Of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature <= _HOTTEST, f"0 to {_HOTTEST:g}"),
            ("top_k", self.top_k, self.top_k >= 0, "a number from 0 on"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
        )
        for name, value, fits, expected in checks:
            if not fits:
                raise InputError(
                    "An option of generation is out of range.",
                    where=name,
                    seen=repr(value),
                    expected=expected,
                    next_step=f"pass another {name}, or leave it out",
                )

    def choose(self, logits: NDArray[np.float32], row: int, length: int) -> int:
        """Return a token; a draw depends on nothing but the logits, the seed, the row and its length.

        Args:
            logits: [vocabulary].
            row: Number of the row.
            length: Tokens that the row has.
        """
        scores = np.where(np.isnan(logits), -np.inf, logits.astype(np.float64))
        best = int(scores.argmax())
        if self.temperature == 0 or not np.isfinite(scores[best]):
            return best
        weights = np.exp((scores - scores[best]) / self.temperature)
        order = np.argsort(-scores, kind="stable")
        if 0 < self.top_k < len(order):
            order = order[: self.top_k]
        sums = np.cumsum(weights[order])
        # The fewest whose sum reaches the share.
        kept = (
            1 + int(np.searchsorted(sums, self.top_p * sums[-1], side="left"))
            if self.top_p < 1
            else len(order)
        )
        order = order[:kept]
        if self.top_p >= 1 and not 0 < self.top_k < len(scores):
            order = np.arange(len(scores))  # all of them, in the order of the vocabulary
        sums = np.cumsum(weights[order])
        uniform = _uniform(self.seed, row, length)
        return int(order[min(int(np.searchsorted(sums, uniform * sums[-1], side="right")), len(order) - 1)])


def _uniform(seed: int, row: int, step: int) -> float:
    """Return a number from 0 to 1, without 1."""
    return (_mix(_mix(_mix(seed & _MASK) ^ row) ^ step) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    """Finalize as SplitMix64 does. Steele, Lea, Flood 2014: "Fast splittable pseudorandom number generators"."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
