"""A small program of 8-bit images with every form of a convolution: what the tests of files share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from sqcompile.calibration import Calibration
from sqcompile.passes import pipelines
from sqcompile.passes.prune import ApplyMasks, MaskWeights
from sqcompile.pipeline import Pass, PassContext
from sqcompile.pipeline.manager import PassManager
from sqcompile.program import Program
from sqcompile.tracing import trace


class Images(nn.Module):
    """Convolutions dense, in blocks, by single weights, depthwise, of groups, transposed; and what is around."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.blocks = nn.Conv2d(64, 64, 3, padding=1)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.elements = nn.Conv2d(64, 64, 3, padding=1)
        self.groups = nn.Conv2d(64, 8, 1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 1, 1)
        x = F.relu(x + self.blocks(x))
        x = self.elements(F.hardswish(self.depthwise(x)))
        x = x * torch.sigmoid(x.mean((2, 3), keepdim=True))
        return F.interpolate(self.up(self.groups(x)), scale_factor=2)


def images(batch: int, height: int, width: int) -> Tensor:
    """Return images that depend on their sizes alone, in numbers that every CPU writes alike."""
    count = batch * 3 * height * width
    steps = torch.arange(count) * 37 % 101 - 50
    return (steps.to(torch.float32) / 32).reshape(batch, 3, height, width)


def images_program() -> Program:
    """Return the program in 8 bits: batches of 0 to 4, images of one pixel to 16."""
    generator = torch.Generator().manual_seed(5)
    model = Images().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = max(parameter[0].numel(), 1)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    dims = {
        "x": {
            0: Dim("batch", min=0, max=4),
            2: Dim("height", min=1, max=16),
            3: Dim("width", min=1, max=16),
        }
    }
    program = trace(model, (images(2, 9, 8),), dynamic_shapes=dims)
    passes: list[Pass] = [
        MaskWeights(sparsity=0.9, pattern="1x4", layers=("blocks",)),
        MaskWeights(sparsity=0.9, layers=("elements",)),
        ApplyMasks(),
        *pipelines.int8_static(equalize=False, correct_bias=False),
    ]
    calibration = Calibration([images(2, 9, 8), images(1, 16, 16)], program.signature)
    PassManager(passes).run(program, PassContext(calibration=calibration))
    return program


def sounds(batch: int, length: int) -> torch.Tensor:
    """Return random spectrograms of 10 features."""
    return torch.randn(batch, 1, length, 10, generator=torch.Generator().manual_seed(batch * 97 + length))


def sounds_program() -> Program:
    """Return what hears keywords, in 8 bits: one channel comes in, of any length."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = nn.Sequential(
            nn.Conv2d(1, 20, (10, 4), stride=2, padding=(5, 1)),
            nn.ReLU(),
            nn.Conv2d(20, 20, 3, padding=1, groups=20),
            nn.ReLU(),
            nn.Conv2d(20, 16, 1),
        ).eval()
    dims = {"input": {2: Dim("length", min=2, max=64)}}
    program = trace(model, (sounds(1, 20),), dynamic_shapes=dims)
    calibration = Calibration([sounds(1, 20), sounds(1, 33)], program.signature)
    PassManager(pipelines.int8_static(equalize=False)).run(program, PassContext(calibration=calibration))
    return program
