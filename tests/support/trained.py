"""The trained models and data of the folder that SQCOMPILE_DATA names; tests on them have the marker `data`."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import Dim

from sqcompile import Program, trace
from sqcompile.evaluation import accuracy, perplexity


@dataclass(frozen=True)
class Trained:
    """A trained model as a program, with what it is calibrated and judged on.

    Attributes:
        program: The dense program.
        calibration: Batches that are not among those it is judged on, where the data set has enough.
        judge: Quality of anything that is called as the model is: accuracy in %, or perplexity.
    """

    program: Program
    calibration: list[Any]
    judge: Callable[[Callable[..., Any]], float]


def folder() -> Path:
    """The data folder; the test is skipped if there is none."""
    path = os.environ.get("SQCOMPILE_DATA")
    if not path:
        pytest.skip("SQCOMPILE_DATA names no folder of trained models")
    return Path(path)


@functools.cache
def resnet20() -> Trained:
    """ResNet-20; accuracy on CIFAR-10 images 3000-3999, calibrated on the first 512."""
    model = _models().CifarResNet(3).eval()
    model.load_state_dict(load_file(folder() / "resnet20_cifar10/model.safetensors"))
    return _classifier(model, *cifar(), calibration=slice(0, 512), judged=slice(3000, 4000))


@functools.cache
def dscnn() -> Trained:
    """The depthwise-separable keyword spotter; accuracy on all 500 samples, calibrated on the first 256."""
    model = _models().KeywordDSCNN().eval()
    model.load_state_dict(load_file(folder() / "dscnn_kws/model.safetensors"))
    stored = np.load(folder() / "dscnn_kws/samples.npz")
    samples, labels = torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"].astype(np.int64))
    return _classifier(model, samples, labels, calibration=slice(0, 256), judged=slice(0, 500))


@functools.cache
def mobile_net(epochs: int = 15) -> Trained:
    """A MobileNetV1 of width 1/4, trained here on images 0-2999 for `epochs`; judged on 3000-3999."""
    images, labels = cifar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _train(MobileNet(), images[:3000], labels[:3000], epochs)
    return _classifier(model, images, labels, calibration=slice(0, 512), judged=slice(3000, 4000))


@functools.cache
def language_model(name: str) -> Trained:
    """A small Llama; perplexity on its held-out tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder() / name, dtype=torch.float32).eval()
    model.config.use_cache = False
    tokens = {
        key: torch.from_numpy(value.astype(np.int64))
        for key, value in np.load(folder() / name / "tokens.npz").items()
    }
    shapes = {"input_ids": {0: Dim("batch")}}
    program = trace(model, {"input_ids": tokens["eval"][:2]}, dynamic_shapes=shapes)
    calibration = [{"input_ids": rows} for rows in tokens["calib"][:32].split(8)]
    return Trained(program, calibration, lambda model: perplexity(model, tokens["eval"]))


@functools.cache
def cifar() -> tuple[Tensor, Tensor]:
    """Images [4000, 3, 32, 32], normalised, and their labels."""
    kind = _models().CifarResNet
    stored = np.load(folder() / "resnet20_cifar10/images.npz")
    mean, deviation = (torch.tensor(value).view(3, 1, 1) for value in (kind.MEAN, kind.STD))
    images = (torch.from_numpy(stored["x"]).permute(0, 3, 1, 2).float() / 255 - mean) / deviation
    return images, torch.from_numpy(stored["y"].astype(np.int64))


class MobileNet(nn.Module):
    """MobileNetV1 for 32 x 32 images. Howard et al. 2017, table 1, with strides for small images."""

    PLAN = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 1))

    def __init__(self, width: float = 0.25) -> None:
        super().__init__()

        def unit(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

        channels = int(32 * width)
        units = [unit(3, channels, 3, 1, 1)]
        for size, stride in self.PLAN:
            outputs = int(size * width)
            units += [unit(channels, channels, 3, stride, channels), unit(channels, outputs, 1, 1, 1)]
            channels = outputs
        self.features = nn.Sequential(*units)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.features(x).mean((2, 3)))
        return result


def _train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * (len(images) // 100))
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(100):
            batch = images[index].roll(torch.randint(-3, 4, (2,)).tolist(), (2, 3))
            batch = batch.flip(3) if torch.rand(()) < 0.5 else batch
            loss = nn.functional.cross_entropy(model(batch), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _classifier(
    model: nn.Module, samples: Tensor, labels: Tensor, *, calibration: slice, judged: slice
) -> Trained:
    program = trace(model, (samples[:2],), dynamic_shapes=({0: Dim("batch")},))
    return Trained(
        program,
        list(samples[calibration].split(64)),
        lambda model: 100 * accuracy(model, samples[judged], labels[judged]),
    )


@functools.cache
def _models() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trained_models", folder() / "models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
