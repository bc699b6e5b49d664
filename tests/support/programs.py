"""Small programs that tests of the core share, traced once a process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from sqcompile.program import Program
from sqcompile.tracing import trace


class Mlp(nn.Module):
    """Two linear layers with an activation: the smallest model with layers, biases and a hidden value."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.act = nn.ReLU()
        self.second = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.act(self.first(x)))


class ConvNet(nn.Module):
    """Convolutions of three kinds, and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.depthwise(x)
        return self.head(self.up(x).mean((2, 3)))


class TwoInputs(nn.Module):
    """Nested inputs, a default, a constant, and a nested output."""

    def forward(
        self, x: torch.Tensor, pair: dict[str, torch.Tensor], scale: float = 2.0, extra: Any = None
    ) -> dict[str, Any]:
        total = x * scale + pair["left"]
        return {"total": total, "parts": (pair["right"], total.sum(1))}


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Make a module with weights that depend on the seed alone, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def data(*shape: int, seed: int = 1) -> torch.Tensor:
    """Return normally distributed numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def _mlp(dynamic: bool) -> Program:
    shapes = ({0: Dim("batch", min=1, max=64)},) if dynamic else None
    return trace(seeded(Mlp), (data(2, 8),), dynamic_shapes=shapes)


@functools.cache
def _conv_net() -> Program:
    return trace(seeded(ConvNet), (data(2, 3, 6, 6),))


def mlp(*, dynamic: bool = False) -> Program:
    """Return a new program of `Mlp`: x [2, 8], or [batch, 8] with 1 to 64 rows."""
    return _mlp(dynamic).snapshot()


def conv_net() -> Program:
    """Return a new program of `ConvNet`: x [2, 3, 6, 6]."""
    return _conv_net().snapshot()
