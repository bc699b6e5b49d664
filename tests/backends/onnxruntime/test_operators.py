"""Floating-point operators one by one, where ours or the exporter's form could differ from PyTorch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional

from sqcompile.backends.onnxruntime.artifact import OnnxArtifact
from sqcompile.backends.onnxruntime.session import OnnxSession
from sqcompile.program import Program
from sqcompile.tracing import trace

Lower = Callable[[Program], OnnxArtifact]
Load = Callable[[OnnxArtifact], OnnxSession]


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


IMAGE = (2, 4, 9, 9)
TOKENS = (2, 5, 16)

# Many operators in one model: an export takes a second, whatever its size.
GROUPS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "activations": (
        lambda _, x: [
            torch.relu(x),
            functional.relu6(x * 5),
            functional.hardtanh(x),
            x.clamp(-0.5, 0.7),
            functional.gelu(x),
            functional.gelu(x, approximate="tanh"),
            functional.silu(x),
            functional.hardswish(x * 3),
            functional.hardsigmoid(x * 3),
            functional.leaky_relu(x, 0.1),
            functional.elu(x),
            functional.softplus(x),
            functional.mish(x),
            torch.sigmoid(x),
            torch.tanh(x),
            functional.softmax(x, -1),
            functional.log_softmax(x, 1),
        ],
        TOKENS,
    ),
    "shapes": (
        lambda _, x: [
            x.view(2, -1),
            x.transpose(1, 2).reshape(2, -1),
            x.permute(2, 0, 1).flatten(1),
            x.unsqueeze(1).expand(2, 3, 5, 16),
            x[:, 1:-1, ::2],
            x[:, -1],
            torch.cat([x, x * 2], -1),
            torch.stack([x, -x], 1),
            *x.chunk(4, -1),
            *x.split([6, 10], -1),
            x.roll(1, 1),
            x.flip(2),
            functional.pad(x, (1, 2, 0, 1)),
            x.repeat(1, 2, 1),
            torch.where(x > 0, x, -x),
            x.masked_fill(x < 0, -1.0),
            x.cumsum(1),
            x.topk(3, -1)[0],
            x.argmax(-1),
            x.tril(),
        ],
        TOKENS,
    ),
    "pooling": (
        lambda _, x: [
            functional.max_pool2d(x, 3, 2, 1),
            functional.max_pool2d(x, 2, ceil_mode=True),
            functional.avg_pool2d(x, 3, 2, 1),
            functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
            functional.adaptive_avg_pool2d(x, 1),
            functional.adaptive_avg_pool2d(x, 3),
            x.mean((2, 3)),
            x.mean((2, 3), keepdim=True),
            x.mean(1),
            functional.interpolate(x, scale_factor=2),
            functional.interpolate(x, scale_factor=2, mode="bilinear"),
            functional.interpolate(x, size=(6, 6), mode="bilinear", align_corners=True),
            functional.pixel_shuffle(x, 2),
        ],
        IMAGE,
    ),
    "arithmetic": (
        lambda _, x: [
            x + 1,
            1 - x,
            x / 3,
            2 / (x.abs() + 1),
            x**2,
            x.abs().sqrt(),
            x.exp(),
            (x.abs() + 1).log(),
            x.sin(),
            torch.rsqrt(x.abs() + 1),
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
            x // 0.3,
            x.std(-1),
            x.var(1, unbiased=False),
            x.norm(dim=-1),
            x.amax(-1),
            x.sum((0, 2)),
            torch.maximum(x, -x),
            x @ x.transpose(1, 2),
            torch.einsum("bsk,btk->bst", x, x),
        ],
        TOKENS,
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_operators(name: str, lower: Lower, load: Load) -> None:
    function, shape = GROUPS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    program = trace(Apply(lambda m, x: tuple(function(m, x))), (x,))
    results = load(lower(program))(x)
    wrong = [
        index
        for index, (result, expected) in enumerate(zip(results, program(x), strict=True))
        if result.dtype != expected.dtype or not torch.allclose(result, expected, rtol=2e-5, atol=2e-6)
    ]
    assert wrong == []


def test_layers(lower: Lower, load: Load) -> None:
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    layers = {
        "plain": nn.Conv2d(4, 6, 3),
        "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1),
        "dilated": nn.Conv2d(4, 6, 3, dilation=2),
        "same": nn.Conv2d(4, 6, 3, padding="same"),
        "grouped": nn.Conv2d(4, 8, 3, groups=2, bias=False),
        "depthwise": nn.Conv2d(4, 4, 3, groups=4),
        "up": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
        "batch_norm": nn.BatchNorm2d(4),
        "group_norm": nn.GroupNorm(2, 4),
        "instance_norm": nn.InstanceNorm2d(4),
        "layer_norm": nn.LayerNorm(9),
        "linear": nn.Linear(9, 5),
        "prelu": nn.PReLU(4),
    }
    program = trace(Apply(lambda m, x: tuple(getattr(m, name)(x) for name in layers), **layers).eval(), (x,))
    for result, expected in zip(load(lower(program))(x), program(x), strict=True):
        torch.testing.assert_close(result, expected.detach(), rtol=2e-5, atol=1e-5)


def test_fused_forms(lower: Lower, optimized: Callable[[OnnxArtifact], Counter[str]]) -> None:
    """Norms and attention come out as the runtime's own operators, without tests for NaN over the scores."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(16))

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
            heads = x.view(*x.shape[:2], 2, 8).transpose(1, 2)
            y = functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
            return y.transpose(1, 2).reshape(x.shape)

    x, mask = torch.randn(2, 5, 16), torch.ones(2, 1, 5, 5, dtype=torch.bool)
    dims = {0: Dim("batch", max=8), 1: Dim("length", min=2, max=64)}
    program = trace(Block(), (x, mask), dynamic_shapes=(dims, {0: dims[0], 2: dims[1], 3: dims[1]}))
    found = optimized(lower(program))
    assert found["SimplifiedLayerNormalization"] == 1 and not {"Pow", "ReduceMean", "IsNaN"} & set(found)
    assert found["FusedMatMul"] + found["MatMul"] == 2
