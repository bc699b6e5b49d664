"""Convolutional networks for servers, each with the structure of the family it is named after."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import CLASSES, Head, cnn, conv_bn


class Vgg(nn.Module):
    """Plain convolutions with biases, max pooling, and two linear layers on a flattened map."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (8, 16, 16):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(16 * 4 * 4, 32), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(32, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return out


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = conv_bn(inputs, outputs, 1, stride) if inputs != outputs or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out)
        return result


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up, beside a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.body = nn.Sequential(
            conv_bn(inputs, width, 1, act=nn.ReLU(inplace=True)),
            conv_bn(width, width, 3, stride, act=nn.ReLU(inplace=True)),
            conv_bn(width, outputs, 1),
        )
        self.downsample = conv_bn(inputs, outputs, 1, stride) if inputs != outputs or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(self.body(x) + shortcut)


class ResNet(nn.Module):
    """Stem, two stages of blocks, global pooling."""

    def __init__(self, *, bottleneck: bool) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, act=nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        if bottleneck:
            self.layer1 = nn.Sequential(Bottleneck(8, 4, 1), Bottleneck(16, 4, 1))
            self.layer2 = nn.Sequential(Bottleneck(16, 8, 2))
            width = 32
        else:
            self.layer1 = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 8, 1))
            self.layer2 = nn.Sequential(BasicBlock(8, 16, 2))
            width = 16
        self.head = Head(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer2(self.layer1(self.pool(self.stem(x)))))
        return out


class DenseLayer(nn.Module):
    """Batch norm and ReLU *before* each convolution; the result is appended to the input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        out = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        result: Tensor = self.conv2(F.relu(self.norm2(out)))
        return result


class DenseNet(nn.Module):
    """Two dense blocks with a transition between them."""

    def __init__(self, growth: int = 4) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, act=nn.ReLU(inplace=True))
        self.block1 = nn.ModuleList(DenseLayer(8 + i * growth, growth) for i in range(2))
        self.transition = nn.Sequential(
            nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 8, 1, bias=False), nn.AvgPool2d(2)
        )
        self.block2 = nn.ModuleList(DenseLayer(8 + i * growth, growth) for i in range(2))
        self.norm = nn.BatchNorm2d(16)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.block1:
            features.append(layer(features))
        features = [self.transition(torch.cat(features, 1))]
        for layer in self.block2:
            features.append(layer(features))
        out: Tensor = self.head(F.relu(self.norm(torch.cat(features, 1)), inplace=True))
        return out


class Inception(nn.Module):
    """One mixed block: 1x1, 5x5, double 3x3 (one factorized) and pooling branches, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        relu = nn.ReLU
        self.stem = conv_bn(3, 8, stride=2, act=relu(inplace=True))
        self.branch1 = conv_bn(8, 8, 1, act=relu(inplace=True))
        self.branch5 = nn.Sequential(conv_bn(8, 4, 1, act=relu()), conv_bn(4, 8, 5, act=relu()))
        self.branch3 = conv_bn(8, 4, 1, act=relu())
        self.branch3_wide = nn.Conv2d(4, 4, (1, 3), padding=(0, 1))
        self.branch3_tall = nn.Conv2d(4, 4, (3, 1), padding=(1, 0))
        self.branch_pool = conv_bn(8, 8, 1, act=relu())
        self.head = Head(32 + 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        three = self.branch3(x)
        three = torch.cat([self.branch3_wide(three), self.branch3_tall(three)], 1)
        pooled = self.branch_pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        mixed = torch.cat([self.branch1(x), self.branch5(x), three, pooled], 1)
        reduced = F.max_pool2d(mixed, kernel_size=3, stride=2)
        shrunk = F.avg_pool2d(x, 3, stride=2, count_include_pad=False)
        out: Tensor = self.head(torch.cat([reduced, shrunk], 1))
        return out


class UNet(nn.Module):
    """Down twice, up twice (transposed convolution, then upsampling), with concatenated skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = conv_bn(3, 8, act=nn.ReLU(inplace=True))
        self.down2 = conv_bn(8, 16, act=nn.ReLU(inplace=True))
        self.middle = conv_bn(16, 16, act=nn.LeakyReLU(0.1))
        self.up2 = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.up2_norm = nn.BatchNorm2d(16)
        self.join2 = conv_bn(32, 8, act=nn.ReLU(inplace=True))
        self.up1 = nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False)
        self.join1 = conv_bn(16, 8, act=nn.ReLU(inplace=True))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip1 = self.down1(x)
        skip2 = self.down2(F.max_pool2d(skip1, 2))
        out = self.middle(F.max_pool2d(skip2, 2))
        out = self.join2(torch.cat([skip2, self.up2_norm(self.up2(out))], 1))
        out = self.join1(torch.cat([skip1, self.up1(out)], 1))
        result: Tensor = self.head(out)
        return result


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        ).permute(0, 3, 1, 2)
        return out


class ConvNextBlock(nn.Module):
    """Depthwise 7x7, layer norm and an MLP in channels-last order, layer scale, residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        out = self.gamma * self.pwconv2(self.act(self.pwconv1(out)))
        return x + out.permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """Patchifying stem, two stages, layer norm before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), LayerNorm2d(8, eps=1e-6))
        self.stage1 = ConvNextBlock(8)
        self.downsample = nn.Sequential(LayerNorm2d(8, eps=1e-6), nn.Conv2d(8, 16, 2, stride=2))
        self.stage2 = ConvNextBlock(16)
        self.norm = nn.LayerNorm(16, eps=1e-6)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.stage2(self.downsample(self.stage1(self.stem(x))))
        result: Tensor = self.head(self.norm(out.mean([-2, -1])))
        return result


CLASSIC_CNNS = (
    cnn("vgg", Vgg, "plain convolutions with biases; flattened map into linear layers"),
    cnn("resnet_basic", lambda: ResNet(bottleneck=False), "in-place add and ReLU on the shortcut"),
    cnn("resnet_bottleneck", lambda: ResNet(bottleneck=True), "1x1-3x3-1x1 blocks"),
    cnn("densenet", DenseNet, "batch norm before the convolution, after a concat: cannot all be folded"),
    cnn("inception", Inception, "asymmetric kernels, pooling branches, concat of differing scales"),
    cnn("unet", UNet, "transposed convolution with batch norm, bilinear upsampling, skip concats"),
    cnn("convnext", ConvNext, "layer norm, linear in channels-last order, layer scale"),
)
