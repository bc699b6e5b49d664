"""A gated block of a language model with uneven inputs: what scaling of inputs is for."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from sqcompile.program import Program
from sqcompile.tracing import trace

from .programs import data, seeded


class Gated(nn.Module):
    """A gated block of a language model behind a norm, and a layer behind a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(32) + 0.5)
        self.gate = nn.Linear(32, 48, bias=False)
        self.up = nn.Linear(32, 48)
        self.down = nn.Linear(48, 32, bias=False)
        with torch.no_grad():  # inputs of the next layer are uneven, too
            self.up.weight[::8] *= 20
            self.down.weight[:, ::8] /= 20
        self.norm = nn.LayerNorm(32)
        nn.init.uniform_(self.norm.bias)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        x = x + self.down(torch.sigmoid(self.gate(normed)) * self.up(normed))
        return self.head(self.norm(x))


@functools.cache
def gated() -> Program:
    shapes = ({0: torch.export.Dim("batch")},)
    return trace(seeded(Gated), (data(2, 32),), dynamic_shapes=shapes)


def batches(count: int = 4) -> list[Tensor]:
    """Inputs of which one channel in eight is large."""
    large = torch.where(torch.arange(32) % 8 == 3, 20.0, 1.0)
    return [data(16, 32, seed=seed) * large for seed in range(count)]


SCALED = frozenset(
    ("scale", "gate.weight", "up.weight", "up.bias", "down.weight", "norm.weight", "norm.bias", "head.weight")
)
"""Names of the tensors that change when all inputs are scaled."""


class Odd(nn.Module):
    """Inputs that cannot be scaled, each for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(self.first(x))
        return normed + self.third(torch.tanh(self.second(normed)))


def changed(program: Program) -> set[str]:
    """Names of the tensors of `gated` that a program has changed."""
    return {name for name, tensor in program.tensors() if not torch.equal(tensor, gated().tensor(name))}
