"""Pieces that several of the convolutional networks share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .model import BATCH, Inputs, ZooModel, build_random, generator, settle_batch_norms

CLASSES = 10
IMAGE_SIZE = 32


def images(seed: int, batch: int, _sequence: int = 0) -> Inputs:
    """Normalized images [batch, 3, 32, 32], given by position."""
    return (torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator(seed)),), {}


def cnn(name: str, build: Callable[[], nn.Module], notes: str) -> ZooModel:
    """Describe a network that takes images in `x` and has a dynamic batch."""

    def make() -> nn.Module:
        model = build_random(build, seed=1)
        args, _ = images(seed=2, batch=8)
        return settle_batch_norms(model, args, seed=3)

    return ZooModel(name, "cnn", make, images, {"x": {0: BATCH}}, notes)


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    act: nn.Module | None = None,
) -> nn.Sequential:
    """Convolution without bias, batch norm, and the activation if one is given."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, act) if act is not None else nn.Sequential(*layers)


class SqueezeExcite(nn.Module):
    """Scale channels by a gate that is computed from their means."""

    def __init__(self, channels: int, squeezed: int, act: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.act = act
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.gate(self.fc2(self.act(self.fc1(self.pool(x)))))
        return x * scale


class Head(nn.Module):
    """Global average pooling, dropout and the classifier."""

    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.dropout(torch.flatten(self.pool(x), 1)))
        return out
