"""Sparse patterns: which weights may be zero together, and how masks follow from scores.

A mask is a boolean tensor of the weight's shape, True where the weight is kept. Weights are seen as
matrices [O, K]: for a convolution [O, I, Kh, Kw] the K axis is (kernel position, input channel), so that
a block of 1x4 is one output, four consecutive input channels at one place of the kernel (what integer
dot products consume).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from sqcompile.errors import FormatError


@dataclass(frozen=True)
class Pattern:
    """A sparse pattern.

    Attributes:
        n: Kept weights in each group of `m` (N:M patterns), else 0.
        m: Group size of N:M patterns, else 0.
        rows: Rows of a block; 1 for unstructured.
        columns: Columns (consecutive along K) of a block; 1 for unstructured.
    """

    n: int = 0
    m: int = 0
    rows: int = 1
    columns: int = 1

    def __post_init__(self) -> None:
        if (self.m or self.n) and not 0 < self.n < self.m:
            raise FormatError(
                "An N:M pattern keeps N of M weights.",
                seen=f"{self.n}:{self.m}",
                expected="0 < N < M",
                next_step="write the kept weights first, as 2:4",
            )
        if self.rows < 1 or self.columns < 1:
            raise FormatError(
                "A block has at least one row and column.",
                seen=f"{self.rows}x{self.columns}",
                expected="RxC with R and C of 1 or more",
                next_step="write outputs first, then inputs, as 1x4",
            )
        if self.m and self.rows * self.columns > 1:
            raise FormatError(
                "A pattern is either N of M or of blocks.",
                seen=f"{self.n}:{self.m} and {self.rows}x{self.columns}",
                expected="one of the two",
                next_step="leave one of the two",
            )

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `unstructured`, `2:4`, `1x4`, ….

        Raises:
            FormatError: If the text is no pattern.
        """
        text = text.strip().lower()
        if text == "unstructured":
            return cls()
        if (match := re.fullmatch(r"(\d+):(\d+)", text)) and int(match[2]):
            return cls(n=int(match[1]), m=int(match[2]))
        if match := re.fullmatch(r"(\d+)x(\d+)", text):
            return cls(rows=int(match[1]), columns=int(match[2]))
        raise FormatError(
            f"'{text}' is no sparse pattern.",
            seen=text,
            expected="unstructured, N:M (as 2:4) or a block RxC (as 1x4)",
            next_step="write one of these",
        )

    def __str__(self) -> str:
        if self.m:
            return f"{self.n}:{self.m}"
        return "unstructured" if self.is_unstructured else f"{self.rows}x{self.columns}"

    @property
    def is_unstructured(self) -> bool:
        """Whether every weight stands for itself."""
        return not self.m and self.rows == self.columns == 1

    @property
    def fixed_sparsity(self) -> float | None:
        """The sparsity that an N:M pattern always has, or None."""
        return 1 - self.n / self.m if self.m else None

    def sparsity_mistake(self, sparsity: float | None) -> str | None:
        """Say what a sparsity would have to be that goes with this pattern, or return None if it does."""
        fixed = self.fixed_sparsity
        if sparsity is None:
            return None if fixed is not None else "a sparsity, or an N:M pattern such as 2:4"
        if not 0 <= sparsity < 1:
            return "a fraction s of weights to zero, 0 ≤ s < 1"
        if fixed is not None and sparsity != fixed:
            return f"nothing, or {fixed:g}: the pattern {self} fixes it"
        return None

    def obstacle(
        self, shape: tuple[int, ...], out_axis: int = 0, in_axis: int = 1, groups: int = 1
    ) -> str | None:
        """Say why a weight of that shape cannot have this pattern, or return None.

        Args:
            shape: Shape of the weight.
            out_axis: Its axis of output channels.
            in_axis: Its axis of input channels.
            groups: Groups of a convolution; neither blocks nor N:M groups may lie across them.
        """
        rows, depth = shape[out_axis], shape[in_axis]
        # Groups lie along axis 0, which holds outputs, or inputs where the convolution is transposed.
        if out_axis == 0:
            rows //= groups
        else:
            depth //= groups
        per = " per group" if groups > 1 else ""
        if self.m and depth % self.m:
            return f"its {depth} input channels{per} are not a multiple of {self.m}"
        if rows % self.rows:
            return f"its {rows} output channels{per} are not a multiple of {self.rows}"
        if depth % self.columns:
            return f"its {depth} input channels{per} are not a multiple of {self.columns}"
        return None

    def scores(self, weight_scores: torch.Tensor) -> torch.Tensor:
        """Sum scores over blocks.

        Args:
            weight_scores: Importance of every weight, as a matrix view [rows, K].

        Returns:
            Importance of every block, [rows / R, K / C].
        """
        if self.rows == self.columns == 1:
            return weight_scores
        rows, depth = weight_scores.shape
        view = weight_scores.reshape(rows // self.rows, self.rows, depth // self.columns, self.columns)
        return view.sum(dim=(1, 3))

    def expand(self, block_mask: torch.Tensor) -> torch.Tensor:
        """Turn a mask of blocks into a mask of weights: the inverse of `scores`' shape change."""
        if self.rows == self.columns == 1:
            return block_mask
        return block_mask.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)

    def block_scores(self, weight_scores: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Sum scores over blocks, with -1 for blocks that are gone already, so that they go first again.

        Args:
            weight_scores: Importance ≥ 0 of every weight, as a matrix [rows, K].
            kept: Mask that is in force, of the same shape, or None.

        Returns:
            Importance of every block, [rows / R, K / C].
        """
        if kept is None:
            return self.scores(weight_scores)
        gone = self.scores(kept.to(torch.float32)) == 0
        return self.scores(weight_scores * kept).masked_fill(gone, -1.0)

    def mask(
        self, weight_scores: torch.Tensor, sparsity: float, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Choose what to keep of one weight.

        Ties are broken by position, so that the mask is the same everywhere and exactly
        `floor(sparsity · blocks)` blocks go.

        Args:
            weight_scores: Importance ≥ 0 of every weight, as a matrix [rows, K]; larger is kept.
            sparsity: Fraction of blocks to zero, 0 ≤ s < 1; N:M patterns fix it themselves.
            kept: Mask that is in force already: what it removed goes first. The result may still keep
                weights that it does not; intersect them.

        Returns:
            A boolean matrix [rows, K], True where kept.
        """
        blocks = self.block_scores(weight_scores, kept)
        if self.m:
            rows, depth = blocks.shape
            groups = blocks.reshape(rows, depth // self.m, self.m)
            order = groups.argsort(dim=-1, descending=True, stable=True)
            mask = torch.zeros_like(groups, dtype=torch.bool)
            mask.scatter_(-1, order[..., : self.n], True)
            return mask.reshape(rows, depth)
        cut = Cut.find(lambda: [blocks], removed_count(blocks.numel(), sparsity))
        return self.expand(~cut.removed(blocks)[0])

    def mask_rows(
        self, weight_scores: torch.Tensor, sparsity: float, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Choose what to keep of every row, or row of blocks, by itself: each loses the same fraction.

        Arguments and result as those of `mask`.
        """
        if self.m:
            return self.mask(weight_scores, sparsity, kept)
        blocks = self.block_scores(weight_scores, kept)
        mask = torch.ones_like(blocks, dtype=torch.bool)
        least = blocks.argsort(dim=-1, stable=True)[:, : removed_count(blocks.shape[1], sparsity)]
        return self.expand(mask.scatter_(-1, least, False))

    def mask_by_threshold(self, weight_scores: torch.Tensor, threshold: float) -> torch.Tensor:
        """Keep what scores above `threshold` (blocks by their mean score per weight)."""
        if self.m:
            return self.mask(weight_scores, 0.0)
        blocks = self.scores(weight_scores) / (self.rows * self.columns)
        return self.expand(blocks > threshold)

    def holds(self, mask: torch.Tensor) -> bool:
        """Whether a mask (a matrix [rows, K]) has this pattern: at most N of M, or whole blocks."""
        rows, depth = mask.shape
        if self.m:
            return bool((mask.reshape(rows, depth // self.m, self.m).sum(-1) <= self.n).all())
        blocks = mask.reshape(rows // self.rows, self.rows, depth // self.columns, self.columns)
        counts = blocks.sum(dim=(1, 3))
        return bool(((counts == 0) | (counts == self.rows * self.columns)).all())


@dataclass(frozen=True)
class Cut:
    """The line between what goes and what stays: exactly so many of the smallest scores go.

    Attributes:
        value: Scores below go, scores above stay.
        ties: How many of the scores equal to `value` go, first come first.
    """

    value: float
    ties: int

    @classmethod
    def find(cls, chunks: Callable[[], Iterable[torch.Tensor]], count: int) -> Cut:
        """Find the cut that removes `count` scores, without sorting or holding them all.

        The value is found digit by digit (two digits of 16 bits, so two passes), in the memory of one
        chunk. A mask of 16.8 million weights takes 0.7 s on one core this way, by stable sorting 2.5 s.

        Args:
            chunks: Returns the scores anew at each call: float32 tensors without NaN.
            count: How many go.
        """
        if count <= 0:
            return cls(-math.inf, 0)
        digits = torch.zeros(1 << 16, dtype=torch.int64)
        for chunk in chunks():
            digits += torch.bincount((_ordered(chunk) >> 16) + (1 << 15), minlength=1 << 16)
        high, count = _digit(digits, count)
        digits.zero_()
        for chunk in chunks():
            keys = _ordered(chunk)
            keys = keys[(keys >> 16) + (1 << 15) == high]
            digits += torch.bincount(keys & 0xFFFF, minlength=1 << 16)
        low, count = _digit(digits, count)
        key = torch.tensor(((high - (1 << 15)) << 16) | low, dtype=torch.int32)
        return cls(float((key ^ 0x7FFFFFFF if key < 0 else key).view(torch.float32)), count)

    def removed(self, scores: torch.Tensor) -> tuple[torch.Tensor, Cut]:
        """Say which scores go, and return the cut for what comes after them, with fewer ties left."""
        gone = (scores < self.value).contiguous()
        if not self.ties:
            return gone, self
        equal = (scores == self.value).reshape(-1).nonzero()[: self.ties]
        gone.view(-1)[equal] = True
        return gone, Cut(self.value, self.ties - equal.numel())


def removed_count(total: int, sparsity: float) -> int:
    """Return how many of `total` go: rounded down, but 0.3 of 10 is 3 in spite of binary fractions."""
    return math.floor(sparsity * total + 1e-9)


def _ordered(scores: torch.Tensor) -> torch.Tensor:
    """Map float32 to int32 so that the order stays."""
    scores = scores.to(torch.float32) + 0.0  # -0 and 0 are equal, and must become one key
    bits = scores.contiguous().view(torch.int32).reshape(-1)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _digit(histogram: torch.Tensor, count: int) -> tuple[int, int]:
    """Return the digit of the `count`-th smallest key, and how many are still to go among its equals."""
    totals = histogram.cumsum(0)
    digit = int(torch.searchsorted(totals, count))
    return digit, count - (int(totals[digit - 1]) if digit else 0)


@dataclass(frozen=True)
class Sparsity:
    """What is promised about a weight, masked or baked in, from the moment it is pruned.

    Attributes:
        mask: True where a weight may be nonzero; the weight's shape.
        pattern: The pattern that the mask has.
    """

    mask: torch.Tensor
    pattern: Pattern = Pattern()

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are zero; 0 of none."""
        return 1.0 - float(self.mask.sum()) / self.mask.numel() if self.mask.numel() else 0.0

    def violations(self, weight: torch.Tensor) -> str | None:
        """Say what breaks the promise in a weight, or return None."""
        if weight.shape != self.mask.shape:
            return f"shape {tuple(weight.shape)} instead of {tuple(self.mask.shape)}"
        count = int(((weight != 0) & ~self.mask).sum())
        return f"{count} weights are nonzero where the mask is 0" if count else None

    def __str__(self) -> str:
        return f"{self.pattern}, {100 * self.sparsity:.1f} % zeros"


def as_matrix(weight: torch.Tensor, out_axis: int = 0, in_axis: int = 1) -> torch.Tensor:
    """View a weight as [O, K] with input channels fastest, whatever its kernel size.

    A convolution [O, I, Kh, Kw] becomes [O, Kh·Kw·I]: where I is a multiple of a pattern's columns, each
    block holds consecutive input channels at one place of the kernel.
    """
    moved = weight.movedim((out_axis % weight.dim(), in_axis % weight.dim()), (0, -1))
    return moved.reshape(moved.shape[0], -1)


def from_matrix(
    matrix: torch.Tensor, shape: tuple[int, ...], out_axis: int = 0, in_axis: int = 1
) -> torch.Tensor:
    """Undo `as_matrix`: give a matrix [O, K] the weight's shape back."""
    rank = len(shape)
    rest = [axis for axis in range(rank) if axis not in (out_axis % rank, in_axis % rank)]
    order = [out_axis % rank, *rest, in_axis % rank]
    moved = matrix.reshape([shape[axis] for axis in order])
    return moved.permute([order.index(axis) for axis in range(rank)]).contiguous()
