"""What a layer's weight may become: a format together with a density."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from sqcompile.errors import FormatError
from sqcompile.quantization.format import Format
from sqcompile.sparsity import Pattern

UNSTRUCTURED = Pattern()


@dataclass(frozen=True)
class Candidate:
    """A format, and how many weights are zero, in which pattern.

    The text form is that of the format, with what is pruned behind a plus: `uint4:group=32:affine`,
    `uint4:group=32:affine+50%`, `int8:channel=0+2:4`, `int8:channel=0+1x4:80%`.

    Args:
        format: Format of the codes.
        sparsity: Fraction of the weights to zero, 0 ≤ s < 1; 0 for none.
        pattern: Pattern of the zeros; N:M says the sparsity itself.

    Raises:
        FormatError: If the format is dynamic, or the sparsity does not go with the pattern.
    """

    format: Format
    sparsity: float = 0.0
    pattern: Pattern = UNSTRUCTURED

    def __post_init__(self) -> None:
        if self.format.dynamic:
            raise FormatError(
                "a weight has a static format", seen=str(self.format), next_step="leave out 'dynamic'"
            )
        fixed = self.pattern.fixed_sparsity
        if fixed is not None and self.sparsity == 0.0:
            object.__setattr__(self, "sparsity", fixed)
        mistake = self.pattern.sparsity_mistake(self.sparsity)
        if not self.pattern.is_unstructured and self.sparsity == 0.0:
            mistake = f"a share of zeros: +{self.pattern}:80%"
        if mistake is not None:
            raise FormatError(
                "a candidate cannot be so sparse", seen=f"{self.sparsity:g}, {self.pattern}", expected=mistake
            )

    @property
    def prunes(self) -> bool:
        """Whether it zeroes weights."""
        return self.sparsity > 0

    def size_bits(self, shape: Sequence[int], scale_bits: int = 32) -> int:
        """Return the bits that a weight of `shape` takes with scales and zero points, packed.

        With zeros, kept codes are stored beside one bit for each weight; of blocks, one bit for each block.
        """
        dense = self.format.size_bits(shape, scale_bits)
        if not self.prunes:
            return dense
        count = prod(shape)
        zeros = int(count * self.sparsity)
        marks = count // (self.pattern.rows * self.pattern.columns)
        return dense - self.format.bits * zeros + marks

    def __str__(self) -> str:
        if not self.prunes:
            return str(self.format)
        if self.pattern.m:
            return f"{self.format}+{self.pattern}"
        share = f"{100 * self.sparsity:g}%"
        return (
            f"{self.format}+{share}"
            if self.pattern.is_unstructured
            else f"{self.format}+{self.pattern}:{share}"
        )

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Return the candidate that `text` writes.

        Raises:
            FormatError: If it writes none.
        """
        head, plus, tail = text.strip().partition("+")
        format = Format.parse(head)
        if not plus:
            return cls(format)
        match = re.fullmatch(r"(?:(?P<pattern>.+?):)?(?P<percent>\d+(?:\.\d+)?)%", tail)
        if match is None:
            return cls(format, pattern=Pattern.parse(tail))
        pattern = Pattern.parse(match["pattern"]) if match["pattern"] else UNSTRUCTURED
        return cls(format, float(match["percent"]) / 100, pattern)
