"""Networks in plain PyTorch that are neither convolutional nor transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import CLASSES, IMAGE_SIZE, images
from .model import BATCH, Inputs, ZooModel, build_random, generator

FEATURES = 8
VOCABULARY = 64


class MixerBlock(nn.Module):
    """An MLP over patches, then one over channels."""

    def __init__(self, patches: int, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.tokens = nn.Sequential(nn.Linear(patches, 24), nn.GELU(), nn.Linear(24, patches))
        self.norm2 = nn.LayerNorm(channels)
        self.channels = nn.Sequential(nn.Linear(channels, 48), nn.GELU(), nn.Linear(48, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        out: Tensor = x + self.channels(self.norm2(x))
        return out


class Mixer(nn.Module):
    """MLP-Mixer on 8x8 patches."""

    def __init__(self, channels: int = 24, patch: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, patch, stride=patch)
        patches = (IMAGE_SIZE // patch) ** 2
        self.blocks = nn.Sequential(*(MixerBlock(patches, channels) for _ in range(2)))
        self.norm = nn.LayerNorm(channels)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.blocks(self.stem(x).flatten(2).transpose(1, 2))
        result: Tensor = self.fc(self.norm(out).mean(dim=1))
        return result


class LstmClassifier(nn.Module):
    """Bidirectional LSTM over feature frames; classifies the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, 16, num_layers=2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(x)
        result: Tensor = self.fc(out[:, -1])
        return result


class GruTagger(nn.Module):
    """Embedding, GRU, and a class for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.gru = nn.GRU(16, 24, batch_first=True)
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        out, _ = self.gru(self.embedding(tokens))
        result: Tensor = self.fc(out)
        return result


# torch.export fixes the length of what goes through an LSTM or a GRU: no dynamic sequence here.
STEPS = 12


def _frames(seed: int, batch: int, _sequence: int) -> Inputs:
    return (torch.randn(batch, STEPS, FEATURES, generator=generator(seed)),), {}


def _tokens(seed: int, batch: int, _sequence: int) -> Inputs:
    return (), {"tokens": torch.randint(0, VOCABULARY, (batch, STEPS), generator=generator(seed))}


OTHER_MODELS = (
    ZooModel(
        "mlp_mixer",
        "mlp",
        lambda: build_random(Mixer, seed=1),
        images,
        {"x": {0: BATCH}},
        "linear layers on a transposed activation",
    ),
    ZooModel(
        "lstm",
        "recurrent",
        lambda: build_random(LstmClassifier, seed=1),
        _frames,
        {"x": {0: BATCH}},
        "two bidirectional layers in one aten.lstm node; fixed length",
    ),
    ZooModel(
        "gru",
        "recurrent",
        lambda: build_random(GruTagger, seed=1),
        _tokens,
        {"tokens": {0: BATCH}},
        "embedding and GRU; fixed length",
    ),
)
