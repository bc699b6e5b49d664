"""Convolutional networks for small devices: depthwise, squeeze-and-excite, channel shuffle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import CLASSES, Head, SqueezeExcite, cnn, conv_bn


class MobileNetV1(nn.Module):
    """Depthwise-separable convolutions without residuals."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn(3, 8, stride=2, act=nn.ReLU(inplace=True))]
        channels = 8
        for width, stride in ((16, 1), (16, 2), (32, 1)):
            layers.append(conv_bn(channels, channels, 3, stride, channels, nn.ReLU(inplace=True)))
            layers.append(conv_bn(channels, width, 1, act=nn.ReLU(inplace=True)))
            channels = width
        self.features = nn.Sequential(*layers)
        self.head = Head(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, optional squeeze-and-excite, linear projection."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, act: type[nn.Module], se: nn.Module | None = None
    ) -> None:
        super().__init__()
        hidden = inputs * 3
        layers: list[nn.Module] = [
            conv_bn(inputs, hidden, 1, act=act(inplace=True)),
            conv_bn(hidden, hidden, 3, stride, hidden, act(inplace=True)),
        ]
        if se is not None:
            layers.append(se)
        self.body = nn.Sequential(*layers, conv_bn(hidden, outputs, 1))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """ReLU6 and linear bottlenecks."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(3, 8, stride=2, act=nn.ReLU6(inplace=True)),
            InvertedResidual(8, 8, 1, nn.ReLU6),
            InvertedResidual(8, 16, 2, nn.ReLU6),
            conv_bn(16, 32, 1, act=nn.ReLU6(inplace=True)),
        )
        self.head = Head(32, dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


class MobileNetV3(nn.Module):
    """Hardswish, squeeze-and-excite with a hard sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        se = SqueezeExcite(24, 8, nn.ReLU(inplace=True), nn.Hardsigmoid(inplace=True))
        self.features = nn.Sequential(
            conv_bn(3, 8, stride=2, act=nn.Hardswish(inplace=True)),
            InvertedResidual(8, 8, 1, nn.ReLU, se),
            InvertedResidual(8, 16, 2, nn.Hardswish),
            conv_bn(16, 32, 1, act=nn.Hardswish(inplace=True)),
        )
        self.head = Head(32, dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


class EfficientNet(nn.Module):
    """SiLU everywhere, squeeze-and-excite with a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(3, 8, stride=2, act=nn.SiLU(inplace=True)),
            InvertedResidual(8, 8, 1, nn.SiLU, SqueezeExcite(24, 4, nn.SiLU(inplace=True), nn.Sigmoid())),
            InvertedResidual(8, 16, 2, nn.SiLU, SqueezeExcite(24, 4, nn.SiLU(inplace=True), nn.Sigmoid())),
            conv_bn(16, 32, 1, act=nn.SiLU(inplace=True)),
        )
        self.head = Head(32, dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


class Fire(nn.Module):
    """Squeeze 1x1, then 1x1 and 3x3 side by side."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.squeeze(x))
        return torch.cat([self.act(self.expand1x1(x)), self.act(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """Fire modules without batch norm; the classifier is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            Fire(8, 4, 8),
            Fire(16, 4, 8),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(16, CLASSES, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` groups."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """Split the channels, transform one half, concatenate, shuffle; both halves at stride 2."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        half = outputs // 2
        entering = inputs if stride > 1 else half
        self.branch1 = nn.Sequential()
        if stride > 1:
            pointwise = conv_bn(inputs, half, 1, act=nn.ReLU(inplace=True))
            self.branch1 = nn.Sequential(conv_bn(inputs, inputs, 3, stride, inputs), pointwise)
        self.branch2 = nn.Sequential(
            conv_bn(entering, half, 1, act=nn.ReLU(inplace=True)),
            conv_bn(half, half, 3, stride, half),
            conv_bn(half, half, 1, act=nn.ReLU(inplace=True)),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            kept, changed = x.chunk(2, dim=1)
            return channel_shuffle(torch.cat((kept, self.branch2(changed)), dim=1), 2)
        return channel_shuffle(torch.cat((self.branch1(x), self.branch2(x)), dim=1), 2)


class ShuffleNetV2(nn.Module):
    """Two stages of shuffle units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, stride=2, act=nn.ReLU(inplace=True))
        self.stage = nn.Sequential(ShuffleUnit(8, 16, 2), ShuffleUnit(16, 16, 1))
        self.conv5 = conv_bn(16, 32, 1, act=nn.ReLU(inplace=True))
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv5(self.stage(self.stem(x)))
        out: Tensor = self.fc(x.mean([2, 3]))
        return out


MOBILE_CNNS = (
    cnn("mobilenet_v1", MobileNetV1, "depthwise convolutions, no residuals"),
    cnn("mobilenet_v2", MobileNetV2, "ReLU6, linear bottlenecks with residuals"),
    cnn("mobilenet_v3", MobileNetV3, "hardswish, squeeze-and-excite with hard sigmoid"),
    cnn("efficientnet", EfficientNet, "SiLU, squeeze-and-excite with sigmoid"),
    cnn("squeezenet", SqueezeNet, "no batch norm, ceil-mode pooling, convolutional classifier"),
    cnn("shufflenet_v2", ShuffleNetV2, "chunk, concat, view-transpose-view with a symbolic batch"),
)
