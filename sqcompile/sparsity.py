"""Sparse patterns: which weights may be zero together, and how masks follow from scores.

A mask is a boolean tensor of the weight's shape, True where the weight is kept. Weights are seen as
matrices [rows, K]: for a convolution [O, I, Kh, Kw] the K axis is the input channels, so that a
block of 1x4 is one output, four consecutive input channels (what integer dot products consume).
"""

from __future__ import annotations

import math
import re
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
        if self.m and not 0 < self.n < self.m:
            raise FormatError(
                "An N:M pattern keeps N of M weights.",
                seen=f"{self.n}:{self.m}",
                expected="0 < N < M, as 2:4",
            )
        if self.rows < 1 or self.columns < 1:
            raise FormatError("A block has at least one row and column.", seen=str(self), expected="as 1x4")

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `unstructured`, `2:4`, `1x4`, ….

        Raises:
            FormatError: If the text is no pattern.
        """
        text = text.strip().lower()
        if text == "unstructured":
            return cls()
        if match := re.fullmatch(r"(\d+):(\d+)", text):
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

    def obstacle(self, shape: tuple[int, ...], out_axis: int = 0, in_axis: int = 1) -> str | None:
        """Say why a weight of that shape cannot have this pattern, or return None."""
        rows, depth = shape[out_axis], shape[in_axis]
        if self.m and depth % self.m:
            return f"its {depth} input channels are not a multiple of {self.m}"
        if rows % self.rows:
            return f"its {rows} output channels are not a multiple of {self.rows}"
        if depth % self.columns:
            return f"its {depth} input channels are not a multiple of {self.columns}"
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

    def mask(self, weight_scores: torch.Tensor, sparsity: float) -> torch.Tensor:
        """Choose what to keep of one weight.

        Ties are broken by position, so that the mask is the same everywhere and exactly
        `floor(sparsity · blocks)` blocks go.

        Args:
            weight_scores: Importance of every weight, as a matrix view [rows, K]; larger is kept.
            sparsity: Fraction of blocks to zero, 0 ≤ s < 1; N:M patterns fix it themselves.

        Returns:
            A boolean matrix [rows, K], True where kept.
        """
        if self.m:
            rows, depth = weight_scores.shape
            groups = weight_scores.reshape(rows, depth // self.m, self.m)
            order = groups.argsort(dim=-1, descending=True, stable=True)
            mask = torch.zeros_like(groups, dtype=torch.bool)
            mask.scatter_(-1, order[..., : self.n], True)
            return mask.reshape(rows, depth)
        blocks = self.scores(weight_scores)
        count = math.floor(sparsity * blocks.numel() + 1e-9)
        mask = torch.ones(blocks.numel(), dtype=torch.bool, device=blocks.device)
        mask[blocks.reshape(-1).argsort(stable=True)[:count]] = False
        return self.expand(mask.reshape(blocks.shape))

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
class Sparsity:
    """What is promised about a weight from the moment its mask is baked in.

    Attributes:
        mask: True where a weight may be nonzero; the weight's shape.
        pattern: The pattern that the mask has.
    """

    mask: torch.Tensor
    pattern: Pattern = Pattern()

    @property
    def sparsity(self) -> float:
        """Fraction of weights that are zero."""
        return 1.0 - float(self.mask.sum()) / max(1, self.mask.numel())

    def violations(self, weight: torch.Tensor) -> str | None:
        """Say what breaks the promise in a weight, or return None."""
        if weight.shape != self.mask.shape:
            return f"shape {tuple(weight.shape)} instead of {tuple(self.mask.shape)}"
        count = int(((weight != 0) & ~self.mask).sum())
        return f"{count} weights are nonzero where the mask is 0" if count else None

    def __str__(self) -> str:
        return f"{self.pattern}, {100 * self.sparsity:.1f} % zeros"


def as_matrix(weight: torch.Tensor, out_axis: int = 0, in_axis: int = 1) -> torch.Tensor:
    """View a weight as [rows, K] with input channels fastest, whatever its kernel size.

    A convolution [O, I, Kh, Kw] becomes [O·Kh·Kw, I]: patterns then run along input channels, at one
    place of the kernel.
    """
    moved = weight.movedim((out_axis % weight.dim(), in_axis % weight.dim()), (0, -1))
    return moved.reshape(-1, moved.shape[-1])


def from_matrix(
    matrix: torch.Tensor, shape: tuple[int, ...], out_axis: int = 0, in_axis: int = 1
) -> torch.Tensor:
    """Undo `as_matrix`: give a matrix [rows, K] the weight's shape back."""
    rank = len(shape)
    rest = [axis for axis in range(rank) if axis not in (out_axis % rank, in_axis % rank)]
    order = [out_axis % rank, *rest, in_axis % rank]
    moved = matrix.reshape([shape[axis] for axis in order])
    return moved.permute([order.index(axis) for axis in range(rank)]).contiguous()
