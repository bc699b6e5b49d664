"""Mappings: what value each code stands for, before the scale.

A code of a non-linear mapping is an index into a table of whole numbers from -127 to 127, and its
value is `table[code] · scale`. So one lookup decodes every mapping, and integer kernels, which multiply entries,
run all of them as fast as linear codes. Zero is an entry of every table: pruned weights stay exactly zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sqcompile.errors import FormatError

LARGEST_ENTRY = 127
"""Entries fit int8, and so do their negatives."""

MOST_BITS = 4
"""Bits of the longest table: sixteen entries fill a vector register, which is where kernels look them up."""


class Mapping(ABC):
    """What value a code stands for, before the scale."""

    word: ClassVar[str]

    def __str__(self) -> str:
        return self.word

    @property
    def is_linear(self) -> bool:
        """Whether values are evenly spaced, so that no table is needed."""
        return False

    @property
    def is_known(self) -> bool:
        """Whether nothing of it has to be fitted to data."""
        return True

    def candidates(self) -> tuple[Mapping, ...]:
        """Return the mappings that fitting chooses from: this one, unless a parameter is left open."""
        return (self,)

    def values(self, bits: int) -> Tensor:
        """Return the value of each code, ascending, -1 the least and 1 the greatest: float64 [2**bits]."""
        raise FormatError(f"the mapping {self} has no table")

    def table(self, bits: int) -> Tensor:
        """Return what each code looks up: `values` as multiples of 1/127, int8 [2**bits].

        Raises:
            FormatError: The table would have more than sixteen entries.
        """
        if bits > MOST_BITS:
            raise FormatError(
                f"the mapping {self} has no table of {bits} bits",
                expected=f"2 to {MOST_BITS} bits",
                next_step="use linear codes: with more bits they leave nothing to gain",
            )
        return (self.values(bits) * LARGEST_ENTRY).round().to(torch.int8)


@dataclass(frozen=True)
class Linear(Mapping):
    """Evenly spaced values: value(code) = code - zero_point. The mapping of the affine operators."""

    word: ClassVar[str] = "linear"

    @property
    def is_linear(self) -> bool:
        """True."""
        return True


@dataclass(frozen=True)
class Companding(Mapping):
    """Evenly spaced codes, expanded by an odd function that keeps -1, 0 and 1 where they are.

    Attributes:
        steepness: How much finer values are around zero than at the ends; None lets fitting choose it, tensor by
            tensor.

    Raises:
        FormatError: If the steepness is no positive number.
    """

    steepness: float | None = None
    span: ClassVar[tuple[float, float]]
    """Least and greatest steepness that fitting tries; the least is almost linear."""

    def __post_init__(self) -> None:
        if self.steepness is not None and not 0 < self.steepness < float("inf"):
            raise FormatError(
                f"the mapping {self.word} takes no steepness of {self.steepness}",
                expected="a positive number",
            )

    def __str__(self) -> str:
        return self.word if self.steepness is None else f"{self.word}@{self.steepness:g}"

    @property
    def is_known(self) -> bool:
        """Whether the steepness is given."""
        return self.steepness is not None

    def candidates(self) -> tuple[Mapping, ...]:
        """Return this mapping, or one for each steepness that fitting tries."""
        if self.steepness is not None:
            return (self,)
        return tuple(type(self)(steepness) for steepness in _geometric(*self.span))

    def values(self, bits: int) -> Tensor:
        """Return the expanded codes.

        Raises:
            FormatError: If the steepness is open.
        """
        if self.steepness is None:
            raise _not_fitted(self)
        return self._expand(_even(bits), torch.tensor(self.steepness, dtype=torch.float64))

    @abstractmethod
    def _expand(self, u: Tensor, s: Tensor) -> Tensor:
        """Return the value of each evenly spaced code in -1..1, for a steepness."""


@dataclass(frozen=True)
class Tanh(Companding):
    """Codes are even in tanh(s·x), with the steepness s: value(u) = atanh(u · tanh(s)) / s."""

    word: ClassVar[str] = "tanh"
    span: ClassVar[tuple[float, float]] = (0.25, 5.0)

    def _expand(self, u: Tensor, s: Tensor) -> Tensor:
        return torch.atanh(u * torch.tanh(s)) / s


@dataclass(frozen=True)
class Sigmoid(Companding):
    """Codes are even in σ(s·x), with the steepness s: value(u) = logit((1 + u · (2σ(s) - 1)) / 2) / s.

    Since 2σ(s·x) - 1 = tanh(s·x / 2), it is `Tanh` with half the steepness.
    """

    word: ClassVar[str] = "sigmoid"
    span: ClassVar[tuple[float, float]] = (0.5, 10.0)

    def _expand(self, u: Tensor, s: Tensor) -> Tensor:
        return torch.logit((1 + u * (2 * torch.sigmoid(s) - 1)) / 2) / s


@dataclass(frozen=True)
class MuLaw(Companding):
    """Codes are even in the logarithm, with the steepness μ: value(u) = sign(u) · ((1 + μ)^|u| - 1) / μ.

    Source: ITU-T G.711, where μ = 255.
    """

    word: ClassVar[str] = "mu-law"
    span: ClassVar[tuple[float, float]] = (0.25, 255.0)

    def _expand(self, u: Tensor, s: Tensor) -> Tensor:
        return u.sign() * ((1 + s) ** u.abs() - 1) / s


@dataclass(frozen=True)
class Log2(Mapping):
    """Zero and powers of two: ±1, ±1/2, ±1/4, … as far as the codes go."""

    word: ClassVar[str] = "log2"

    def values(self, bits: int) -> Tensor:
        """Return half of the codes below zero, the others from zero on."""
        half = 1 << (bits - 1)
        powers = 2.0 ** -torch.arange(half, dtype=torch.float64)
        return torch.cat([-powers, torch.zeros(1, dtype=torch.float64), powers[: half - 1].flip(0)])


@dataclass(frozen=True)
class NormalFloat(Mapping):
    """Quantiles of the normal distribution: each code is as frequent as any other where weights are normal.

    With 4 bits this is NF4, its values to a multiple of 1/127.

    Source: Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E, which has the numbers of 4 bits.
    """

    word: ClassVar[str] = "nf"

    def values(self, bits: int) -> Tensor:
        """Return 2**(bits - 1) - 1 values below zero, zero, and 2**(bits - 1) above it."""
        codes = 1 << bits
        last = 1 - (1 / (2 * codes) + 1 / (2 * (codes - 1))) / 2
        half = codes // 2
        above = torch.special.ndtri(torch.linspace(last, 0.5, half + 1, dtype=torch.float64)[:-1])
        below = torch.special.ndtri(torch.linspace(last, 0.5, half, dtype=torch.float64)[:-1])
        values = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
        return torch.div(values, above[0])


@dataclass(frozen=True)
class Codebook(Mapping):
    """A table that is fitted to each tensor, by weighted k-means; zero is one of its entries.

    Attributes:
        entries: The table, ascending; None before fitting.
    """

    entries: tuple[int, ...] | None = None
    word: ClassVar[str] = "codebook"

    @property
    def is_known(self) -> bool:
        """Whether the table is fitted."""
        return self.entries is not None

    def values(self, bits: int) -> Tensor:
        """Return the fitted table."""
        if self.entries is None:
            raise _not_fitted(self)
        return torch.tensor(self.entries, dtype=torch.float64) / LARGEST_ENTRY


MAPPINGS: dict[str, type[Mapping]] = {
    kind.word: kind for kind in (Linear, Tanh, Sigmoid, MuLaw, Log2, NormalFloat, Codebook)
}


def parse_mapping(text: str) -> Mapping | None:
    """Return the mapping of `tanh`, `tanh@2.5` and the like; None if there is none of that name.

    Raises:
        FormatError: A steepness that is no positive number, or that this mapping has not.
    """
    name, at, number = text.partition("@")
    kind = MAPPINGS.get(name)
    if kind is None or not at:
        return None if kind is None else kind()
    if not issubclass(kind, Companding):
        raise FormatError(f"the mapping {name} takes no parameter", seen=text, expected=name)
    try:
        return kind(float(number))
    except ValueError:
        raise FormatError(
            f"the mapping {name} takes no steepness of {number!r}", expected=f"{name}@ and a positive number"
        ) from None


def _not_fitted(mapping: Mapping) -> FormatError:
    return FormatError(
        f"the mapping {mapping} has no values before it is fitted",
        next_step="fit it to a tensor: sqcompile.quantization.lookup.fit",
    )


def _even(bits: int) -> Tensor:
    """Return evenly spaced codes from -1 to 1 with zero among them; one more below zero than above."""
    below, above = 1 << (bits - 1), (1 << (bits - 1)) - 1
    return torch.cat(
        [
            -torch.arange(below, 0, -1, dtype=torch.float64) / below,
            torch.arange(above + 1, dtype=torch.float64) / max(above, 1),
        ]
    )


def _geometric(first: float, last: float, count: int = 32) -> list[float]:
    """Return numbers in equal ratios, to six digits, so that their text says all of them."""
    return [float(f"{first * (last / first) ** (index / (count - 1)):.6g}") for index in range(count)]
