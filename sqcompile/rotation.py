"""Rotations: orthogonal changes of basis that spread what lies in a few channels over all of them.

    rotation = hadamard_rotation(768, seed=0)
    y = rotation.turn(x)                     # [..., 768]
    torch.testing.assert_close(rotation.undo(y), x)

A Hadamard matrix has entries ±1 and orthogonal rows: divided by √n it is the rotation that spreads a single
channel most evenly. Random signs before it keep what is even already from gathering in one channel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Largest Sylvester matrix that is multiplied at once; larger ones are products of such.
_FACTOR = 64


@dataclass(frozen=True, eq=False)
class Rotation:
    """x ↦ ((x - shift) · diagonal) (F₁ ⊗ F₂ ⊗ …), along blocks of n channels.

    Attributes:
        diagonal: What each channel is multiplied with first, [n]: signs, unless the channels were scaled before.
        factors: Orthogonal matrices, whose sizes have the product n.
        shift: What was taken from each channel before that, [n], or None.
    """

    diagonal: Tensor
    factors: tuple[Tensor, ...]
    shift: Tensor | None = None

    @property
    def size(self) -> int:
        """Channels of a block, n."""
        return int(self.diagonal.numel())

    def turn(self, x: Tensor, axis: int = -1) -> Tensor:
        """Rotate along an axis of m · n channels, block by block, in float64.

        Shapes: x [..., m · n, ...] -> the same.
        """
        blocks = self._blocks(x, axis)
        if self.shift is not None:
            blocks = blocks - self.shift.to(blocks.device)
        return self._whole(self._multiplied(blocks * self.diagonal.to(blocks.device), False), x, axis)

    def undo(self, x: Tensor, axis: int = -1) -> Tensor:
        """Return what `turn` made x of."""
        blocks = self._multiplied(self._blocks(x, axis), True)
        blocks = blocks / self.diagonal.to(blocks.device)
        if self.shift is not None:
            blocks = blocks + self.shift.to(blocks.device)
        return self._whole(blocks, x, axis)

    def after(self, scale: Tensor, shift: Tensor | None = None) -> Rotation:
        """Return the rotation of what x is after (x - shift) · scale.

        Shapes: scale and shift [n], or of several times n channels, whose blocks then count as one.
        """
        times = scale.numel() // self.size
        factors = self.factors if times == 1 else (torch.eye(times, dtype=torch.float64), *self.factors)
        scale = scale.detach().flatten().to(self.diagonal)
        moved = None if shift is None else shift.detach().flatten().to(self.diagonal)
        if self.shift is not None:
            moved = self.shift.repeat(times) / scale + (0 if moved is None else moved)
        return Rotation(self.diagonal.repeat(times) * scale, factors, moved)

    def _blocks(self, x: Tensor, axis: int) -> Tensor:
        moved = x.detach().movedim(axis, -1).to(torch.float64)
        return moved.reshape(*moved.shape[:-1], -1, self.size)

    def _whole(self, blocks: Tensor, x: Tensor, axis: int) -> Tensor:
        return blocks.flatten(-2).movedim(-1, axis).to(x.dtype).contiguous()

    def _multiplied(self, blocks: Tensor, transpose: bool) -> Tensor:
        shape = blocks.shape
        parts = blocks.reshape(-1, *(factor.shape[0] for factor in self.factors))
        for index, factor in enumerate(self.factors):
            matrix = (factor.T if transpose else factor).to(parts.device)
            parts = torch.tensordot(parts, matrix, dims=([index + 1], [0])).movedim(-1, index + 1)
        return parts.reshape(shape)


def hadamard_rotation(size: int, seed: int = 0) -> Rotation:
    """Return random signs and the Hadamard matrix of a size, divided by √size.

    Where no Hadamard matrix is known here, the odd part of the size gets a random orthogonal matrix beside that of
    the power of two (`has_hadamard` says which it is).

    Args:
        size: Channels, n.
        seed: Of the signs.

    Source: Ashkboos et al. 2024, arXiv 2404.00456 (QuaRot), randomized Hadamard matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
    order = _paley_part(size)
    rest = order if order is not None else size & -size
    factors = _sylvester(size // order if order is not None else rest)
    if order is None:
        factors.append(_random_orthogonal(size // rest, generator))
    elif order > 1:
        factors.append(_paley(order) / math.sqrt(order))
    return Rotation(signs, tuple(factors))


def mean_keeping_rotation(size: int, seed: int = 0) -> Rotation:
    """Return a random rotation that keeps the mean of the channels: of n - 1 dimensions, around (1, …, 1).

    What subtracts the mean, as LayerNorm does, commutes with it.

    Args:
        size: Channels, n.
        seed: Of the rotation.
    """
    generator = torch.Generator().manual_seed(seed)
    turned = torch.eye(size, dtype=torch.float64)
    turned[1:, 1:] = _random_orthogonal(size - 1, generator)
    # The reflection that swaps the first axis with the direction of the mean.
    mirror = torch.full((size,), -1 / math.sqrt(size), dtype=torch.float64)
    mirror[0] += 1
    reflection = torch.eye(size, dtype=torch.float64)
    if size > 1:
        reflection -= 2 / float(mirror @ mirror) * torch.outer(mirror, mirror)
    return Rotation(torch.ones(size, dtype=torch.float64), (reflection @ turned @ reflection,))


def has_hadamard(size: int) -> bool:
    """Whether a Hadamard matrix of that size is known here: by Sylvester's and Paley's constructions."""
    return _paley_part(size) is not None


def _paley_part(size: int) -> int | None:
    """Return the order of a Paley matrix whose product with a power of two is the size; 1 if none is needed."""
    order = size // (size & -size)
    if order == 1:
        return 1
    while order <= size:
        if order % 4 == 0 and (_is_prime(order - 1) or (_is_prime(order // 2 - 1) and order // 2 % 4 == 2)):
            return order
        order *= 2
    return None


def _sylvester(size: int) -> list[Tensor]:
    """Return matrices of powers of two whose Kronecker product is Sylvester's, orthonormal."""
    factors: list[Tensor] = []
    while size > 1 or not factors:
        order = min(size, _FACTOR)
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while matrix.shape[0] < order:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        factors.append(matrix / math.sqrt(order))
        size //= order
    return factors


def _paley(order: int) -> Tensor:
    """Return a Hadamard matrix of order q + 1 (q ≡ 3 mod 4) or 2 (q + 1) (q ≡ 1 mod 4), for a prime q.

    Source: Paley 1933, On orthogonal matrices; constructions I and II.
    """
    first = _is_prime(order - 1)
    prime = order - 1 if first else order // 2 - 1
    residues = torch.full((prime,), -1.0, dtype=torch.float64)
    residues[torch.arange(1, prime) ** 2 % prime] = 1
    residues[0] = 0
    places = torch.arange(prime)
    core = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    core[0, 0] = 0
    core[1:, 1:] = residues[(places[:, None] - places) % prime]
    if first:
        core[1:, 0] = -1
        return core + torch.eye(order, dtype=torch.float64)
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, plus) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), minus)


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal matrix, evenly distributed."""
    matrix, upper = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    result: Tensor = matrix * upper.diagonal().sign()
    return result


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
