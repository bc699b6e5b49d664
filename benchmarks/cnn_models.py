"""The CNNs of the benchmark, as their papers write them: random weights, since speed does not depend on values."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: nn.Module | None = None
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([act] if act is not None else []))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_norm(inputs, width, 1, act=nn.ReLU())
        self.conv2 = conv_norm(width, width, 3, stride, act=nn.ReLU())
        self.conv3 = conv_norm(width, outputs, 1)
        self.shortcut = (
            conv_norm(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x))


class ResNet50(nn.Module):
    """He et al. 2015, with the stride in the 3x3 convolution as everybody has it now; `width` 0.5 halves channels."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        base = int(64 * width)
        self.stem = conv_norm(3, base, 7, 2, act=nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks: list[nn.Module] = []
        inputs = base
        for stage, count in enumerate((3, 4, 6, 3)):
            for place in range(count):
                stride = 2 if stage > 0 and place == 0 else 1
                blocks.append(Bottleneck(inputs, base << stage, (4 * base) << stage, stride))
                inputs = (4 * base) << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.pool(self.stem(x))).mean((2, 3)))


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        layers = [] if expand == 1 else [conv_norm(inputs, hidden, 1, act=nn.ReLU6())]
        layers.append(conv_norm(hidden, hidden, 3, stride, hidden, nn.ReLU6()))
        layers.append(conv_norm(hidden, outputs, 1))
        self.body = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


class MobileNetV2(nn.Module):
    """Sandler et al. 2018; `width` scales channels, to multiples of 8."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return max(8, int(channels * width + 4) // 8 * 8)

        inputs = scaled(32)
        layers: list[nn.Module] = [conv_norm(3, inputs, 3, 2, act=nn.ReLU6())]
        for expand, channels, count, stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            for place in range(count):
                layers.append(Inverted(inputs, scaled(channels), stride if place == 0 else 1, expand))
                inputs = scaled(channels)
        last = scaled(1280) if width > 1 else 1280
        self.features = nn.Sequential(*layers, conv_norm(inputs, last, 1, act=nn.ReLU6()))
        self.head = nn.Linear(last, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class DsCnn(nn.Module):
    """The keyword spotter of Zhang et al. 2017 (DS-CNN-S of MLPerf Tiny): 49 x 10 features, 12 words."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 64, (10, 4), 2, (5, 1), bias=False), nn.BatchNorm2d(64), nn.ReLU()
        )
        blocks = []
        for _ in range(4):
            blocks += [conv_norm(64, 64, 3, groups=64, act=nn.ReLU()), conv_norm(64, 64, 1, act=nn.ReLU())]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Basic(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_norm(inputs, outputs, 3, stride, act=nn.ReLU())
        self.conv2 = conv_norm(outputs, outputs, 3)
        self.shortcut = (
            conv_norm(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class ResNet20(nn.Module):
    """He et al. 2015 for 32 x 32 images, with projections as shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 16, 3, act=nn.ReLU())
        blocks: list[nn.Module] = []
        inputs = 16
        for stage in range(3):
            for place in range(3):
                outputs = 16 << stage
                blocks.append(Basic(inputs, outputs, 2 if stage > 0 and place == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


MODELS: dict[str, tuple[type[nn.Module], tuple[int, int, int]]] = {
    "resnet50": (ResNet50, (3, 224, 224)),
    "mobilenet_v2": (MobileNetV2, (3, 224, 224)),
    "ds_cnn": (DsCnn, (1, 49, 10)),
    "resnet20": (ResNet20, (3, 32, 32)),
}


def make_model(name: str, **options: float) -> nn.Module:
    """Return a model in eval mode whose batch norms keep values in a sensible range."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name][0](**options).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.0)
                nn.init.normal_(module.bias, 0, 0.1)
        return model
