"""A small CNN on scikit-learn's handwritten digits: trained in seconds, for demos and tests.

    python examples/digits_cnn.py [--output build/digits]    # model.pt2, calibration.npz, test.npz

Small as it is, it holds what the passes look for: batch norms to fold, a residual sum that ties
channels together, a depthwise block, and a convolution whose channels feed only one layer.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F


class Digits(NamedTuple):
    """Images [N, 1, 8, 8] float32 in 0..1, labels [N] int64: 1,347 for training, 450 for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def conv_bn(
    channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out))


class DigitsCNN(nn.Module):
    """Input [N, 1, 8, 8], output [N, 10] logits."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = conv_bn(1, width)
        self.block1 = conv_bn(width, width)
        self.block2 = conv_bn(width, width)
        self.depthwise = conv_bn(width, width, stride=2, groups=width)
        self.pointwise = conv_bn(width, 2 * width, kernel=1)
        self.classifier = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.block2(F.relu(self.block1(x))))
        x = F.relu(self.depthwise(x))
        x = F.relu(self.pointwise(x))
        return self.classifier(x.mean((2, 3)))


def build_model(seed: int = 0) -> DigitsCNN:
    """An untrained model; the same seed gives the same weights, and torch's own generator is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitsCNN()


def load_data() -> Digits:
    """The 1,797 images, split once and for all: every class in the same share on both sides."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=450, random_state=0, stratify=labels)
    train_images, test_images = (
        torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8) for x in parts[:2]
    )
    train_labels, test_labels = (torch.tensor(y, dtype=torch.int64) for y in parts[2:])
    return Digits(train_images, train_labels, test_images, test_labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is their label, 0..1."""
    return (model(images).argmax(1) == labels).float().mean().item()


def train_digits_cnn(seed: int = 0, epochs: int = 15) -> tuple[DigitsCNN, Digits]:
    """Train on the 1,347 images; the model comes back in eval mode."""
    model, data = build_model(seed), load_data()
    generator = torch.Generator().manual_seed(seed)
    count, batch = len(data.train_images), 64
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=epochs * (count // batch))

    model.train()
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - batch + 1, batch):
            index = order[start : start + batch]
            loss = F.cross_entropy(model(data.train_images[index]), data.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval(), data


def write(folder: Path, model: nn.Module, data: Digits) -> None:
    """Write what the command line takes: the model, images to calibrate with, and others with their labels."""
    folder.mkdir(parents=True, exist_ok=True)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (data.train_images[:8],), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, folder / "model.pt2")
    np.savez(folder / "calibration.npz", x=data.train_images[:256].numpy())
    np.savez(folder / "test.npz", x=data.test_images.numpy(), labels=data.test_labels.numpy())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder for the model and its data")
    options = parser.parse_args()
    model, data = train_digits_cnn()
    parameters = sum(p.numel() for p in model.parameters())
    share = accuracy(model, data.test_images, data.test_labels)
    print(f"{parameters:,} parameters, {share:.2%} of {len(data.test_labels)} test images")
    if options.output:
        write(options.output, model, data)


if __name__ == "__main__":
    main()
