"""The model that is handed in is never written to, whatever is removed from it or trained on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sqcompile
from sqcompile import Pass
from sqcompile.passes import (
    ApplyMasks,
    Calibrate,
    DistillBlocks,
    FineTune,
    FreezeObservers,
    InsertObservers,
    MaskWeights,
    PruneGradually,
    RemoveChannels,
    RemoveLayers,
    RemoveNeurons,
    TrainAdapters,
    TrainQuantized,
    TrainSparse,
)

IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.out = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.norm(self.conv(x)).relu())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 1), nn.Sequential(Block(), Block())
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.hidden(self.blocks(self.stem(x)).mean((2, 3))).relu())
        return result


def fit(module: nn.Module) -> None:
    """Two steps in training mode: weights and running statistics move."""
    module.train()
    optimizer = torch.optim.SGD([item for item in module.parameters() if item.requires_grad], 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        module(IMAGES).square().mean().backward()
        optimizer.step()
    module.eval()


def fail(module: nn.Module) -> None:
    """Move the weights, and then break."""
    fit(module)
    raise ValueError("no more data")


OBSERVED = [InsertObservers(), Calibrate()]
PIPELINES: dict[str, list[Pass]] = {
    "channels": [RemoveChannels(ratio=0.5, importance="hessian", compensate=True)],
    "neurons": [RemoveNeurons(ratio=0.5, importance="taylor", compensate=True)],
    "layers": [RemoveLayers(ratio=0.5)],
    "fine-tune": [FineTune(train=fit)],
    "gradually": [PruneGradually(train=fit, prune=MaskWeights(sparsity=0.5), rounds=2, rewind=True)],
    "sparse": [TrainSparse(train=fit, penalty="l1", strength=1e-2)],
    "gates": [TrainSparse(train=fit, penalty="l0", strength=1e-2)],
    "adapters": [MaskWeights(sparsity=0.5), TrainAdapters(train=fit), ApplyMasks()],
    "quantized": [*OBSERVED, TrainQuantized(train=fit), FreezeObservers()],
    "blocks": [MaskWeights(sparsity=0.5), DistillBlocks(epochs=1)],
}


@pytest.mark.parametrize("name", PIPELINES)
def test_the_model_stays_as_it_was(name: str) -> None:
    model, before = handed_in()
    options: Any = {"calibration": [IMAGES], "backend": "reference", "verify": "ends"}
    compiled = sqcompile.compile(model, PIPELINES[name], (IMAGES,), **options)
    assert isinstance(compiled, sqcompile.Compiled)
    with torch.no_grad():
        assert not torch.equal(compiled.program(IMAGES), model(IMAGES)), "something was done"
    check(model, before)


def test_it_stays_when_training_fails() -> None:
    model, before = handed_in()
    with pytest.raises(sqcompile.Error, match="training function failed"):
        sqcompile.compile(model, [FineTune(train=fail)], (IMAGES,), backend="reference")
    check(model, before)


def handed_in() -> tuple[Model, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Model().eval()
    return model, {name: value.clone() for name, value in model.state_dict().items()}


def check(model: Model, before: dict[str, Tensor]) -> None:
    assert set(model.state_dict()) == set(before) and not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(item.grad is None and item.requires_grad for item in model.parameters())
