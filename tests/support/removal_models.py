"""Architectures for the tests of structured removal that the zoo does not hold; small and random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .zoo.blocks import Head, SqueezeExcite, conv_bn, images
from .zoo.model import Inputs, build_random, generator, settle_batch_norms
from .zoo.transformers_models import SIZES, SPECIAL_TOKENS, VISION, VOCABULARY


class GroupedBottleneck(nn.Module):
    """1x1, grouped 3x3, 1x1; with squeeze-and-excite as in RegNet-Y, without as in ResNeXt."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, groups: int, se: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            conv_bn(inputs, width, 1, act=nn.ReLU(inplace=True)),
            conv_bn(width, width, 3, stride, groups, nn.ReLU(inplace=True)),
        ]
        if se:
            layers.append(SqueezeExcite(width, 4, nn.ReLU(), nn.Sigmoid()))
        self.body = nn.Sequential(*layers, conv_bn(width, outputs, 1))
        self.shortcut = conv_bn(inputs, outputs, 1, stride) if inputs != outputs or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + (x if self.shortcut is None else self.shortcut(x)))


class GroupedNet(nn.Module):
    """Two stages of grouped bottlenecks."""

    def __init__(self, *, se: bool) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, stride=2, act=nn.ReLU(inplace=True))
        self.layer1 = GroupedBottleneck(8, 16, 16, 1, 4, se)
        self.layer2 = nn.Sequential(
            GroupedBottleneck(16, 32, 32, 2, 8, se), GroupedBottleneck(32, 32, 32, 1, 8, se)
        )
        self.head = Head(32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layer2(self.layer1(self.stem(x))))
        return out


class WideBlock(nn.Module):
    """Norm and activation before each convolution, as in WideResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs or stride > 1 else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.norm2(self.conv1(out)))) + shortcut


class WideResNet(nn.Module):
    """Two groups of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(WideBlock(8, 16, 1), WideBlock(16, 16, 1), WideBlock(16, 32, 2))
        self.norm = nn.BatchNorm2d(32)
        self.head = Head(32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.norm(self.blocks(self.stem(x)))))
        return out


class PaddedResNet(nn.Module):
    """Shortcuts that are strided and padded with zero channels, as in the ResNets for CIFAR."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, act=nn.ReLU())
        self.first, self.second = conv_bn(8, 16, 3, 2, act=nn.ReLU()), conv_bn(16, 16)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        out: Tensor = self.head(F.relu(self.second(self.first(x)) + shortcut))
        return out


class GoogLeNet(nn.Module):
    """An inception block, and an auxiliary classifier beside the main one."""

    def __init__(self) -> None:
        super().__init__()
        relu = nn.ReLU
        self.stem = conv_bn(3, 8, stride=2, act=relu())
        self.branch1 = conv_bn(8, 8, 1, act=relu())
        self.branch2 = nn.Sequential(conv_bn(8, 4, 1, act=relu()), conv_bn(4, 8, act=relu()))
        self.branch3 = nn.Sequential(conv_bn(8, 4, 1, act=relu()), conv_bn(4, 4, act=relu()))
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, 1, padding=1, ceil_mode=True), conv_bn(8, 4, 1, act=relu())
        )
        self.auxiliary = nn.Sequential(
            nn.AdaptiveAvgPool2d((2, 2)), nn.Conv2d(24, 8, 1), nn.Flatten(), nn.Linear(32, 10)
        )
        self.head = Head(24)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        x = torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)
        return self.head(x), self.auxiliary(x)


class FeaturePyramid(nn.Module):
    """Lateral and top-down sums over three scales; class and box heads that all scales share."""

    def __init__(self, anchors: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.c2 = conv_bn(3, 8, stride=2, act=nn.ReLU())
        self.c3 = conv_bn(8, 16, stride=2, act=nn.ReLU())
        self.c4 = conv_bn(16, 24, stride=2, act=nn.ReLU())
        self.lateral = nn.ModuleList(nn.Conv2d(width, 12, 1) for width in (8, 16, 24))
        self.smooth = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1) for _ in range(3))
        self.tower = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU())
        self.classes = nn.Conv2d(12, anchors * classes, 3, padding=1)
        self.boxes = nn.Conv2d(12, anchors * 4, 3, padding=1)
        self.anchors, self.count = anchors, classes

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        c2 = self.c2(x)
        c3 = self.c3(c2)
        c4 = self.c4(c3)
        p4 = self.lateral[2](c4)
        p3 = self.lateral[1](c3) + F.interpolate(p4, scale_factor=2.0, mode="nearest")
        p2 = self.lateral[0](c2) + F.interpolate(p3, size=c2.shape[-2:], mode="nearest")
        towers = [self.tower(layer(level)) for layer, level in zip(self.smooth, (p2, p3, p4), strict=True)]
        classes = [self._flat(self.classes(tower), self.count) for tower in towers]
        boxes = [self._flat(self.boxes(tower), 4) for tower in towers]
        return {"classes": torch.cat(classes, 1), "boxes": torch.cat(boxes, 1)}

    def _flat(self, x: Tensor, width: int) -> Tensor:
        batch, _, height, breadth = x.shape
        x = x.view(batch, self.anchors, width, height, breadth).permute(0, 3, 4, 1, 2)
        return x.reshape(batch, -1, width)


class SuperResolution(nn.Module):
    """Sub-pixel upsampling in the middle and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.Conv2d(8, 32, 3, padding=1)
        self.mid = nn.Conv2d(8, 8, 3, padding=1)
        self.tail = nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        x = F.pixel_shuffle(self.up(x + F.relu(self.body(x))), 2)
        return F.pixel_shuffle(self.tail(F.relu(self.mid(x))), 2)


class FusedAttention(nn.Module):
    """Query, key and value from one layer, split by reshape, permute and unbind, as timm writes it."""

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.gate = nn.Linear(width, 64)
        self.out = nn.Linear(32, 10)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        batch, count, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, count, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (width // self.heads) ** -0.5) @ k.transpose(-2, -1)
        mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, count, width)
        out: Tensor = self.out(F.glu(self.gate(x + self.proj(mixed)), -1)).mean(1)
        return out


class EinsumAttention(nn.Module):
    """Attention in einsum, with grouped heads through `enable_gqa` in a second one."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, 4 * 6) for _ in range(3))
        self.o = nn.Linear(24, width)
        self.query, self.key, self.value = (
            nn.Linear(width, 4 * 6),
            nn.Linear(width, 2 * 6),
            nn.Linear(width, 12),
        )
        self.last = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 6)) for layer in (self.q, self.k, self.v))
        scores = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        x = x + self.o(torch.einsum("bhts,bshd->bthd", scores, v).flatten(2))
        q, k, v = (
            layer(x).unflatten(-1, (-1, 6)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        out: Tensor = self.last(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], 24))
        return out


class GruClassifier(nn.Module):
    """Two GRU layers in both directions; the last step is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 12, num_layers=2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.gru(x)[0][:, -1])
        return out


@dataclass(frozen=True)
class RemovalModel:
    """An architecture and its inputs.

    Attributes:
        name: Its name.
        make: Builds it, the same at every call.
        inputs: Its inputs, from a seed.
        kinds: Which kinds of units it must be able to lose.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    kinds: tuple[str, ...]


def _images(seed: int) -> Inputs:
    return images(seed, 2)


def _sequences(width: int) -> Callable[[int], Inputs]:
    return lambda seed: ((torch.randn(2, 6, width, generator=generator(seed)),), {})


def _cnn(name: str, build: Callable[[], nn.Module], kinds: tuple[str, ...] = ("channels",)) -> RemovalModel:
    def make() -> nn.Module:
        return settle_batch_norms(build_random(build, seed=1), _images(7)[0], seed=2)

    return RemovalModel(name, make, _images, kinds)


def _transformer(
    name: str,
    class_name: str,
    config_name: str,
    options: dict[str, Any],
    inputs: Callable[[int], Inputs],
    kinds: tuple[str, ...] = ("heads", "neurons"),
) -> RemovalModel:
    def make() -> nn.Module:
        transformers = import_module("transformers")
        config = getattr(transformers, config_name)(**options)
        model = build_random(lambda: getattr(transformers, class_name)(config), seed=1)
        return model

    return RemovalModel(name, make, inputs, kinds)


def _tokens(*names: str, extra: Callable[[int], dict[str, Any]] | None = None) -> Callable[[int], Inputs]:
    def make(seed: int) -> Inputs:
        tokens = {
            name: torch.randint(3, VOCABULARY, (2, 7), generator=generator(seed + index))
            for index, name in enumerate(names)
        }
        return (), {**(extra(seed) if extra else {}), **tokens}

    return make


def _pixels(seed: int) -> Inputs:
    return (), {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator(seed))}


def _spectrogram(seed: int) -> dict[str, Any]:
    return {"input_features": torch.randn(2, 8, 32, generator=generator(seed))}


_T5 = {
    **SPECIAL_TOKENS, "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0, "use_cache": False, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
_WHISPER = {
    **SPECIAL_TOKENS, "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "decoder_start_token_id": 1,
    "use_cache": False,
}  # fmt: skip
_SWIN = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
    "num_labels": 3,
}  # fmt: skip

REMOVAL_MODELS: dict[str, RemovalModel] = {
    model.name: model
    for model in (
        _cnn("resnext", lambda: GroupedNet(se=False)),
        _cnn("regnet_y", lambda: GroupedNet(se=True)),
        _cnn("wide_resnet", WideResNet),
        _cnn("padded_resnet", PaddedResNet),
        _cnn("googlenet", GoogLeNet),
        _cnn("feature_pyramid", FeaturePyramid),
        _cnn("super_resolution", SuperResolution),
        _cnn("fused_attention", FusedAttention, ("heads", "neurons")),
        RemovalModel(
            "einsum_attention",
            lambda: build_random(EinsumAttention, seed=1),
            _sequences(16),
            ("heads",),
        ),
        RemovalModel(
            "gru_classifier", lambda: build_random(GruClassifier, seed=1), _sequences(8), ("neurons",)
        ),
        _transformer("swin", "SwinForImageClassification", "SwinConfig", _SWIN, _pixels),
        _transformer(
            "deit", "DeiTForImageClassification", "DeiTConfig", {**VISION, "num_labels": 3}, _pixels
        ),
        _transformer(
            "t5",
            "T5ForConditionalGeneration",
            "T5Config",
            _T5,
            _tokens("input_ids", "decoder_input_ids"),
        ),
        _transformer(
            "whisper",
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            _WHISPER,
            _tokens("decoder_input_ids", extra=_spectrogram),
            ("heads", "neurons", "channels"),
        ),
        _transformer(
            "phi",
            "PhiForCausalLM",
            "PhiConfig",
            {**SIZES, **SPECIAL_TOKENS, "use_cache": False},
            _tokens("input_ids"),
        ),
    )
}
